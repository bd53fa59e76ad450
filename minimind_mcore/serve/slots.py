"""Keys and values of sequences that join and leave a running batch.

Each sequence has a slot: a row of one table, with positions of its own. The slots of running sequences come first, so
that a step reads them without copying. A slot keeps its tokens after its sequence has ended. A later prompt with the
same prefix, such as the next turn of a chat, reuses them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minimind_mcore.inference.decoder import Decoder, Window

MIN_GROWTH = 128  # minimum number of positions by which the table grows


class Slots:
    """Cached keys and values of all slots, and the ids to which they belong.

    Args:
        decoder: decoder of the model.
        budget: maximum number of positions, over all slots.
    """

    def __init__(self, decoder: Decoder, budget: int) -> None:
        self.decoder, self.budget = decoder, budget
        self.used = 0  # number of slots of running sequences
        self.tokens: list[list[int]] = []  # of each slot: the ids whose keys and values are cached
        self.keys: list[Tensor] = []  # of each layer: [slots, capacity, kv_heads, head_dim]
        self.values: list[Tensor] = []
        self.cos = self.sin = torch.empty(0)

    @property
    def capacity(self) -> int:
        """Number of allocated positions per slot."""
        return self.keys[0].shape[1] if self.keys else 0

    def fits(self, slots: int, capacity: int) -> bool:
        """Return whether this many slots with this many positions are within the budget."""
        return slots * capacity <= self.budget

    def reserve(self, used: int, capacity: int) -> None:
        """Provide at least `used` slots with at least `capacity` positions. Idle slots are dropped to stay in the
        budget."""
        if capacity > self.capacity:  # grow by more than requested, so that not every step copies the table
            rounded = -(-capacity // MIN_GROWTH) * MIN_GROWTH
            capacity = max(capacity, min(self.budget // max(used, 1), rounded + self.capacity // 2))
        capacity = max(capacity, self.capacity)
        self._resize(max(used, min(len(self.tokens), self.budget // capacity)), capacity)

    def shrink(self, used: int, capacity: int) -> None:
        """Drop idle slots, and positions that no running sequence uses."""
        self._resize(used, capacity)

    def _resize(self, slots: int, capacity: int) -> None:
        del self.tokens[slots:]
        self.tokens += [[] for _ in range(slots - len(self.tokens))]
        if self.keys and self.keys[0].shape[:2] == (slots, capacity):
            return
        like = self.decoder.weight
        for tables in (self.keys, self.values):
            for number in range(len(self.decoder.layers)):
                # Zeros, because masked values are multiplied by zero, and zero times a NaN of uninitialized memory is
                # NaN.
                new = like.new_zeros(slots, capacity, self.decoder.kv_heads, self.decoder.head_dim)
                if number == len(tables):
                    tables.append(new)
                    continue
                old = tables[number][:slots, :capacity]
                new[: old.shape[0], : old.shape[1]] = old
                tables[number] = new
        if capacity > len(self.cos):
            cos, sin = self.decoder.rotary(torch.arange(capacity, device=like.device)[None])
            self.cos, self.sin = cos[0], sin[0]

    def swap(self, first: int, second: int) -> None:
        """Exchange two slots."""
        if first == second:
            return
        self.tokens[first], self.tokens[second] = self.tokens[second], self.tokens[first]
        used = max(len(self.tokens[first]), len(self.tokens[second]))
        pair = [first, second]
        for tables in (self.keys, self.values):
            for table in tables:
                table[pair, :used] = table[pair[::-1], :used]

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first positions of a slot to another one."""
        for tables in (self.keys, self.values):
            for table in tables:
                table[target, :count] = table[source, :count]
        self.tokens[target] = self.tokens[source][:count]

    def run(self, first: int, new: Sequence[Sequence[int]]) -> Tensor:
        """Add tokens to slots `first`, `first` + 1, ...; return the logits after the last of each, [slots, vocab]."""
        longest = max(map(len, new))
        device = self.decoder.weight.device
        # Padding on the right repeats the row's last token. The causal mask hides it, and nothing reads it later.
        ids = torch.tensor([[*row, *([row[-1]] * (longest - len(row)))] for row in new], device=device)
        last = None
        if longest > 1 and min(map(len, new)) < longest:
            last = torch.tensor([len(row) - 1 for row in new], device=device)
        self.reserve(self.used, max(len(self.tokens[first + n]) for n in range(len(new))) + longest)
        logits = self.decoder(ids, _Rows(self, first, len(new)), last)
        for number, row in enumerate(new, first):
            self.tokens[number] += row
        return logits


class _Rows:
    """Consecutive slots as the cache of one call of the decoder."""

    def __init__(self, slots: Slots, first: int, count: int) -> None:
        self.slots, self.rows = slots, slice(first, first + count)
        self.starts = [len(tokens) for tokens in slots.tokens[self.rows]]
        self.stop = 0
        self.indices = torch.empty(0)  # indices of the new tokens in a table with slots and positions flattened

    def open(self, decoder: Decoder, tokens: int) -> Window:
        """Return the window of the new positions of each slot."""
        slots, device = self.slots, decoder.weight.device
        self.stop = max(self.starts) + tokens
        starts = torch.tensor(self.starts, device=device)
        positions = starts[:, None] + torch.arange(tokens, device=device)
        rows = torch.arange(self.rows.start, self.rows.stop, device=device)[:, None]
        self.indices = (rows * slots.capacity + positions).flatten()
        cos, sin = (table[positions][:, :, None] for table in (slots.cos, slots.sin))
        mask = None
        if self.stop > tokens and (tokens > 1 or min(self.starts) < max(self.starts)):
            hidden = torch.arange(self.stop, device=device) > positions[:, None, :, None]
            mask = torch.zeros(hidden.shape, dtype=cos.dtype, device=device).masked_fill_(hidden, float("-inf"))
        return Window(cos, sin, mask)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions of a layer, and return all positions of these slots."""
        found = []
        for table, new in ((self.slots.keys[layer], keys), (self.slots.values[layer], values)):
            table.flatten(0, 1).index_copy_(0, self.indices, new.flatten(0, 1))
            found.append(table[self.rows, : self.stop].transpose(1, 2))
        return found[0], found[1]

    def close(self) -> None:
        """Do nothing, because `Slots.run` counts the tokens."""

"""Keys and values of sequences that join and leave a running batch.

Each sequence has a slot: a row of one table, with positions of its own. The slots of running sequences come first, so
that a step reads them without copying. A slot keeps its tokens when its sequence has ended: a later prompt that begins
with the same tokens, such as the next turn of a chat, goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minimind_mcore.inference.decoder import Decoder, Window

ROOM = 128  # positions that the table grows by at least


class Slots:
    """A table of slots.

    Args:
        decoder: of the model.
        budget: positions, of all slots together, that memory is used for.
    """

    def __init__(self, decoder: Decoder, budget: int) -> None:
        self.decoder, self.budget = decoder, budget
        self.used = 0  # slots of running sequences
        self.tokens: list[list[int]] = []  # of each slot: the ids whose keys and values it has
        self.keys: list[Tensor] = []  # of each layer: [slots, room, kv_heads, head_dim]
        self.values: list[Tensor] = []
        self.cos = self.sin = torch.empty(0)

    @property
    def room(self) -> int:
        """Positions of a slot that there is memory for."""
        return self.keys[0].shape[1] if self.keys else 0

    def fits(self, slots: int, room: int) -> bool:
        """Whether so many slots of so many positions are within the budget."""
        return slots * room <= self.budget

    def reserve(self, used: int, room: int) -> None:
        """Have at least `used` slots, of at least `room` positions; idle slots are dropped to stay in the budget."""
        if room > self.room:  # some more than asked for, so that not every step copies the table
            room = max(room, min(self.budget // max(used, 1), -(-room // ROOM) * ROOM + self.room // 2))
        self._resize(max(used, min(len(self.tokens), self.budget // max(room, self.room))), max(room, self.room))

    def shrink(self, used: int, room: int) -> None:
        """Forget idle slots and positions that no running sequence has."""
        self._resize(used, room)

    def _resize(self, slots: int, room: int) -> None:
        del self.tokens[slots:]
        self.tokens += [[] for _ in range(slots - len(self.tokens))]
        if self.keys and self.keys[0].shape[:2] == (slots, room):
            return
        like = self.decoder.weight
        for tables in (self.keys, self.values):
            for number in range(len(self.decoder.layers)):
                # Zeros: what is masked is multiplied by zero, which must not meet a NaN of old memory.
                new = like.new_zeros(slots, room, self.decoder.kv_heads, self.decoder.head_dim)
                if number == len(tables):
                    tables.append(new)
                    continue
                old = tables[number][:slots, :room]
                new[: old.shape[0], : old.shape[1]] = old
                tables[number] = new
        if room > len(self.cos):
            cos, sin = self.decoder.rotary(torch.arange(room, device=like.device)[None])
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
        """Give a slot the first positions of another one."""
        for tables in (self.keys, self.values):
            for table in tables:
                table[target, :count] = table[source, :count]
        self.tokens[target] = self.tokens[source][:count]

    def run(self, first: int, new: Sequence[Sequence[int]]) -> Tensor:
        """Add tokens to slots `first`, `first` + 1, ...; return the logits behind the last of each, [slots, vocab]."""
        longest = max(map(len, new))
        device = self.decoder.weight.device
        # A row's last token pads it at the right, behind what its queries may read; nothing reads it later.
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
    """The cache that one call of the decoder sees: consecutive slots."""

    def __init__(self, slots: Slots, first: int, count: int) -> None:
        self.slots, self.rows = slots, slice(first, first + count)
        self.starts = [len(tokens) for tokens in slots.tokens[self.rows]]
        self.stop = 0
        self.places = torch.empty(0)  # of the new tokens, in a table whose slots and positions are one dimension

    def open(self, decoder: Decoder, tokens: int) -> Window:
        """The new positions of each slot."""
        slots, device = self.slots, decoder.weight.device
        self.stop = max(self.starts) + tokens
        starts = torch.tensor(self.starts, device=device)
        positions = starts[:, None] + torch.arange(tokens, device=device)
        rows = torch.arange(self.rows.start, self.rows.stop, device=device)[:, None]
        self.places = (rows * slots.room + positions).flatten()
        cos, sin = (table[positions][:, :, None] for table in (slots.cos, slots.sin))
        mask = None
        if self.stop > tokens and (tokens > 1 or min(self.starts) < max(self.starts)):
            hidden = torch.arange(self.stop, device=device) > positions[:, None, :, None]
            mask = torch.zeros(hidden.shape, dtype=cos.dtype, device=device).masked_fill_(hidden, float("-inf"))
        return Window(cos, sin, mask)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions of a layer; return all of these slots' positions."""
        found = []
        for table, new in ((self.slots.keys[layer], keys), (self.slots.values[layer], values)):
            table.flatten(0, 1).index_copy_(0, self.places, new.flatten(0, 1))
            found.append(table[self.rows, : self.stop].transpose(1, 2))
        return found[0], found[1]

    def close(self) -> None:
        """`Slots.run` counts the tokens, which it has as numbers."""

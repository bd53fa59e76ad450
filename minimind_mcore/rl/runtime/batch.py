"""The tensors of a step: one row for each response.

    prompt ids | response ids | padding            tokens     [rows, length]
               | 1  1  1  1   | 0  0               mask       [rows, T], aligned with the responses
               | log-probabilities, advantages ... [rows, T]

Whatever belongs to single tokens of a response is [rows, T] and begins with its first token, wherever that stands
in the sequence; padding is on the right, where causal attention hides it. The responses to one prompt are
neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAD = 0  # MiniMind's pad id; nothing reads it, as lengths say where a response ends


@dataclass
class Batch:
    """Prompts, responses, and what is known of them; None where it is not known yet.

    Attributes:
        tokens: [rows, length] int64, prompt then response then padding.
        prompt_lengths: [rows] int64.
        response_lengths: [rows] int64, at least 1.
        finished: [rows] bool: ended by an end token; else the room was used up.
        prompt_ids: [rows] int64, the prompt's number in the data.
        rewards: [rows] float32.
        rollout_logp: [rows, T], of the engine that wrote the responses.
        old_logp: [rows, T], of the policy before this step's updates.
        ref_logp: [rows, T], of the reference model.
        advantages: [rows, T].
        values: [rows, T], of the critic.
        returns: [rows, T], what the critic should have said.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    finished: Tensor
    prompt_ids: Tensor
    rewards: Tensor | None = None
    rollout_logp: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    advantages: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def width(self) -> int:
        """T: tokens of the longest response."""
        return int(self.response_lengths.max())

    @property
    def mask(self) -> Tensor:
        """[rows, T] float32, 1 on the tokens of the responses."""
        steps = torch.arange(self.width, device=self.tokens.device)
        return (steps < self.response_lengths[:, None]).float()

    @property
    def lengths(self) -> Tensor:
        """[rows] tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def places(self) -> Tensor:
        """[rows, T] positions in the sequence of the tokens of the responses; the last one again behind their end."""
        steps = torch.arange(self.width, device=self.tokens.device)
        return torch.minimum(self.prompt_lengths[:, None] + steps, self.lengths[:, None] - 1)

    @property
    def responses(self) -> Tensor:
        """[rows, T] ids of the responses; behind their end whatever."""
        return self.tokens.gather(1, self.places)

    def response_ids(self) -> list[list[int]]:
        """The ids of each response."""
        pairs = zip(self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [row[start:stop] for row, (start, stop) in zip(self.tokens.tolist(), pairs, strict=True)]

    def select(self, rows: Tensor) -> Batch:
        """Some of the rows (numbers, or a mask), without the padding that they do not need."""
        lengths = self.lengths[rows]
        picked = {name: value[rows] for name, value in self._tensors()}
        small = dataclasses.replace(self, **picked)
        return small.cut(int(lengths.max()) if len(lengths) else 0)

    def cut(self, length: int) -> Batch:
        """The same with `length` columns of tokens (padded or cut), and T of the longest response."""
        width = self.width if len(self) else 0
        sizes = {name: length if name == "tokens" else width for name, value in self._tensors() if value.dim() == 2}
        return dataclasses.replace(self, **{name: _resized(getattr(self, name), n) for name, n in sizes.items()})

    def to(self, place: torch.device) -> Batch:
        """The same on a device."""
        return dataclasses.replace(self, **{name: value.to(place) for name, value in self._tensors()})

    def state_dict(self) -> dict[str, Tensor]:
        """What is known, for a file."""
        return dict(self._tensors())

    def _tensors(self) -> list[tuple[str, Tensor]]:
        pairs = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return [(name, value) for name, value in pairs if value is not None]


def _resized(tensor: Tensor, length: int) -> Tensor:
    more = length - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (0, more), value=PAD) if more > 0 else tensor[:, :length]


def make(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    logp: Sequence[Sequence[float]],
    finished: Sequence[bool],
    prompt_ids: Sequence[int],
) -> Batch:
    """A batch from what a rollout engine gave; one element of each argument for each response."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    return Batch(
        tokens=padded(rows, torch.long),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        response_lengths=torch.tensor([len(response) for response in responses]),
        finished=torch.tensor(finished, dtype=torch.bool),
        prompt_ids=torch.tensor(prompt_ids),
        rollout_logp=padded(logp, torch.float32),
    )


def padded(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:
    """[rows, longest], filled up with zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)


def concat(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches, in order."""
    length, width = max(b.tokens.shape[1] for b in batches), max(b.width for b in batches)
    columns: dict[str, Tensor] = {}
    for name, first in batches[0]._tensors():
        size = length if name == "tokens" else width
        parts = [getattr(b, name) for b in batches]
        columns[name] = torch.cat([_resized(part, size) for part in parts] if first.dim() == 2 else parts)
    return Batch(**columns)

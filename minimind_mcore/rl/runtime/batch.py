"""The tensors of a step: one row for each response.

    prompt ids | response ids | padding            tokens     [rows, length]
               | 1  1  0  1   | 0  0               mask       [rows, T], aligned with the responses
               | log-probabilities, advantages ... [rows, T]

Whatever belongs to single tokens of a response is [rows, T] and begins with its first token, wherever that stands
in the sequence; padding is on the right, where causal attention hides it. The responses to one prompt are
neighbours. A response may have tokens that an environment wrote (`trajectory.py`): the mask is 0 there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor

from minimind_mcore.rl.runtime.trajectory import Trajectory

LONG = ("tokens", "routes")  # columns of whole sequences
PAD = 0  # MiniMind's pad id; nothing reads it, as lengths say where a response ends


@dataclass
class Batch:
    """Prompts, responses, and what is known of them; None where it is not known yet.

    Attributes:
        tokens: [rows, length] int64, prompt then response then padding.
        prompt_lengths: [rows] int64.
        response_lengths: [rows] int64, at least 1; the environment's tokens are among them.
        finished: [rows] bool: ended by an end token; else the room was used up.
        prompt_ids: [rows] int64, the prompt's number in the data.
        mask: [rows, T] float32, 1 on the tokens that the policy generated.
        routes: [rows, length, layers, k] uint8, the experts that the engine chose; a response's last token has none of
            its own.
        taught: [rows] float32, 0 for rows that only fill the step: they count in the divisor of the loss and in nothing
            else. None: every row is 1.
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
    mask: Tensor
    routes: Tensor | None = None
    taught: Tensor | None = None
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
    def policy_lengths(self) -> Tensor:
        """[rows] tokens that the policy generated."""
        return self.mask.sum(1).long()

    @property
    def loss_mask(self) -> Tensor:
        """[rows, T] the mask of the tokens that are trained: none of a row that is not taught."""
        return self.mask if self.taught is None else self.mask * self.taught[:, None]

    @property
    def lengths(self) -> Tensor:
        """[rows] tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def response_positions(self) -> Tensor:
        """[rows, T] positions in the sequence of the tokens of the responses; the last one again behind their end."""
        steps = torch.arange(self.width, device=self.tokens.device)
        return torch.minimum(self.prompt_lengths[:, None] + steps, self.lengths[:, None] - 1)

    @property
    def responses(self) -> Tensor:
        """[rows, T] ids of the responses; behind their end whatever."""
        return self.tokens.gather(1, self.response_positions)

    def select(self, rows: Tensor) -> Batch:
        """Some of the rows (numbers, or a mask), without the padding that they do not need."""
        lengths = self.lengths[rows]
        picked = {name: value[rows] for name, value in self._tensors()}
        small = dataclasses.replace(self, **picked)
        return small.cut(int(lengths.max()) if len(lengths) else 0)

    def cut(self, length: int) -> Batch:
        """The same with `length` columns of tokens (padded or cut), and T of the longest response."""
        width = self.width if len(self) else 0
        sizes = {name: length if name in LONG else width for name, value in self._tensors() if value.dim() > 1}
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
    behind = (0, 0) * (tensor.dim() - 2)
    return torch.nn.functional.pad(tensor, (*behind, 0, more), value=PAD) if more > 0 else tensor[:, :length]


def of(trajectories: Sequence[Trajectory]) -> Batch:
    """A batch of trajectories."""
    return make(
        [trajectory.prompt.ids for trajectory in trajectories],
        [trajectory.ids for trajectory in trajectories],
        [trajectory.logp for trajectory in trajectories],
        [trajectory.finished for trajectory in trajectories],
        [trajectory.prompt.index for trajectory in trajectories],
        [trajectory.mask for trajectory in trajectories],
        [trajectory.routes for trajectory in trajectories],
    )


def make(
    prompts: Sequence[ArrayLike],
    responses: Sequence[ArrayLike],
    logp: Sequence[ArrayLike],
    finished: Sequence[bool],
    prompt_ids: Sequence[int],
    masks: Sequence[ArrayLike] | None = None,
    routes: Sequence[NDArray[np.uint8] | None] = (),
) -> Batch:
    """A batch from the ids of prompts and responses; without masks the policy generated every token."""
    asked, written = ([np.asarray(row, np.int64) for row in rows] for rows in (prompts, responses))
    tokens = padded([np.concatenate(pair) for pair in zip(asked, written, strict=True)], np.int64)
    known = [row for row in routes if row is not None]
    if known and len(known) < len(asked):
        raise RuntimeError(f"router replay: {len(known)} of {len(asked)} responses have routes; expected all or none")
    return Batch(
        tokens=tokens,
        prompt_lengths=torch.tensor([len(row) for row in asked]),
        response_lengths=torch.tensor([len(row) for row in written]),
        finished=torch.tensor(finished, dtype=torch.bool),
        prompt_ids=torch.tensor(prompt_ids),
        mask=padded([np.ones(len(row)) for row in written] if masks is None else masks, np.float32),
        routes=_routes(known, tokens.shape[1]) if known else None,
        rollout_logp=padded(logp, np.float32),
    )


def _routes(rows: Sequence[NDArray[np.uint8]], length: int) -> Tensor:
    """Return [rows, length, layers, k]. Tokens that no engine has read go to experts 0 to k - 1.

    These are an environment's tokens at the end, which no loss counts. A token must not go to one expert several times.
    """
    layers, k = rows[0].shape[1:]
    found = np.tile(np.arange(k, dtype=np.uint8), (len(rows), length, layers, 1))
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(found)


def padded(rows: Sequence[ArrayLike], dtype: DTypeLike) -> Tensor:
    """[rows, longest, ...], filled up with zeros on the right."""
    arrays = [np.asarray(row, dtype) for row in rows]
    found = np.zeros((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), dtype)
    for row, values in zip(found, arrays, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(found)


def concat(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches, in order."""
    length, width = max(b.tokens.shape[1] for b in batches), max(b.width for b in batches)
    columns: dict[str, Tensor] = {}
    for name, first in batches[0]._tensors():
        size = length if name in LONG else width
        parts = [getattr(b, name) for b in batches]
        columns[name] = torch.cat([_resized(part, size) for part in parts] if first.dim() > 1 else parts)
    return Batch(**columns)

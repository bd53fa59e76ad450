"""The rules of the weight table: how tensors of transformers or MiniMind become megatron-core's, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind_mcore.errors import UserError

Shape = tuple[int, ...]


def _joined(shapes: Sequence[Shape], axis: int) -> Shape:
    """The shape of tensors that are put one behind the other."""
    first = shapes[0]
    return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`hf` tensors of these `shapes` are the `mcore` tensors. This one: the same tensor, renamed.

    `required`: reading without them is an error; `written`: writing makes them.
    """

    mcore: tuple[str, ...]
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    required: bool = True
    written: bool = True

    @property
    def mcore_shapes(self) -> tuple[Shape, ...]:
        """Of the `mcore` tensors, in order."""
        return self.shapes

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The `mcore` tensors, from those of `hf`, in order."""
        return list(tensors)

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The `hf` tensors, from those of `mcore`, in order."""
        return list(tensors)


@dataclass(frozen=True, kw_only=True)
class QKV(Rule):
    """q, k and v in one matrix: for each key-value head, the query heads it serves, its k, its v."""

    kv_heads: int

    @property
    def mcore_shapes(self) -> tuple[Shape, ...]:
        """All rows in one."""
        return (_joined(self.shapes, 0),)

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Interleave."""
        groups = [t.reshape(self.kv_heads, -1, t.shape[-1]) for t in tensors]
        return [torch.cat(groups, dim=1).flatten(0, 1)]

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Pick apart."""
        groups = tensors[0].reshape(self.kv_heads, -1, tensors[0].shape[-1])
        rows = [shape[0] // self.kv_heads for shape in self.shapes]
        return [part.flatten(0, 1) for part in torch.split(groups, rows, dim=1)]


@dataclass(frozen=True, kw_only=True)
class InterleavedQKV(QKV):
    """Rows 2i and 2i+1 of a head are a rotary pair there; here, as everywhere else, rows i and i + head_dim/2."""

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Put the first of each pair before the second, then as `QKV`."""
        q, k, v = tensors
        return super().to_mcore([self._transposed(q, 2), self._transposed(k, 2), v])

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """As `QKV`, then side by side."""
        q, k, v = super().to_hf(tensors)
        return [self._transposed(q, self._half), self._transposed(k, self._half), v]

    @property
    def _half(self) -> int:
        return self.shapes[1][0] // self.kv_heads // 2

    def _transposed(self, rows: Tensor, columns: int) -> Tensor:
        """Each head's rows as a matrix of so many columns, transposed."""
        heads = rows.shape[0] // (2 * self._half)
        return rows.reshape(heads, -1, columns, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True, kw_only=True)
class Concat(Rule):
    """Several matrices one after the other along `axis`: gate and up; the inputs of several experts."""

    axis: int

    @property
    def mcore_shapes(self) -> tuple[Shape, ...]:
        return (_joined(self.shapes, self.axis),)

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Join."""
        return [torch.cat(tuple(tensors), dim=self.axis)]

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Split."""
        return list(torch.split(tensors[0], [shape[self.axis] for shape in self.shapes], dim=self.axis))


@dataclass(frozen=True, kw_only=True)
class StackExperts(Rule):
    """One tensor of transformers holds the experts along its first axis."""

    @property
    def mcore_shapes(self) -> tuple[Shape, ...]:
        """One an expert."""
        ((experts, *shape),) = self.shapes
        return (tuple(shape),) * experts

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One tensor an expert."""
        return list(tensors[0].unbind(0))

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One tensor for all."""
        return [torch.stack(tuple(tensors))]


@dataclass(frozen=True, kw_only=True)
class Doubled(Rule):
    """transformers multiplies the result by one half: a gate of sigmoid(0).

    Doubling and then halving is exact; halving first loses the last bit of float16's subnormals.
    """

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Halve.

        Raises:
            UserError: a subnormal loses its last bit, so that the way back would not lead to the same weights.
        """
        half = tensors[0] / 2
        if not torch.equal(half * 2, tensors[0]):
            raise UserError(
                f"{self.hf[0]}: halving it in {half.dtype} is not exact, as some values are odd multiples of the "
                "smallest there is; convert with --params-dtype fp32"
            )
        return [half]

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Double."""
        return [tensors[0] * 2]


@dataclass(frozen=True, kw_only=True)
class Zeros(Rule):
    """A parameter that transformers has and MiniMind has not: it must be zero."""

    @property
    def mcore_shapes(self) -> tuple[Shape, ...]:
        return ()

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Nothing, if all are zero."""
        if torch.count_nonzero(tensors[0]):
            raise UserError(f"{self.hf[0]}: found values other than 0, expected zeros: MiniMind has no such parameter")
        return []

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Zeros."""
        return [torch.zeros(shape) for shape in self.shapes]

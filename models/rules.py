"""The rules of the weight table: convert tensors of transformers or MiniMind to megatron-core, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind_mcore.errors import UserError

Shape = tuple[int, ...]


def _joined(shapes: Sequence[Shape], axis: int) -> Shape:
    """Return the shape of tensors concatenated along an axis."""
    first = shapes[0]
    return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The `hf` tensors of these `shapes` correspond to the `mcore` tensors. This base class renames one tensor.

    `required`: reading fails without the tensors. `written`: writing creates them.
    """

    mcore: tuple[str, ...]
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    required: bool = True
    written: bool = True

    @property
    def mcore_shapes(self) -> tuple[Shape, ...]:
        """Return the shapes of the `mcore` tensors, in order."""
        return self.shapes

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Convert the `hf` tensors to the `mcore` tensors, in order."""
        return list(tensors)

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Convert the `mcore` tensors to the `hf` tensors, in order."""
        return list(tensors)


@dataclass(frozen=True, kw_only=True)
class QKV(Rule):
    """q, k and v in one matrix: for each key-value head its query heads, its key and its value."""

    kv_heads: int

    @property
    def mcore_shapes(self) -> tuple[Shape, ...]:
        """Return the shape of the joined matrix."""
        return (_joined(self.shapes, 0),)

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Interleave q, k and v by key-value head."""
        groups = [t.reshape(self.kv_heads, -1, t.shape[-1]) for t in tensors]
        return [torch.cat(groups, dim=1).flatten(0, 1)]

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Separate q, k and v."""
        groups = tensors[0].reshape(self.kv_heads, -1, tensors[0].shape[-1])
        rows = [shape[0] // self.kv_heads for shape in self.shapes]
        return [part.flatten(0, 1) for part in torch.split(groups, rows, dim=1)]


@dataclass(frozen=True, kw_only=True)
class InterleavedQKV(QKV):
    """Rotary pairs are rows 2i and 2i+1 of a head in the legacy form, and rows i and i + head_dim/2 elsewhere."""

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Reorder the rows of rotary pairs, then convert as `QKV`."""
        q, k, v = tensors
        return super().to_mcore([self._transposed(q, 2), self._transposed(k, 2), v])

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Convert as `QKV`, then reorder the rows of rotary pairs."""
        q, k, v = super().to_hf(tensors)
        return [self._transposed(q, self._half), self._transposed(k, self._half), v]

    @property
    def _half(self) -> int:
        return self.shapes[1][0] // self.kv_heads // 2

    def _transposed(self, rows: Tensor, columns: int) -> Tensor:
        """Reshape each head's rows to a matrix with `columns` columns, and transpose it."""
        heads = rows.shape[0] // (2 * self._half)
        return rows.reshape(heads, -1, columns, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True, kw_only=True)
class Concat(Rule):
    """Several matrices concatenated along `axis`: gate and up, or the inputs of several experts."""

    axis: int

    @property
    def mcore_shapes(self) -> tuple[Shape, ...]:
        return (_joined(self.shapes, self.axis),)

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Concatenate the tensors."""
        return [torch.cat(tuple(tensors), dim=self.axis)]

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Split the tensor."""
        return list(torch.split(tensors[0], [shape[self.axis] for shape in self.shapes], dim=self.axis))


@dataclass(frozen=True, kw_only=True)
class StackExperts(Rule):
    """One tensor of transformers has all experts along its first axis."""

    @property
    def mcore_shapes(self) -> tuple[Shape, ...]:
        """Return one shape per expert."""
        ((experts, *shape),) = self.shapes
        return (tuple(shape),) * experts

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor per expert."""
        return list(tensors[0].unbind(0))

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor with all experts."""
        return [torch.stack(tuple(tensors))]


@dataclass(frozen=True, kw_only=True)
class Doubled(Rule):
    """transformers multiplies the result by one half, because its gate is sigmoid(0).

    Doubling and then halving is exact. Halving first loses the last bit of float16's subnormals.
    """

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Halve the tensor.

        Raises:
            UserError: a subnormal would lose its last bit, so that converting back would give other weights.
        """
        half = tensors[0] / 2
        if not torch.equal(half * 2, tensors[0]):
            raise UserError(
                f"{self.hf[0]}: halving it in {half.dtype} is not exact, because some values are odd multiples of the "
                "smallest subnormal; convert with --params-dtype fp32"
            )
        return [half]

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Double the tensor."""
        return [tensors[0] * 2]


@dataclass(frozen=True, kw_only=True)
class Zeros(Rule):
    """A parameter that exists only in transformers and must be zero."""

    @property
    def mcore_shapes(self) -> tuple[Shape, ...]:
        return ()

    def to_mcore(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Check that all values are zero, and return no tensor."""
        if torch.count_nonzero(tensors[0]):
            raise UserError(f"{self.hf[0]}: found values other than 0, expected zeros: MiniMind has no such parameter")
        return []

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return zeros."""
        return [torch.zeros(shape) for shape in self.shapes]

"""What a conversion reads from: a table of lazy tensors, and changes to it that stay lazy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minimind_mcore.checkpoint.assumptions import Assumption
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.tensors import Slot, TensorFile
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig


@dataclass(frozen=True)
class Lazy(Slot):
    """A tensor that is read when asked for."""

    read: Callable[[], Tensor]

    def map(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> Lazy:
        """The same with values changed, and perhaps the shape."""
        return Lazy(self.shape if shape is None else shape, self.dtype, lambda: change(self.read()))


@dataclass(frozen=True)
class Training:
    """What a checkpoint says of the training that it comes from.

    Attributes:
        iteration: of the checkpoint; a converter's says 1, as MindSpeed-LLM's do.
        consumed_samples: that the training had seen.
        tokenizer: its directory, if it is named.
        fingerprint: of that tokenizer.
        lora_alpha: of its adapters, if any.
    """

    iteration: int = 1
    consumed_samples: int = 0
    tokenizer: str | None = None
    fingerprint: str | None = None
    lora_alpha: float | None = None

    def replace(self, **changes: object) -> Training:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model in files.

    Attributes:
        path: what was opened.
        kind: for people: "Hugging Face qwen3", "Megatron torch, TP=2 PP=1 EP=1".
        config: the architecture; its vocabulary is that of the tensors.
        tensors: the whole megatron-core model, in its order.
        files: all tensor files that belong to it.
        checks: what must hold of tensors that are read and that the model has not.
        layout: of a Megatron checkpoint of format `torch`.
        training: what it knows of its training.
        folder: where its config and tokenizer may lie.
        adapters: tensors of LoRA adapters by whole name, not yet part of the weights.
        assumptions: values of the config that the tensors do not determine and that nothing states.
        as_stored: whether the tensors are those of the files, and not cast, merged or resized.
    """

    path: Path
    kind: str
    config: ModelConfig
    tensors: Mapping[str, Lazy]
    files: tuple[TensorFile, ...]
    checks: tuple[Callable[[], object], ...] = ()
    layout: ParallelLayout | None = None
    training: Training = Training()
    folder: Path | None = None
    adapters: Mapping[str, Lazy] = field(default_factory=dict)
    assumptions: tuple[Assumption, ...] = ()
    as_stored: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor, the embedding; it is that of (nearly) all."""
        return next(iter(self.tensors.values())).dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def unread(self) -> list[str]:
        """Tensors of the files of which a byte was not read, or was read twice."""
        return [f"{file.path.name}: {name}" for file in self.files for name in file.unread()]

    def replace(self, **changes: object) -> Source:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def cast(source: Source, dtype: torch.dtype) -> Source:
    """With every tensor of that dtype."""

    def to(tensor: Lazy) -> Lazy:
        return Lazy(tensor.shape, dtype, lambda: tensor.read().to(dtype))

    tensors, adapters = ({n: to(t) for n, t in table.items()} for table in (source.tensors, source.adapters))
    return source.replace(tensors=tensors, adapters=adapters, as_stored=False)


def resize_vocabulary(source: Source, rows: int) -> Source:
    """With so many rows in the embedding and the output layer: zeros are added at the end, or rows left out.

    Raises:
        UserError: `rows` is not a positive number.
    """
    if rows == source.config.vocab_size:
        return source
    if rows < 1:
        raise UserError(f"vocabulary: found {rows} rows, expected 1 or more")

    def resize(tensor: Tensor) -> Tensor:
        padding = tensor.new_zeros(max(0, rows - tensor.shape[0]), *tensor.shape[1:])
        return torch.cat([tensor[:rows], padding]) if len(padding) else tensor[:rows]

    changed = {
        name: tensor.map(resize, (rows, *tensor.shape[1:]))
        for name, tensor in source.tensors.items()
        if name in (weights.EMBEDDING, weights.OUTPUT)
    }
    tensors = {**source.tensors, **changed}
    return source.replace(config=source.config.replace(vocab_size=rows), tensors=tensors, as_stored=False)


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise a `UserError` if a value is NaN or infinite."""
    if tensor.numel() and not all(torch.isfinite(x) for x in torch.aminmax(tensor)):  # NaN goes through both
        raise UserError(f"{name}: NaN or infinity among its values (in {tensor.dtype}): not usable weights")

"""The input of a conversion: a table of lazy tensors, and lazy changes to it."""

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
    """A tensor that is read on demand."""

    read: Callable[[], Tensor]

    def map(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> Lazy:
        """Return a lazy tensor whose values, and possibly shape, are changed."""
        return Lazy(self.shape if shape is None else shape, self.dtype, lambda: change(self.read()))


@dataclass(frozen=True)
class Training:
    """Facts about the training that a checkpoint comes from.

    Attributes:
        iteration: iteration of the checkpoint. 1 for weights without an iteration, as MindSpeed-LLM's converters write.
        consumed_samples: number of samples that the training has read.
        tokenizer: directory of the tokenizer, if stored.
        fingerprint: fingerprint of that tokenizer.
        lora_alpha: alpha of the adapters, if any.
    """

    iteration: int = 1
    consumed_samples: int = 0
    tokenizer: str | None = None
    fingerprint: str | None = None
    lora_alpha: float | None = None

    def replace(self, **changes: object) -> Training:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model in files.

    Attributes:
        path: path that was opened.
        kind: format for messages: "Hugging Face qwen3", "Megatron torch, TP=2 PP=1 EP=1".
        config: the architecture. Its vocab size is the number of rows of the tensors.
        tensors: tensors of the whole megatron-core model, in its order.
        files: all tensor files of the model.
        checks: checks of tensors that are read but are not part of the model.
        layout: layout of a Megatron checkpoint of format `torch`.
        training: facts about the training.
        folder: directory that may contain config and tokenizer.
        adapters: tensors of unmerged LoRA adapters, by their names in the whole model.
        assumptions: values of the config that neither tensors nor flags determine.
        as_stored: the tensors equal those in the files: not cast, merged or resized.
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
        """The dtype of the embedding, which is the first tensor. Single other tensors may have another dtype."""
        return next(iter(self.tensors.values())).dtype

    @property
    def nbytes(self) -> int:
        """The size of the whole model in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def unread(self) -> list[str]:
        """Return the names of tensors with a byte that was not read, or was read twice."""
        return [f"{file.path.name}: {name}" for file in self.files for name in file.unread()]

    def replace(self, **changes: object) -> Source:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def cast(source: Source, dtype: torch.dtype) -> Source:
    """Return the source with every tensor cast to a dtype."""

    def to(tensor: Lazy) -> Lazy:
        return Lazy(tensor.shape, dtype, lambda: tensor.read().to(dtype))

    tensors, adapters = ({n: to(t) for n, t in table.items()} for table in (source.tensors, source.adapters))
    return source.replace(tensors=tensors, adapters=adapters, as_stored=False)


def resize_vocabulary(source: Source, rows: int) -> Source:
    """Return the source with `rows` rows in embedding and output layer: padded with zeros, or cut.

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
    if tensor.numel() and not all(torch.isfinite(x) for x in torch.aminmax(tensor)):  # aminmax propagates NaN
        raise UserError(f"{name}: has NaN or infinite values (in {tensor.dtype}): not usable weights")

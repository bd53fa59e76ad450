"""Megatron checkpoints of format `torch_dist`: megatron-core's distributed format, which loads into any layout.

A tensor in the checkpoint belongs to the whole model, with all layers stacked, in chunks by the ranks that saved it.
Reading maps each chunk from its file. Writing goes through megatron-core, so the whole model must fit in memory.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_mcore.checkpoint import unpickling
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.megatron import model_config, training_of
from minimind_mcore.checkpoint.source import Lazy, Source
from minimind_mcore.checkpoint.tensors import Entry, Shape, TensorFile
from minimind_mcore.checkpoint.torch_zip import StoredTensor, read_archive
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import patches

_EXPERT = re.compile(r"^decoder\.layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.(.*)$")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")


def save(state: dict[str, Any], directory: Path, **options: Any) -> None:
    """Write a checkpoint with megatron-core. The options are passed to its `save`. Collective."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    patches.report_in_this_process()
    try:
        dist_checkpointing.save(state, str(directory), **options)
    except CheckpointException as error:  # derives from BaseException, not from Exception
        raise RuntimeError(str(error)) from error


def stacked(name: str) -> tuple[str, tuple[int, ...]]:
    """Return the stacked tensor of the checkpoint that holds a tensor of the model, and its index in the first axes.

    `decoder.layers.3.mlp.linear_fc2.weight` is number 3 of `decoder.layers.mlp.linear_fc2.weight`. Experts are
    stacked by layer, then by number (megatron-core 0.16.1, SequentialMLP.sharded_state_dict).
    """
    if match := _EXPERT.match(name):
        return f"decoder.layers.mlp.experts.experts.{match[3]}", (int(match[1]), int(match[2]))
    if match := _LAYER.match(name):
        return f"decoder.layers.{match[2]}", (int(match[1]),)
    return name, ()


@dataclass(frozen=True)
class Chunk:
    """A part of a stacked tensor: its position in the tensor, and its name and file."""

    offsets: Shape
    sizes: Shape
    file: TensorFile
    name: str


def open_megatron_dist(directory: Path, config: ModelConfig | None = None) -> Source:
    """Open the checkpoint of one iteration.

    Args:
        directory: directory with `.metadata`.
        config: the architecture, for values that the checkpoint's arguments lack.

    Raises:
        UserError: a file is missing or damaged, or the tensors do not match the model.
    """
    sizes, chunks, files = _chunks(directory)
    common = read_archive(directory / "common.pt").content
    shapes = {}
    for key, size in sizes.items():
        if ".experts.experts." in key:
            key, size = key.replace("decoder.layers.", "decoder.layers.0."), size[2:]
            key = key.replace(".experts.experts.", ".experts.local_experts.0.")
        elif key.startswith("decoder.layers."):
            key, size = key.replace("decoder.layers.", "decoder.layers.0."), size[1:]
        shapes[key] = size
    args = common["args"]
    noop = ParallelLayout.from_args(args).noop_layers
    model = model_config(directory, args, ParallelLayout(noop_layers=noop), shapes, config)
    whole = weights.mcore_shapes(model)
    known = {stacked(name)[0] for name in whole}
    weights.account(sizes, known, known)
    return Source(
        path=directory,
        kind="Megatron torch_dist",
        config=model,
        tensors={name: _whole(directory, name, shape, chunks) for name, shape in whole.items()},
        files=files,
        training=training_of(args, common),
    )


def _chunks(directory: Path) -> tuple[dict[str, Shape], dict[str, list[Chunk]], tuple[TensorFile, ...]]:
    """Return the sizes of the stacked tensors, their chunks, and the files."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    if not (directory / ".metadata").is_file():
        raise UserError(f"{directory}: .metadata is missing: an unfinished or damaged copy")
    metadata = unpickling.load_pickle(directory / ".metadata")
    places: dict[str, list[tuple[str, Shape, Shape, str]]] = defaultdict(list)
    entries: dict[str, dict[str, Entry]] = defaultdict(dict)
    sizes: dict[str, Shape] = {}
    for key, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata) or key.startswith("optimizer"):
            continue
        sizes[key] = tuple(tensor.size)
        for chunk in tensor.chunks:
            info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            name = f"{key}@{','.join(map(str, chunk.offsets))}"
            entries[info.relative_path][name] = _entry(directory / info.relative_path, info.offset, info.length)
            places[key].append((info.relative_path, tuple(chunk.offsets), tuple(chunk.sizes), name))
    files = {path: TensorFile(directory / path, found) for path, found in entries.items()}
    chunks = {k: [Chunk(o, s, files[path], n) for path, o, s, n in found] for k, found in places.items()}
    return sizes, chunks, tuple(files.values())


def _entry(path: Path, offset: int, length: int) -> Entry:
    archive = read_archive(path, offset, length)
    if not isinstance(archive.content, StoredTensor):
        raise UserError(f"{path}: at {offset} found no tensor: damaged")
    return archive.entry(archive.content, f"the tensor at {offset}")


def _whole(directory: Path, name: str, shape: Shape, chunks: Mapping[str, list[Chunk]]) -> Lazy:
    key, place = stacked(name)
    axes = len(place)
    mine = [c for c in chunks[key] if all(o <= p < o + s for p, o, s in zip(place, c.offsets, c.sizes, strict=False))]
    covered = sum(torch.Size(chunk.sizes[axes:]).numel() for chunk in mine)
    if covered != torch.Size(shape).numel():
        raise UserError(
            f"{directory}: the chunks of {name} do not make a tensor of {shape}: not saved by megatron-core"
        )

    def part(chunk: Chunk) -> Tensor:
        # Grouped experts share a chunk: [1, experts, ...] (megatron-core 0.12.1, GroupedMLP.sharded_state_dict).
        number = 0
        for p, o, s in zip(place, chunk.offsets, chunk.sizes, strict=False):
            number = number * s + p - o
        return chunk.file.read(chunk.name, number, math.prod(chunk.sizes[:axes])).view(chunk.sizes[axes:])

    def read() -> Tensor:
        if len(mine) == 1:
            return part(mine[0])
        tensor = torch.empty(shape, dtype=mine[0].file.entries[mine[0].name].dtype)
        for chunk in mine:
            where = tuple(slice(o, o + s) for o, s in zip(chunk.offsets[axes:], chunk.sizes[axes:], strict=True))
            tensor[where] = part(chunk)
        return tensor

    return Lazy(shape, mine[0].file.entries[mine[0].name].dtype, read)

"""Megatron checkpoints of format `torch_dist`: megatron-core's, which load into any layout.

A tensor there is the whole model's, those of all layers stacked, in chunks by the ranks that saved it. Reading
takes each chunk from its place; writing goes through megatron-core, so that the whole model is in memory.
"""

from __future__ import annotations

import contextlib
import queue
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_mcore import unpickling
from minimind_mcore.converters.files import Entry, Shape, TensorFile
from minimind_mcore.converters.megatron import TRACKER, checkpoint_args, training_of
from minimind_mcore.converters.megatron_config import model_config
from minimind_mcore.converters.sharding import Sharding
from minimind_mcore.converters.source import Lazy, Source
from minimind_mcore.converters.target import Target
from minimind_mcore.converters.torch_zip import StoredTensor, read_archive
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.storage import FileEntry, atomic_write_text, file_entry, write_manifest

_EXPERT = re.compile(r"^decoder\.layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.(.*)$")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")


def stacked(name: str) -> tuple[str, tuple[int, ...]]:
    """The tensor of a checkpoint that holds one of the whole model, and its place along the first axes.

    `decoder.layers.3.mlp.linear_fc2.weight` is number 3 of `decoder.layers.mlp.linear_fc2.weight`; experts are
    stacked by layer, then by number (megatron-core 0.16.1, SequentialMLP.sharded_state_dict).
    """
    if match := _EXPERT.match(name):
        return f"decoder.layers.mlp.experts.experts.{match[3]}", (int(match[1]), int(match[2]))
    if match := _LAYER.match(name):
        return f"decoder.layers.{match[2]}", (int(match[1]),)
    return name, ()


# ---------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Chunk:
    """A part of a stacked tensor: where it lies in it, and under which name in which file."""

    offsets: Shape
    sizes: Shape
    file: TensorFile
    name: str


def open_megatron_dist(directory: Path, config: ModelConfig | None = None) -> Source:
    """Open the checkpoint of one iteration.

    Args:
        directory: with `.metadata` in it.
        config: the architecture, for what the checkpoint's arguments do not say.

    Raises:
        UserError: a file is missing or damaged, or its tensors are not those of the model.
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
    noop = Sharding.from_args(args).noop_layers
    model = model_config(directory, args, Sharding(noop_layers=noop), shapes, config)
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
    """Sizes of the stacked tensors, their chunks, and the files with these."""
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
    if covered != torch.Size(shape).numel() or any(set(chunk.sizes[:axes]) - {1} for chunk in mine):
        raise UserError(
            f"{directory}: the chunks of {name} do not make a tensor of {shape}: not saved by megatron-core"
        )

    def read() -> Tensor:
        if len(mine) == 1:
            return mine[0].file.read(mine[0].name).view(shape)
        tensor = torch.empty(shape, dtype=mine[0].file.entries[mine[0].name].dtype)
        for chunk in mine:
            where = tuple(slice(o, o + s) for o, s in zip(chunk.offsets[axes:], chunk.sizes[axes:], strict=True))
            tensor[where] = chunk.file.read(chunk.name).view(chunk.sizes[axes:])
        return tensor

    return Lazy(shape, mine[0].file.entries[mine[0].name].dtype, read)


# ---------------------------------------------------------------------------------------------------- writing


class MegatronDistTarget(Target):
    """A checkpoint of format `torch_dist`; megatron-core writes it, in one file, when all tensors are there.

    Args:
        source: what is converted.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self._tensors: dict[str, Tensor] = {}
        self._root = Path()

    @property
    def kind(self) -> str:
        """See `Target`."""
        return "Megatron torch_dist"

    @property
    def nbytes(self) -> int:
        """See `Target`."""
        return self.source.nbytes

    def create(self, root: Path) -> None:
        """See `Target`."""
        self._root = root

    def write(self, name: str, whole: Tensor) -> None:
        """See `Target`."""
        self._tensors[name] = whole

    def unwritten(self) -> list[str]:
        """See `Target`."""
        return [name for name in self.source.tensors if name not in self._tensors]

    @property
    def _directory(self) -> Path:
        return self._root / f"iter_{self.source.training.iteration:07d}"

    def finish(self) -> None:
        """See `Target`."""
        self._directory.mkdir(parents=True)
        state: dict[str, Any] = {
            "args": checkpoint_args(self.source, Sharding()),
            "checkpoint_version": 3.0,
            "iteration": self.source.training.iteration,
            "num_floating_point_operations_so_far": 0,
        }
        with single_process():
            _save(self._directory, state | {"model": self._sharded()})
        self._tensors.clear()

    def record(self, manifest: Mapping[str, FileEntry], about: Mapping[str, object]) -> None:
        """See `Target`."""
        entries = {p.name: file_entry(p) for p in sorted(self._directory.iterdir())}
        write_manifest(self._directory, entries, **about)
        atomic_write_text(self._root / TRACKER, str(self.source.training.iteration))

    def _sharded(self) -> dict[str, Any]:
        """The tensors as megatron-core takes them, and the empty states that its linear layers have."""
        from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

        config = self.source.config
        lengths = (config.num_layers, config.moe.num_experts if config.moe else 1)
        sharded: dict[str, Any] = {}
        for name, tensor in self._tensors.items():
            key, place = stacked(name)
            offsets = [(axis, number, lengths[axis]) for axis, number in enumerate(place)]
            sharded[name] = ShardedTensor.from_rank_offsets(key, tensor, *offsets, prepend_axis_num=len(place))
            module = name.split(".")[-2]
            if module.startswith("linear_") or module == "output_layer":
                state = key.removesuffix("weight") + "_extra_state"
                shape = lengths[: len(place)] or (1,)
                sharded[f"{name} state"] = ShardedObject(state, None, shape, place or (0,))
        return sharded


def _save(directory: Path, state: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from torch.distributed.checkpoint.api import CheckpointException

    # Its writers report over a queue of another process; this save waits for them here (see checkpoint_dist).
    filesystem_async._results_queue = queue.Queue()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    try:
        dist_checkpointing.save(state, str(directory), strategy)
    except CheckpointException as error:  # no Exception, but a BaseException
        raise RuntimeError(str(error)) from error


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """megatron-core's parallel state, of this process alone."""
    from minimind_mcore import device

    device.setup()
    import torch.distributed as dist
    from megatron.core import parallel_state

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

"""Write Megatron checkpoints of format `torch_dist`, through megatron-core; `checkpoint/megatron_dist.py` reads them.

The whole model is in memory.
"""

from __future__ import annotations

import contextlib
import queue
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minimind_mcore.checkpoint.files import TRACKER, directory_of
from minimind_mcore.checkpoint.layout import Sharding
from minimind_mcore.checkpoint.megatron_dist import stacked
from minimind_mcore.checkpoint.source import Source
from minimind_mcore.converters.megatron import checkpoint_args
from minimind_mcore.converters.target import Target
from minimind_mcore.storage import FileEntry, atomic_write_text, file_entry, write_manifest


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
        return directory_of(self._root, self.source.training.iteration)

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
    from minimind_mcore.platform import device

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

"""Write Megatron checkpoints of formats `torch` and `torch_dist`.

`checkpoint/megatron.py` and `checkpoint/megatron_dist.py` read them. megatron-core itself writes format `torch_dist`,
from the whole model in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_mcore import arguments
from minimind_mcore.checkpoint import megatron_dist
from minimind_mcore.checkpoint.files import NAME, directory_of
from minimind_mcore.checkpoint.layout import FilePart, ParallelLayout
from minimind_mcore.checkpoint.source import Source
from minimind_mcore.checkpoint.tensors import Slot
from minimind_mcore.checkpoint.torch_zip import create_torch
from minimind_mcore.checkpoint.tracker import TRACKER
from minimind_mcore.converters.convert import Target
from minimind_mcore.storage import FileEntry, atomic_write_text, file_entry, write_manifest


class MegatronTarget(Target):
    """A checkpoint of format `torch`.

    Args:
        source: source of the conversion.
        layout: parallel layout of the checkpoint.

    Raises:
        UserError: the layout is impossible for the model.
    """

    def __init__(self, source: Source, layout: ParallelLayout) -> None:
        layout.check(source.config)
        self.layout, self.iteration = layout, source.training.iteration
        self._parts = layout.parts(source.config)
        # Replicated tensors count once per rank.
        self._slots: dict[str, dict[str, dict[str, Slot]]] = defaultdict(lambda: defaultdict(dict))
        for name, tensor in source.tensors.items():
            for part in self._parts[name]:
                shape = _joined_shape(part, part.shape(name, tensor.shape, layout.tp))
                self._slots[part.folder][part.chunk][part.name] = Slot(shape, tensor.dtype)
        chunks = (chunk for folder in self._slots.values() for chunk in folder.values())
        nbytes = sum(slot.nbytes for chunk in chunks for slot in chunk.values())
        super().__init__(source, f"Megatron torch, {layout}", nbytes)

    def create(self) -> None:
        args = checkpoint_args(self.source, self.layout)
        content = {"args": args, "checkpoint_version": 3.0, "iteration": self.iteration}
        for folder in self.layout.folders():
            path = directory_of(self.root, self.iteration) / folder / NAME
            path.parent.mkdir(parents=True)
            chunks = {key: self._slots[folder][key] for key in self.layout.chunk_keys(self.source.config)}
            self.writers.append(create_torch(path, content, chunks))

    def write(self, name: str, whole: Tensor) -> None:
        writers = {writer.path.parent.name: writer for writer in self.writers}
        for part in self._parts[name]:
            tensor = part.cut(name, whole, self.layout.tp)
            writers[part.folder].write(f"{part.chunk}/{part.name}", tensor, part.block, part.blocks)

    def record(self, manifest: Mapping[str, FileEntry], about: Mapping[str, object]) -> None:
        """Write the manifest, then the tracker file, which makes the checkpoint complete."""
        directory = directory_of(self.root, self.iteration)
        entries = {str(Path(name).relative_to(directory.name)): entry for name, entry in manifest.items()}
        write_manifest(directory, entries, **about)
        atomic_write_text(self.root / TRACKER, str(self.iteration))


def _joined_shape(part: FilePart, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the stored tensor: grouped experts are concatenated along their width."""
    if part.blocks == 1 and not part.grouped:
        return shape
    first, second = shape
    return (first, second * part.blocks) if part.name.endswith("weight1") else (first * part.blocks, second)


def checkpoint_args(source: Source, layout: ParallelLayout) -> argparse.Namespace:
    """Return the arguments to store in the checkpoint: the training flags of this model and layout."""
    precision = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}.get(source.dtype, [])
    args = arguments.parse([*source.config.megatron_flags(), *layout.flags(), *precision])
    per, layers = layout.layers_per_virtual_stage, layout.megatron_layers(source.config)
    args.num_layers = layers
    args.moe_grouped_gemm = layout.grouped_experts
    args.noop_layers = ",".join(map(str, layout.noop_layers)) or None
    args.num_layer_list = ",".join(map(str, layout.layers_per_stage or ())) or None
    args.virtual_pipeline_model_parallel_size = layers // layout.pp // per if per else None
    args.expert_tensor_parallel_size = layout.tp
    args.params_dtype = source.dtype
    args.consumed_train_samples = source.training.consumed_samples
    args.skipped_train_samples = 0
    if source.config.inference_rope_scaling:
        args.inference_rope_scaling = True  # this kit's own argument: Megatron has no such flag
    args.tokenizer_name_or_path = source.training.tokenizer
    if source.training.fingerprint:
        args.tokenizer_fingerprint = source.training.fingerprint
    return args


class MegatronDistTarget(Target):
    """A checkpoint of format `torch_dist`. megatron-core writes it to one file after the last tensor.

    Args:
        source: source of the conversion.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source, "Megatron torch_dist", source.nbytes)
        self._tensors: dict[str, Tensor] = {}

    def create(self) -> None:
        self._directory = directory_of(self.root, self.source.training.iteration)
        self._directory.mkdir(parents=True)

    def write(self, name: str, whole: Tensor) -> None:
        self._tensors[name] = whole

    def unwritten(self) -> list[str]:
        return [name for name in self.source.tensors if name not in self._tensors]

    def finish(self) -> None:
        state: dict[str, Any] = {
            "args": checkpoint_args(self.source, ParallelLayout()),
            "checkpoint_version": 3.0,
            "iteration": self.source.training.iteration,
            "num_floating_point_operations_so_far": 0,
        }
        with single_process():  # sets up the device before megatron-core is imported
            from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

            strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
            megatron_dist.save(state | {"model": self._sharded()}, self._directory, sharded_strategy=strategy)
        self._tensors.clear()

    def record(self, manifest: Mapping[str, FileEntry], about: Mapping[str, object]) -> None:
        entries = {p.name: file_entry(p) for p in sorted(self._directory.iterdir())}
        write_manifest(self._directory, entries, **about)
        atomic_write_text(self.root / TRACKER, str(self.source.training.iteration))

    def _sharded(self) -> dict[str, Any]:
        """Return the tensors in megatron-core's form, with the empty extra states of its linear layers."""
        from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

        config = self.source.config
        lengths = (config.num_layers, config.moe.num_experts if config.moe else 1)
        sharded: dict[str, Any] = {}
        for name, tensor in self._tensors.items():
            key, place = megatron_dist.stacked(name)
            offsets = [(axis, number, lengths[axis]) for axis, number in enumerate(place)]
            sharded[name] = ShardedTensor.from_rank_offsets(key, tensor, *offsets, prepend_axis_num=len(place))
            module = name.split(".")[-2]
            if module.startswith("linear_") or module == "output_layer":
                state = key.removesuffix("weight") + "_extra_state"
                shape = lengths[: len(place)] or (1,)
                sharded[f"{name} state"] = ShardedObject(state, None, shape, place or (0,))
        return sharded


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Initialize megatron-core's parallel state for this process alone."""
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

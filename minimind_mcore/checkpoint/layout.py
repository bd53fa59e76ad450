"""Which file of a Megatron checkpoint holds which part of which tensor.

    layout = ParallelLayout(tp=2, pp=2)
    layout.parts(config)["decoder.layers.5.mlp.linear_fc2.weight"]
    [Part(folder='mp_rank_00_001', chunk='model', name='decoder.layers.1.mlp.linear_fc2.weight', rank=0, ...), ...]

Reading and writing use the same table. Sources: Megatron-LM core_v0.12.1 (megatron/training/checkpointing.py), and for
`--noop-layers`, `--num-layer-list` and grouped experts MindSpeed-LLM 26.1.0 (mindspeed_llm/tasks/checkpoint).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from minimind_mcore.errors import UserError, require
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig, format_flags
from minimind_mcore.models.rules import Shape

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.linear_(fc[12])\.weight$")
_FIRST, _LAST = (weights.EMBEDDING,), ("decoder.final_layernorm.weight", weights.OUTPUT)


@dataclass(frozen=True)
class FilePart:
    """The part of one whole tensor that one file holds.

    Attributes:
        folder: folder of the file, such as `mp_rank_00_001`.
        chunk: state dict in the file: `model`, or `model0`, `model1`, ... with virtual stages.
        name: name of the tensor in that state dict.
        rank: tensor-parallel rank of the part. Ignored for tensors that tensor parallelism does not split.
        block: number of the equal block within the stored tensor: grouped experts share one, each transposed.
        blocks: number of blocks of the stored tensor, 1 for most tensors.
    """

    folder: str
    chunk: str
    name: str
    rank: int
    block: int = 0
    blocks: int = 1
    grouped: bool = False

    def cut(self, name: str, whole: Tensor, tp: int) -> Tensor:
        """Cut this part out of the whole tensor, in the form that the file stores."""
        part = weights.shard(name, whole, self.rank, tp)
        return part.t() if self.grouped else part

    def shape(self, name: str, whole: Shape, tp: int) -> Shape:
        """Return the shape of the result of `cut`."""
        shape = weights.shard_shape(name, whole, tp)
        return shape[::-1] if self.grouped else shape


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How ranks shard a model: the layout of a checkpoint, and with a world size the layout of a run.

    Attributes:
        tp, pp, ep: ranks of tensor, pipeline and expert parallelism. Experts are also split by `tp`.
        layers_per_virtual_stage: layers of a virtual stage of an interleaved pipeline.
        layers_per_stage: layers of each stage, if they differ (`--num-layer-list`).
        noop_layers: positions in the pipeline without a layer (`--noop-layers`), counted from 0.
        grouped_experts: the experts of a layer are two tensors (`--moe-grouped-gemm`).
        world_size: number of processes of a run. 0 for a checkpoint, which fits any number of data-parallel ranks.
        vpp: virtual stages per pipeline rank of a run. None without an interleaved pipeline.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    layers_per_virtual_stage: int | None = None
    layers_per_stage: tuple[int, ...] | None = None
    noop_layers: tuple[int, ...] = ()
    grouped_experts: bool = False
    world_size: int = field(default=0, compare=False)
    vpp: int | None = field(default=None, compare=False)

    @property
    def dp(self) -> int:
        """Number of data-parallel ranks of a run."""
        return self.world_size // (self.tp * self.pp)

    def __str__(self) -> str:
        if self.world_size:
            vpp = f" VPP={self.vpp}" if self.vpp else ""
            sizes = f"TP={self.tp} PP={self.pp}{vpp} CP=1 EP={self.ep} DP={self.dp}"
            return f"{sizes} on {self.world_size} processes"
        words = [f"TP={self.tp} PP={self.pp} EP={self.ep}"]
        if self.layers_per_virtual_stage:
            words.append(f"{self.layers_per_virtual_stage} layers per virtual stage")
        if self.layers_per_stage:
            words.append(f"layers {','.join(map(str, self.layers_per_stage))}")
        if self.noop_layers:
            words.append(f"noop layers {','.join(map(str, self.noop_layers))}")
        return ", ".join([*words, *(["grouped experts"] if self.grouped_experts else [])])

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ParallelLayout:
        """Return the layout of the arguments in a checkpoint, of training or of a converter."""

        def numbers(name: str) -> tuple[int, ...]:
            value = getattr(args, name, None) or ()
            return tuple(sorted(value)) if isinstance(value, set) else parse_numbers(name, value)

        return cls(
            tp=getattr(args, "tensor_model_parallel_size", 1),
            pp=getattr(args, "pipeline_model_parallel_size", 1),
            ep=getattr(args, "expert_model_parallel_size", None) or 1,
            layers_per_virtual_stage=getattr(args, "num_layers_per_virtual_pipeline_stage", None),
            layers_per_stage=numbers("num_layer_list") or None,
            noop_layers=numbers("noop_layers"),
            grouped_experts=bool(getattr(args, "moe_grouped_gemm", False) and getattr(args, "num_experts", None)),
        )

    def flags(self) -> list[str]:
        """Return the training flags for such a checkpoint, without flags that the native engine lacks."""
        return format_flags(
            {
                "--tensor-model-parallel-size": self.tp,
                "--pipeline-model-parallel-size": self.pp,
                "--expert-model-parallel-size": self.ep,
                **({"--num-layers-per-virtual-pipeline-stage": n} if (n := self.layers_per_virtual_stage) else {}),
            }
        )

    # Ranks

    def folders(self) -> list[str]:
        """Return the directories of all ranks."""
        return [self.folder(t, p, e) for p in range(self.pp) for e in range(self.ep) for t in range(self.tp)]

    def folder(self, tp: int, pp: int, ep: int) -> str:
        """Return `mp_rank_TT`, then `_PPP` with pipeline parallelism, then `_EEE` with expert parallelism."""
        return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self.pp > 1 else "") + (f"_{ep:03d}" if self.ep > 1 else "")

    # Layers

    def megatron_layers(self, config: ModelConfig) -> int:
        """Return the number of layers in Megatron's count, which includes noop layers."""
        return config.num_layers + len(self.noop_layers)

    def stages(self, config: ModelConfig) -> list[list[list[tuple[int, int]]]]:
        """Return by stage and chunk: (number in the chunk, layer) of each layer."""
        layers = self.megatron_layers(config)
        layer_of = dict(zip((p for p in range(layers) if p not in self.noop_layers), range(layers), strict=False))

        def chunk(start: int, count: int) -> list[tuple[int, int]]:
            return [(p - start, layer_of[p]) for p in range(start, start + count) if p in layer_of]

        if self.layers_per_stage:
            starts = [sum(self.layers_per_stage[:stage]) for stage in range(self.pp)]
            return [[chunk(start, count)] for start, count in zip(starts, self.layers_per_stage, strict=True)]
        per = self.layers_per_virtual_stage or layers // self.pp
        chunks = layers // self.pp // per
        return [[chunk((c * self.pp + stage) * per, per) for c in range(chunks)] for stage in range(self.pp)]

    def chunk_keys(self, config: ModelConfig) -> list[str]:
        """Return the keys of a rank's state dicts."""
        count = len(self.stages(config)[0])
        return ["model"] if count == 1 else [f"model{i}" for i in range(count)]

    # Parts

    def parts(self, config: ModelConfig) -> dict[str, list[FilePart]]:
        """Return all parts of every tensor of the whole model. A tied output layer is listed as the embedding."""
        table: dict[str, list[FilePart]] = {name: [] for name in weights.mcore_shapes(config)}
        keys = self.chunk_keys(config)
        for stage, chunks in enumerate(self.stages(config)):
            for i, layers in enumerate(chunks):
                first, last = stage == i == 0, stage == self.pp - 1 and i == len(chunks) - 1
                local = {layer: number for number, layer in layers}
                for whole in table:
                    for name in self._names(config, whole, local, first, last):
                        table[whole] += self._everywhere(config, whole, stage, keys[i], name)
        return table

    def _names(self, config: ModelConfig, whole: str, local: Mapping[int, int], first: bool, last: bool) -> list[str]:
        """Return the names of a tensor in a chunk with these layers (`local` maps layers to numbers in the chunk)."""
        if match := _LAYER.match(whole):
            number = local.get(int(match[1]))
            return [] if number is None else [f"decoder.layers.{number}.{match[2]}"]
        names = [whole] if (first and whole in _FIRST) or (last and whole in _LAST) else []
        if whole == weights.EMBEDDING and config.tie_embeddings and last and not first:
            names.append(weights.OUTPUT)
        return names

    def _everywhere(self, config: ModelConfig, whole: str, stage: int, chunk: str, name: str) -> list[FilePart]:
        """Return the parts of a tensor of one chunk, on all tensor and expert ranks."""
        layer = _LAYER.match(name)
        expert = _EXPERT.match(layer[2]) if layer else None
        if not (layer and expert and config.moe):
            return [FilePart(self.folder(t, stage, e), chunk, name, t) for e in range(self.ep) for t in range(self.tp)]
        count = config.moe.num_experts // self.ep
        rank, number = divmod(int(expert[1]), count)
        prefix = f"decoder.layers.{layer[1]}.mlp.experts."
        own = prefix + f"local_experts.{number}.linear_{expert[2]}.weight"
        joined = prefix + ("weight1" if expert[2] == "fc1" else "weight2")
        folders = [self.folder(t, stage, rank) for t in range(self.tp)]
        if self.grouped_experts:
            return [FilePart(f, chunk, joined, t, number, count, True) for t, f in enumerate(folders)]
        return [FilePart(f, chunk, own, t) for t, f in enumerate(folders)]

    # Checks

    def check(self, config: ModelConfig) -> None:
        """Refuse a layout that is impossible for this model.

        Raises:
            UserError: names the flag, the value found, and a value that fits.
        """
        for name, size in (("tensor", self.tp), ("pipeline", self.pp), ("expert", self.ep)):
            require(size >= 1, f"--target-{name}-parallel-size: found {size}, expected 1 or more")
        self._check_tensor_parallel(config)
        self._check_pipeline(config)
        experts = config.moe.num_experts if config.moe else 1
        require(
            experts % self.ep == 0,
            f"--target-expert-parallel-size {self.ep} does not divide the {experts} experts of a layer"
            if config.moe
            else f"--target-expert-parallel-size {self.ep}: this model has no experts; expected 1",
        )
        require(bool(config.moe) or not self.grouped_experts, "--moe-grouped-gemm: this model has no experts")

    def _check_tensor_parallel(self, config: ModelConfig) -> None:
        flag = f"--target-tensor-parallel-size {self.tp} does not divide"
        widths = {"MLP": config.ffn_hidden_size} if config.moe is None else {"experts": config.moe.ffn_hidden_size}
        if config.moe and config.moe.shared_ffn_hidden_size:
            widths["shared expert"] = config.moe.shared_ffn_hidden_size
        require(
            config.num_kv_heads % self.tp == 0,
            f"{flag} the {config.num_kv_heads} key-value heads; expected a divisor of {config.num_kv_heads}",
        )
        for name, width in widths.items():
            require(width % self.tp == 0, f"{flag} the width {width} of the {name}")
        require(
            config.vocab_size % self.tp == 0,
            f"{flag} the vocabulary of {config.vocab_size}; pad it with --padded-vocab-size "
            f"{-(-config.vocab_size // self.tp) * self.tp}",
        )

    def _check_pipeline(self, config: ModelConfig) -> None:
        layers, stages, per = self.megatron_layers(config), self.layers_per_stage, self.layers_per_virtual_stage
        counted = f"{layers} layers" + (f" ({len(self.noop_layers)} of them noop)" if self.noop_layers else "")
        wrong = [p for p in self.noop_layers if not 0 <= p < layers]
        require(not wrong, f"--noop-layers {wrong}: expected numbers from 0 to {layers - 1}")
        require(len(set(self.noop_layers)) == len(self.noop_layers), "--noop-layers names a layer twice")
        if stages:
            require(per is None, "--num-layer-list and --num-layers-per-virtual-pipeline-stage exclude each other")
            require(not self.noop_layers, "--num-layer-list and --noop-layers exclude each other")
            found = f"--num-layer-list {','.join(map(str, stages))}:"
            require(len(stages) == self.pp, f"{found} {len(stages)} stages, expected {self.pp}")
            require(
                sum(stages) == layers and min(stages) > 0, f"{found} expected {self.pp} numbers that add to {layers}"
            )
            return
        require(
            layers % self.pp == 0,
            f"--target-pipeline-parallel-size {self.pp} does not divide {counted}; choose a divisor, or give "
            "--num-layer-list or --noop-layers",
        )
        if per is not None:
            require(self.pp > 1, "--num-layers-per-virtual-pipeline-stage needs a pipeline of 2 stages or more")
            require(
                0 < per < layers // self.pp and layers // self.pp % per == 0,
                f"--num-layers-per-virtual-pipeline-stage {per} does not divide the {layers // self.pp} layers of a "
                f"stage into two parts or more ({counted}, PP={self.pp})",
            )


def parse_numbers(name: str, value: Any) -> tuple[int, ...]:
    """Parse `"1,2,3"`.

    Raises:
        UserError: the text has another form.
    """
    try:
        return tuple(int(x) for x in (value.split(",") if isinstance(value, str) else value) if str(x).strip())
    except ValueError:
        raise UserError(f"--{name.replace('_', '-')} {value}: expected numbers separated by commas") from None

"""Figures of parallel layouts: contents and traffic of ranks, pipeline timelines, checkpoints, weight conversion."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.errors import require
from minimind_mcore.figures.study import Study
from minimind_mcore.forecast import layouts, machines, memory, speed
from minimind_mcore.forecast.memory import Workload, cache_bytes_per_token
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import get_preset

WORLD = 8
MODELS = ("minimind3", "minimind3_moe")
MICRO_BATCHES = (4, 8)
EXPERTS = "decoder.layers.0.mlp.experts.local_experts"
# Tensors of megatron-core, each converted by another rule of the weight table.
JOURNEYS = {
    "qkv": "decoder.layers.0.self_attention.linear_qkv.weight",
    "fc1": "decoder.layers.0.mlp.linear_fc1.weight",
    "fc2": "decoder.layers.0.mlp.linear_fc2.weight",
    "embedding": weights.EMBEDDING,
}


def parallel(study: Study) -> dict[str, Any]:
    """Every valid layout of two models on eight devices, and the timelines of their pipelines."""
    machine = machines.machine("H100")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in MODELS}
    for name, tp, pp, vpp, ep in itertools.product(MODELS, (1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4)):
        model = get_preset(name)
        args = layouts.base_flags(name, model, "pretrain", WORLD, machine)
        if vpp > 1:
            args.num_layers_per_virtual_pipeline_stage = max(1, model.num_layers // pp // vpp)
        work = None if vpp > 1 and pp == 1 else layouts.workload(args, model, "pretrain", WORLD, (tp, pp, ep, 8))
        if work is not None and (work.layout.vpp or 1) == vpp:
            found[name].append(_described(work, machine))
    lines = {
        f"{pp} {vpp} {count}": timeline(pp, count, vpp)
        for pp, vpp, count in itertools.product((1, 2, 4), (1, 2), MICRO_BATCHES)
        if pp > 1 or vpp == 1
    }
    sizes = {name: [get_preset(name).num_layers, get_preset(name).num_parameters()] for name in MODELS}
    return {"world": WORLD, "models": sizes, "layouts": found, "timelines": lines, "machine": "H100"}


def _described(work: Workload, machine: machines.Machine) -> dict[str, Any]:
    """Return the layers, experts and parameters of each rank of a layout, and the bytes that a rank sends and holds."""
    layout, model = work.layout, work.model
    shapes = weights.mcore_shapes(model)
    per = layout.layers_per_virtual_stage
    placed = ParallelLayout(tp=layout.tp, pp=layout.pp, ep=layout.ep, layers_per_virtual_stage=per)
    counts = dict.fromkeys(placed.folders(), 0)
    table = placed.parts(model)
    for name, parts in table.items():
        for part in parts:
            counts[part.folder] += math.prod(part.shape(name, shapes[name], layout.tp))
    shown = [name for name in shapes if ".layers." not in name or name.startswith("decoder.layers.0.")]
    first = {name: weights.shard_shape(name, shapes[name], layout.tp) for name in shown}
    held = [
        [expert for expert in range(model.moe.num_experts if model.moe else 0)
         if placed.folder(0, 0, rank) in {part.folder for part in table[f"{EXPERTS}.{expert}.linear_fc1.weight"]}]
        for rank in range(layout.ep)
    ]  # fmt: skip
    return {
        "tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp or 1, "ep": layout.ep, "dp": layout.dp,
        "layers": [[[layer for _, layer in chunk] for chunk in stage] for stage in placed.stages(model)],
        "parameters": list(counts.values()),
        "experts": [[experts[0], experts[-1]] for experts in held if experts],
        "shapes": {name.removeprefix("decoder.layers.0."): list(shape) for name, shape in first.items()
                   if ".local_experts." not in name or ".local_experts.0." in name},
        "sent": {kind: round(size) for kind, size in speed.volume(work).items()},
        "memory": {kind: round(size) for kind, size in memory.of_training(work, machine).items()},
        "micro_batches": work.num_microbatches,
    }  # fmt: skip


def timeline(stages: int, micro_batches: int, virtual: int = 1) -> dict[str, Any]:
    """Simulate a step of Megatron's pipeline schedules: 1F1B, or interleaved 1F1B with several chunks.

    Args:
        stages: number of ranks of the pipeline.
        micro_batches: number of micro-batches of a step.
        virtual: number of chunks of layers on each rank.

    Returns:
        `ranks`: for each rank a list of [0 for forward or 1 for backward, micro-batch, chunk, start]. The forward pass
        of a chunk takes 1 unit of time, the backward pass 2. `end`: duration of the step. `bubble`: the share of this
        time in which a rank waits.
    """
    orders = [_order(rank, stages, micro_batches, virtual) for rank in range(stages)]
    done: dict[tuple[int, int, int, int], int] = {}  # end by (kind, micro-batch, chunk, rank)
    lines: list[list[list[int]]] = [[] for _ in range(stages)]
    free, position = [0] * stages, [0] * stages
    last = stages * virtual - 1
    while any(place < len(order) for place, order in zip(position, orders, strict=True)):
        moved = False
        for rank, order in enumerate(orders):
            if position[rank] == len(order):
                continue
            kind, micro, chunk = order[position[rank]]
            depth = chunk * stages + rank
            needed = None if kind == 0 and depth == 0 else (0, micro, chunk, rank) if kind and depth == last else (
                kind, micro, *divmod(depth + (1 if kind else -1), stages)
            )  # fmt: skip
            if needed is not None and needed not in done:
                continue
            start = max(free[rank], done[needed] if needed else 0)
            free[rank] = done[kind, micro, chunk, rank] = start + 1 + kind
            lines[rank].append([kind, micro, chunk, start])
            position[rank] += 1
            moved = True
        require(moved, f"the schedule of {stages} stages with {virtual} chunks is deadlocked")
    end = max(free)
    return {"ranks": lines, "end": end, "bubble": round(1 - 3 * micro_batches * virtual / end, 4)}


def _order(rank: int, stages: int, micro_batches: int, virtual: int) -> list[tuple[int, int, int]]:
    """Return the passes of a rank in order: warm-up, forward and backward passes in turn, cool-down."""
    total = micro_batches * virtual
    warm_up = stages - 1 - rank
    if virtual > 1:
        warm_up = 2 * warm_up + (virtual - 1) * stages
    warm_up = min(warm_up, total)

    def chunk_of(number: int, backward: bool) -> tuple[int, int]:
        # Groups of `stages` micro-batches go through one chunk after the other.
        group, place = divmod(number, stages * virtual)
        chunk, micro = divmod(place, stages)
        return group * stages + micro, virtual - 1 - chunk if backward else chunk

    forwards = [(0, *chunk_of(number, False)) for number in range(total)]
    backwards = [(1, *chunk_of(number, True)) for number in range(total)]
    steady = [one for pair in zip(forwards[warm_up:], backwards, strict=False) for one in pair]
    return forwards[:warm_up] + steady + backwards[total - warm_up :]


def checkpoint(study: Study) -> dict[str, Any]:
    """Return the files of a checkpoint, the shards of its tensors, and the `journey` of some tensors."""
    model = get_preset("minimind3_tiny")
    files = []
    if study.checkpoint:
        files = [
            [file.relative_to(study.checkpoint).as_posix(), file.stat().st_size]
            for file in sorted(study.checkpoint.rglob("*"))
            if file.is_file() and ("iter_0001000" in file.parts or file.parent == study.checkpoint)
        ]
    table = ParallelLayout(tp=2, pp=2).parts(model)
    placed = {
        name: [[part.folder, part.name, list(part.shape(name, weights.mcore_shapes(model)[name], 2))] for part in parts]
        for name, parts in table.items()
        if ".layers." not in name or ".layers.2." in name
    }
    return {
        "model": "minimind3_tiny",
        "files": files,
        "parts": placed,
        "journeys": [journey(model, *item) for item in JOURNEYS.items()],
    }


def journey(model: ModelConfig, label: str, name: str) -> dict[str, Any]:
    """Trace the rows of a megatron-core tensor, and of its two shards with TP=2, back to transformers' tensors.

    To trace them, the conversion rule is applied to tensors whose elements are their own positions. The result is a
    list of [number of the source tensor, first row, number of rows] for rows that stay together, or the same for
    columns if tensor parallelism splits the columns.
    """
    rule = next(rule for rule in weights.rules(model) if name in rule.mcore and rule.written)
    base = 2**20
    tensors = [torch.arange(math.prod(shape)).view(shape) + source * base for source, shape in enumerate(rule.shapes)]
    whole = rule.to_mcore(tensors)[rule.mcore.index(name)]
    columns = weights.shard_shape(name, tuple(whole.shape), 2)[0] == whole.shape[0]
    widths = [shape[1] for shape in rule.shapes]

    def runs(tensor: torch.Tensor) -> list[list[int]]:
        places = [divmod(value, base) for value in (tensor[0] if columns else tensor[:, 0]).tolist()]
        lines = [(source, offset if columns else offset // widths[source]) for source, offset in places]
        found: list[list[int]] = []
        for source, line in lines:
            if found and found[-1][0] == source and found[-1][1] + found[-1][2] == line:
                found[-1][2] += 1
            else:
                found.append([source, line, 1])
        return found

    return {
        "label": label, "mcore": name, "hf": list(rule.hf), "shapes": [list(shape) for shape in rule.shapes],
        "shape": list(whole.shape), "axis": "columns" if columns else "rows", "whole": runs(whole),
        "ranks": [runs(weights.shard(name, whole, rank, 2)) for rank in range(2)],
    }  # fmt: skip


def cache(study: Study) -> dict[str, Any]:
    """Return the sizes of models and of their KV caches per token, and the error of logits that use the cache."""
    names = ("minimind3_tiny", "minimind3", "minimind3_moe", "minimind2_small", "minimind2")
    sizes = {}
    for name in names:
        model = get_preset(name)
        sizes[name] = {
            "layers": model.num_layers, "heads": model.num_heads, "kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim, "parameters": model.num_parameters(),
            "bytes_per_token": cache_bytes_per_token(model, 2),
        }  # fmt: skip
    return {"models": sizes, "difference": _cache_difference(study)}


@torch.no_grad()
def _cache_difference(study: Study) -> float:
    """Return the largest difference between logits with and without the KV cache, over the tokens of a prompt."""
    model = study.models["full_sft"]
    row = torch.tensor([study.ids(study.chat("27+38=?"))])
    whole = model(row).logits
    past, parts = None, []
    for place in range(row.shape[1]):
        output = model(row[:, place : place + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        parts.append(output.logits)
    return float(f"{float((torch.cat(parts, 1) - whole).abs().max()):.1g}")

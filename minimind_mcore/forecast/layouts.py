"""Find the parallel layouts with which a model runs and fits in memory on a number of devices, fastest first."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minimind_mcore import arguments
from minimind_mcore.errors import UserError
from minimind_mcore.forecast import memory, speed
from minimind_mcore.forecast.machines import Machine
from minimind_mcore.forecast.memory import GIB, Rollouts, Workload
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.recipes import get_recipe, recipe_for
from minimind_mcore.validation import validate

STAGES = ("pretrain", "sft", "lora", "dpo", "grpo")
# A step of GRPO on each device, as in configs/rlxf/grpo_minimind3.yaml.
GRPO = Rollouts(responses=64, prompt_length=512, response_length=1024, at_once=256)
GRPO_FLAGS = "--seq-length 1536 --micro-batch-size 8 --lr 1e-6"
SCALES = (1, 8, 16, 64, 128, 256, 512, 1024, 2048, 4096, 10000)
# Reasons for slow steps, by the keys of `speed.of_training`.
REASONS = {
    "launches": "the host starts kernels more slowly than the device runs them",
    "TP": "all-reduces of activations between tensor-parallel ranks",
    "PP": "transfers between pipeline stages",
    "DP": "the reduction of gradients between data-parallel ranks",
    "EP": "the all-to-all of tokens between expert-parallel ranks",
    "bubble": "pipeline stages wait for each other",
    "update": "the update of the weights",
}


@dataclass(frozen=True)
class Proposal:
    """A layout with its forecast: bytes and seconds of a rank, by purpose."""

    work: Workload
    machine: Machine
    memory: dict[str, float]
    seconds: dict[str, float]

    @property
    def bytes(self) -> float:
        """Memory of a rank, including the memory of a process without a model."""
        return sum(self.memory.values()) + self.machine.program

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks."""
        return speed.step_tokens(self.work) / self.step

    @property
    def utilization(self) -> float:
        """Model FLOPs utilization."""
        return speed.utilization(self.work, self.machine, self.step)


def base_flags(name: str, model: ModelConfig, stage: str, devices: int, machine: Machine) -> argparse.Namespace:
    """Return the flags of a stage's recipe for TP=1 and PP=1, with the flags that the scripts add."""
    if stage == "grpo":
        flags = [*GRPO_FLAGS.split(), "--global-batch-size", str(GRPO.responses * devices)]
    else:
        flags = get_recipe(recipe_for(name, stage)).megatron_flags(devices)
    flags += ["--train-iters", "1", "--sequence-parallel", "--use-distributed-optimizer"]
    flags += [] if machine.kind == "cpu" else ["--bf16"]
    return arguments.parse([*model.megatron_flags(), *flags], posttrain=stage != "pretrain")


def workload(
    args: argparse.Namespace, model: ModelConfig, stage: str, world: int, sizes: Sequence[int]
) -> Workload | None:
    """Return the workload of a layout, or None if validation refuses it.

    Args:
        args: result of `base_flags`.
        sizes: TP, PP, EP, samples of a micro-batch.
    """
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    given = argparse.Namespace(**{**vars(args), **dict(zip((*names, "micro_batch_size"), sizes, strict=True))})
    try:
        layout = validate(given, world)
    except UserError:
        return None
    return Workload.from_flags(vars(given), layout, model, 2 if stage == "dpo" else 1)


def forecast(work: Workload, machine: Machine, rollouts: Rollouts | None = None) -> Proposal:
    """Forecast memory and time of a workload. With rollouts the workload is reinforcement learning."""
    if rollouts:
        return Proposal(work, machine, memory.of_rl(work, machine, rollouts), speed.of_rl(work, machine, rollouts))
    return Proposal(work, machine, memory.of_training(work, machine), speed.of_training(work, machine))


def propose(name: str, model: ModelConfig, stage: str, devices: int, machine: Machine, limit: float) -> list[Proposal]:
    """Return every layout that fits, each with its fastest micro-batch size, the fastest layout first.

    Args:
        name: name of the model, which selects the recipe.
        stage: one of `STAGES`.
        limit: memory of a device in bytes.

    Raises:
        UserError: no layout fits. The message has the smallest one.
    """
    args = base_flags(name, model, stage, devices, machine)
    found: dict[tuple[int, ...], Proposal] = {}
    smallest: Proposal | None = None
    for tp, pp in _sizes(model, devices):
        for work in _workloads(args, model, stage, devices, tp, pp):
            one = forecast(work, machine, GRPO if stage == "grpo" else None)
            smallest = one if smallest is None or one.bytes < smallest.bytes else smallest
            best = found.get(key := (tp, pp, work.layout.ep))
            if one.bytes <= limit and (best is None or one.step < best.step):
                found[key] = one
    if smallest is None:
        raise UserError(f"{name} has no layout on {devices} devices: try a number with smaller factors, such as 8")
    if not found:
        raise UserError(
            f"{stage} of {name} does not fit on {devices} devices of {limit / GIB:.3g} GiB: the smallest layout, "
            f"{smallest.work.layout} with micro-batches of {smallest.work.micro_batch_size}, needs "
            f"{smallest.bytes / GIB:.2f} GiB per device. Give more devices (--devices) or more memory (--memory)"
        )
    return sorted(found.values(), key=lambda one: one.step)


def _sizes(model: ModelConfig, devices: int) -> Iterator[tuple[int, int]]:
    """Yield all TP and PP whose product is at most `devices`. `workload` later skips the invalid ones."""
    for tp in range(1, min(model.num_heads, devices) + 1):
        yield from ((tp, pp) for pp in range(1, min(model.num_layers, devices // tp) + 1))


def _workloads(
    args: argparse.Namespace, model: ModelConfig, stage: str, world: int, tp: int, pp: int
) -> Iterator[Workload]:
    """Yield the valid workloads for every EP, with the micro-batch size and its halves."""
    if workload(args, model, stage, world, (tp, pp, 1, 1)) is None:  # then no EP or micro-batch size is valid either
        return
    for ep in range(1, (model.moe.num_experts if model.moe else 1) + 1):
        micro_batch = args.micro_batch_size
        while micro_batch:
            if work := workload(args, model, stage, world, (tp, pp, ep, micro_batch)):
                yield work
            micro_batch //= 2


@dataclass(frozen=True)
class Scale:
    """The fastest layout on at most `devices` devices, and its efficiency relative to one device."""

    devices: int
    best: Proposal
    efficiency: float


def scale(name: str, model: ModelConfig, machine: Machine, limit: float) -> tuple[list[Scale], str]:
    """Forecast pretraining on the numbers of devices in `SCALES`, and explain where scaling stops.

    The global batch size is always the recipe's for eight devices.

    Raises:
        UserError: the model does not fit on any number of devices.
    """
    args = base_flags(name, model, "pretrain", 8, machine)
    rows: list[Scale] = []
    for devices in SCALES:
        fitting = [one for one in _usable(args, model, devices, machine) if one.bytes <= limit]
        if not fitting:
            continue
        best = min(fitting, key=lambda one: one.step)
        per_device = best.tokens_per_second / devices
        first = rows[0] if rows else Scale(devices, best, 1.0)
        rows.append(Scale(devices, best, per_device / (first.best.tokens_per_second / first.devices)))
    if not rows:
        raise UserError(f"{name} does not fit on any number of devices of {limit / GIB:.3g} GiB: give more (--memory)")
    return rows, _why(rows, args.global_batch_size)


def _usable(args: argparse.Namespace, model: ModelConfig, devices: int, machine: Machine) -> Iterator[Proposal]:
    """Yield layouts whose number of data-parallel ranks divides the global batch, on at most `devices` devices."""
    batch = args.global_batch_size
    for tp, pp in _sizes(model, devices):
        dp = next(n for n in range(min(batch, devices // (tp * pp)), 0, -1) if batch % n == 0)
        yield from (forecast(work, machine) for work in _workloads(args, model, "pretrain", tp * pp * dp, tp, pp))


def _why(rows: Sequence[Scale], batch: int) -> str:
    """Return a sentence without its subject: where efficiency falls below one half, and the largest cost there."""
    good = [row for row in rows if row.efficiency >= 0.5]
    later = rows[len(good) :]
    if not later:
        return f"scales to {rows[-1].devices:,} devices at an efficiency of {rows[-1].efficiency:.0%}"
    row = later[0]
    idle = row.devices - row.best.work.layout.world_size
    lost = {name: seconds for name, seconds in row.best.seconds.items() if name in REASONS}
    cause = REASONS[max(lost, key=lambda name: lost[name])]
    if idle > row.devices / 2:
        cause = f"{idle:,} of {row.devices:,} devices are idle, as the batch has {batch:,} sequences"
    return f"stops scaling after {good[-1].devices:,} devices: with {row.devices:,} {cause}"

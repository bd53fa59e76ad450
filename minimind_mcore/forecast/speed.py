"""Seconds of one step on one rank, by purpose, and the bytes that the rank sends.

Compute time is model FLOPs divided by the measured rate of training, but at least the time of the host to launch the
kernels. Collectives take their volume divided by the bandwidth of the slowest link, plus a latency per hop. Nothing
overlaps, as in training without `--overlap-grad-reduce`.
"""

from __future__ import annotations

import math

from minimind_mcore.forecast.machines import Machine
from minimind_mcore.forecast.memory import Rollouts, Workload, cache_bytes_per_token, compiles, rank_parameters


def bubble(stages: int, micro_batches: int, virtual: int = 1) -> float:
    """Return the share of a step that a pipeline stage waits: (p - 1) / (v m + p - 1) (Megatron-LM, arXiv
    2104.04473)."""
    return (stages - 1) / (virtual * micro_batches + stages - 1)


def volume(work: Workload) -> dict[str, float]:
    """Return the bytes that the busiest rank sends in a step, by the kind of parallelism.

    A ring all-reduce of n ranks sends 2 (n - 1) / n of the data. A reduce-scatter or an all-gather sends half of that.
    Sequence parallelism and the distributed optimizer replace each all-reduce by a reduce-scatter and an all-gather.
    """
    layout, model = work.layout, work.model
    hidden = work.tokens * model.hidden_size * work.width
    split = layout.tp if work.sequence_parallel else 1
    m, layers = work.num_microbatches, model.num_layers / layout.pp
    dense, experts = work.trained
    returned = work.width if work.use_distributed_optimizer else work.gradient_width
    return {
        "TP": m * _tensor_collectives(work) * 2 * _others(layout.tp) * hidden,
        "PP": m * _pipeline_sends(work) * hidden / split if layout.pp > 1 else 0.0,
        "DP": (dense * _others(layout.dp) + experts * _others(layout.dp // layout.ep))
        * (work.gradient_width + returned),
        "EP": m * 4 * layers * _others(layout.ep) * hidden * (model.moe.topk if model.moe else 0) / split,
    }


def _others(ranks: int) -> float:
    return (ranks - 1) / ranks


def _pipeline_sends(work: Workload) -> int:
    """Return how often the busiest rank of a pipeline sends for a micro-batch.

    Each chunk of layers sends activations to the next chunk and gradients to the chunk before. The first chunk has no
    chunk before it, and the last chunk has no chunk after it. With two stages each rank holds the first or the last
    chunk, so it sends once less.
    """
    return 2 * (work.layout.vpp or 1) - (work.layout.pp == 2)


def _tensor_collectives(work: Workload) -> float:
    """Return the number of all-reduces of a micro-batch: two forward and two backward per layer, one for the embedding
    and one for the output layer."""
    return 4 * work.model.num_layers / work.layout.pp + 2


def link(machine: Machine, ranks: int, stride: int) -> tuple[float, float]:
    """Return bandwidth and latency of a collective of `ranks` ranks, `stride` apart. Hosts hold consecutive ranks.

    Between hosts a group uses one network port per member on a host, and its hops form a tree.
    """
    inside = max(1, min(ranks, int(machine.devices_per_host) // stride))
    hosts = math.ceil(ranks / inside)
    latency = machine.collective_seconds + 2 * (inside - 1) * machine.host_seconds
    if hosts == 1:
        return machine.host_bandwidth, latency
    bandwidth = min(machine.host_bandwidth, machine.network_bandwidth * inside)
    return bandwidth, latency + 2 * math.ceil(math.log2(hosts)) * machine.network_seconds


def of_training(work: Workload, machine: Machine) -> dict[str, float]:
    """Return the seconds of a training step by purpose. Their sum is the duration of the step."""
    layout, model, m = work.layout, work.model, work.num_microbatches
    efficiency = machine.efficiency_compiled if compiles(work) else machine.efficiency
    compute = _flops(work) / (machine.matmul_flops * efficiency)
    starting = (machine.layer_seconds_moe if model.moe else machine.layer_seconds) * model.num_layers / layout.pp
    layers = model.num_layers / layout.pp
    transfers = 2 * (layout.vpp or 1)
    sent = volume(work)
    # A rank waits for the transfers in both directions, also for those that it only receives.
    sent["PP"] *= transfers / _pipeline_sends(work)
    links = {  # Megatron's order of ranks: TP, then DP (of which EP is a part), then PP
        "TP": (layout.tp, 1, m * _tensor_collectives(work)),
        "PP": (2 if layout.pp > 1 else 1, layout.tp * layout.dp, m * transfers),
        "DP": (layout.dp, layout.tp, 2),
        "EP": (layout.ep, layout.tp, m * 4 * layers),
    }
    parts = {"compute": m * compute, "launches": m * max(0.0, starting - compute)}
    for name, (ranks, stride, times) in links.items():
        bandwidth, latency = link(machine, ranks, stride)
        parts[name] = sent[name] / bandwidth + times * latency if ranks > 1 else 0.0
    busy = sum(parts.values()) - parts["DP"]
    waiting = bubble(layout.pp, m, layout.vpp or 1)
    parts["bubble"] = busy * waiting / (1 - waiting)
    dense, experts = work.trained
    states = dense / work.shards[0] + experts / work.shards[1]
    # The update reads the gradient, weight and both moments in fp32 and writes all but the gradient.
    return parts | {"update": states * 28 / machine.memory_bandwidth}


def _flops(work: Workload) -> float:
    """Return the FLOPs of a micro-batch on the last pipeline stage, which also has the output layer.

    Of the 6 FLOPs per weight, 2 are forward and 4 backward. Frozen weights have no weight gradients (2 less). A
    recomputed layer runs forward once more. A pair's reference runs forward once.
    """
    model, layout = work.model, work.layout
    output = 6.0 * model.vocab_size * model.hidden_size
    layers = model.flops_per_token(work.seq_length) - output
    passes = 4 if work.lora_target_modules else 6
    passes += 2 if work.recompute_granularity == "full" else 0
    passes += 2 if work.sequences == 2 else 0
    return work.tokens * (layers / layout.pp + output) / layout.tp * passes / 6


def of_rl(work: Workload, machine: Machine, rollouts: Rollouts) -> dict[str, float]:
    """Return the seconds of a reinforcement learning step: rollout, reference, weight sync and update."""
    model = work.model
    rate = machine.matmul_flops * machine.efficiency
    length = rollouts.prompt_length + rollouts.response_length
    cache = rollouts.rows * (length - rollouts.response_length / 2) * cache_bytes_per_token(model, work.width)
    weights = model.num_parameters() * work.width
    token = max(
        model.num_layers * machine.decode_layer_seconds,
        (weights + cache) / machine.memory_bandwidth,
        rollouts.rows * model.flops_per_token(length) / 3 / rate,
    )
    update = {name: seconds * rollouts.updates for name, seconds in of_training(work, machine).items()}
    return {
        "rollout": math.ceil(rollouts.responses / rollouts.rows) * rollouts.response_length * token,
        "reference": update["compute"] / 3 if rollouts.reference else 0.0,
        "sync": sum(rank_parameters(model, work.layout)) * work.width / machine.host_bandwidth,
        **update,
    }


def utilization(work: Workload, machine: Machine, seconds: float) -> float:
    """Return the model FLOPs utilization of a training step."""
    flops = work.model.flops_per_token(work.seq_length, bool(work.lora_target_modules)) * step_tokens(work)
    return flops / (work.layout.world_size * machine.matmul_flops * seconds)


def step_tokens(work: Workload) -> int:
    """Return the tokens of a step, over all ranks."""
    return work.global_batch_size * work.seq_length * work.sequences

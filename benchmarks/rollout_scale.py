"""Compute where the time of a reinforcement learning step goes on many hosts, from costs that are measured on one.

    python benchmarks/rollout_scale.py                                      # the table of docs/rl_cluster.md
    python benchmarks/rollout_scale.py --model minimind3_moe --device 910B --responses 16384
    python benchmarks/rollout_scale.py --measure --tokenizer data/tokenizer # measures this host's costs first

Rollout, reference model and update are those of `minimind-mcore plan` (forecast/). The costs of the rollout manager, of
Ray's calls and of the weights are `MEASURED`. The rate between hosts is a published measurement. Nothing overlaps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.forecast import machines, memory, speed
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import get_preset
from minimind_mcore.models.weights import mcore_shapes
from minimind_mcore.rl.runtime import weight_sync

MICRO = 8  # responses of a micro-batch
AT_ONCE = 256  # responses that an engine generates at a time
COLUMNS = 3  # times that ranks get the ids of their responses: for the reference, the old policy and the update
# Bytes of a token: ids and a mask each time, and three log-probabilities and an advantage in the update.
TOKEN_BYTES = COLUMNS * (4 + 4) + 4 * 4


@dataclass(frozen=True)
class Costs:
    """Seconds on one core.

    Attributes:
        call: the caller's CPU time of a call of an actor and its answer, among many calls at a time.
        answer: the called actor's time for a call that does nothing, likewise.
        response: the rollout manager's time of a response, without its tokens.
        token: the rollout manager's time of a token of a response.
        send: a rank's time of a byte of weights: cut, copied into the object store.
        load: an engine's time of a byte of weights: joined, converted, copied into its tensors.
        spread: time of a byte to one more host through Ray's object store.
    """

    call: float
    answer: float
    response: float
    token: float
    send: float
    load: float
    spread: float


MEASURED = Costs(
    call=1.2e-4, answer=1.3e-4, response=4.2e-5, token=4.1e-7, send=1.1e-9, load=3.8e-10,
    # Ray's release test: 1 GiB to 50 nodes in 16.9 s (release/perf_metrics/scalability/object_store.json).
    spread=16.938 / 50 / 2**30,
)  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Hosts with training ranks (data parallel) and rollout engines, evenly spread."""

    hosts: int
    ranks: int
    engines: int

    def __str__(self) -> str:
        return f"{self.hosts}, {self.ranks}, {self.engines}"


CLUSTERS = (Cluster(1, 8, 8), Cluster(9, 64, 8), Cluster(16, 112, 16), Cluster(16, 128, 256))


def seconds(model: ModelConfig, machine: Any, cluster: Cluster, responses: int, tokens: int, costs: Costs) -> Any:
    """Return the seconds of a step by purpose."""
    width = 2
    layout = ParallelLayout(world_size=cluster.ranks)
    work = memory.Workload(
        model=model, layout=layout, seq_length=tokens + 128, micro_batch_size=MICRO, global_batch_size=responses,
        num_microbatches=math.ceil(responses / cluster.ranks / MICRO), bf16=True, fp16=False,
        accumulate_allreduce_grads_in_fp32=False, use_distributed_optimizer=False, sequence_parallel=False,
        optimizer="adam", sgd_momentum=0.9, recompute_granularity=None, lora_target_modules=[], lora_r=0,
    )  # fmt: skip
    rollouts = memory.Rollouts(
        responses=math.ceil(responses / cluster.engines), prompt_length=128, response_length=tokens, at_once=AT_ONCE
    )
    device = speed.of_rl(work, machine, rollouts)
    size = sum(math.prod(shape) for shape in mcore_shapes(model).values()) * width
    buckets = len(weight_sync.buckets(model, width))
    others = cluster.hosts - 1
    return {
        "rollout": device.pop("rollout"),
        "reference": device.pop("reference"),
        "update": sum(device.values()) - device["sync"],
        "manager": responses * (costs.response + tokens * costs.token),
        "rows to ranks": responses * tokens * TOKEN_BYTES * others / cluster.hosts * costs.spread,
        "weights": size * (costs.send + costs.load + others * costs.spread),
        # Every engine asks every rank for every bucket; ranks and engines work at the same time as the others.
        "calls for weights": buckets * (cluster.engines * costs.answer + cluster.ranks * costs.call),
        "driver": 6 * cluster.ranks * costs.call,
    }


def table(args: argparse.Namespace, costs: Costs) -> list[str]:
    """Return the lines of the table: a row for each cluster, in seconds and as a share of the step."""
    model, machine = get_preset(args.model), machines.machine(args.device)
    lines: list[str] = []
    for cluster in CLUSTERS:
        found = seconds(model, machine, cluster, args.responses, args.tokens, costs)
        step = sum(found.values())
        if not lines:
            lines += [f"| hosts, ranks, engines | {' | '.join(found)} | step |", "|---" * (len(found) + 2) + "|"]
        cells = [f"{value:.2f} ({value / step:.0%})" if value >= 0.005 else "0" for value in found.values()]
        lines.append(f"| {cluster} | {' | '.join(cells)} | {step:.2f} |")
    return lines


def engines_at_once(args: argparse.Namespace, costs: Costs) -> float:
    """Return how many engines write as many tokens in a second as one rollout manager takes in."""
    model, machine = get_preset(args.model), machines.machine(args.device)
    rollout = seconds(model, machine, Cluster(1, 1, 1), AT_ONCE, args.tokens, costs)["rollout"]
    return rollout / (AT_ONCE * (costs.response + args.tokens * costs.token))


# ------------------------------------------------------------------------------------------------ measurement


class Idle:
    """An actor that does nothing."""

    def nothing(self) -> list[Any]:
        return []

    def cpu_seconds(self) -> float:
        return time.process_time()


def of_calls(count: int = 2000) -> tuple[float, float]:
    """Return CPU seconds of a call of an actor: the caller's, and the actor's."""
    import ray

    actor: Any = ray.remote(Idle).options(num_cpus=0).remote()
    ray.get([actor.nothing.remote() for _ in range(count)])
    before: float = ray.get(actor.cpu_seconds.remote())
    began = time.process_time()
    ray.get([actor.nothing.remote() for _ in range(count)])
    mine = time.process_time() - began
    after: float = ray.get(actor.cpu_seconds.remote())
    theirs = after - before
    return mine / count, theirs / count


class Here:
    """Workers of this process."""

    def __init__(self, worker: Any) -> None:
        self.worker, self.seconds = worker, 0.0

    def __len__(self) -> int:
        return 2

    def run(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        began = time.process_time()
        found = [getattr(self.worker, method)(*part) for part in parts]
        self.seconds += time.process_time() - began  # not the manager's
        return found


def of_manager(tokenizer: str, responses: int, tokens: int) -> float:
    """Return CPU seconds of the rollout manager for a step, with everything that it does for the ranks."""
    import torch
    from rollout_driver import Engine, Judge, configuration

    from minimind_mcore.rl.runtime.rollouts import Position
    from minimind_mcore.rl.runtime.sharding import Division, Share
    from minimind_mcore.rl.runtime.workers.manager import ManagerWorker

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sizes = argparse.Namespace(tokenizer=tokenizer, prompts=responses // 8, responses=8, tokens=tokens)
        engines, rewards = Here(Engine()), Here(Judge())
        manager = ManagerWorker(configuration(sizes, Path(folder)), engines, rewards)
        manager.prepare(Position(), {})
        division, began = Division(8, 8, 8, 8, 8, "token-mean", 1), time.process_time()
        manager.generate(1, 0)
        for column in ("ref_logp", "old_logp"):
            shards = manager.shards(division)[1:]
            shares = [Share(shard.rows, {"logp": torch.full_like(shard.batch.mask, -1.0)}) for shard in shards if shard]
            manager.fill(column, *shares)  # type: ignore[arg-type]
        manager.rewards()
        manager.compute_advantages(1, False)
        manager.shards(division, 1)
        return time.process_time() - began - engines.seconds - rewards.seconds


def of_weights(model: ModelConfig) -> tuple[float, float]:
    """Return seconds of a byte of weights in bf16 on one core: of a rank, and of an engine."""
    import ray
    import torch

    from minimind_mcore.rl.runtime.engines.decoder import DecoderEngine
    from minimind_mcore.rl.runtime.weight_sync import WeightPart

    torch.set_num_threads(1)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in mcore_shapes(model).items()}
    own = {name: WeightPart(0, 1, tensor) for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    engine = DecoderEngine(model, model.vocab_size, torch.bfloat16, 8)
    sent, loaded = math.inf, math.inf
    for _ in range(4):  # the first load also builds the model
        began = time.perf_counter()
        references = [ray.put(weight_sync.shards(own, names)) for names in weight_sync.buckets(model, 2)]
        sent = min(sent, time.perf_counter() - began)
        began = time.perf_counter()
        engine.load_weights(pair for one in references for pair in weight_sync.join([ray.get(one)]).items())
        loaded = min(loaded, time.perf_counter() - began)
    return sent / size, loaded / size


def measured(tokenizer: str) -> Costs:
    """Measure this host."""
    import ray

    with tempfile.TemporaryDirectory(prefix="rs", dir="/tmp") as folder:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        call, answer = of_calls()
        send, load = of_weights(get_preset("minimind3"))
        ray.shutdown()
    few, many = 128, 1024
    of_manager(tokenizer, 64, few)  # imports
    short, long = (of_manager(tokenizer, 1024, tokens) / 1024 for tokens in (few, many))
    token = (long - short) / (many - few)
    found = {
        "call": call,
        "answer": answer,
        "response": short - few * token,
        "token": token,
        "send": send,
        "load": load,
    }
    return dataclasses.replace(MEASURED, **found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minimind3", help="a preset (default: %(default)s)")
    parser.add_argument("--device", choices=list(machines.table()), default="H100", help="default: %(default)s")
    parser.add_argument("--responses", type=int, default=4096, help="of a step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a response (default: %(default)s)")
    parser.add_argument("--measure", action="store_true", help="measure the costs of this host")
    parser.add_argument("--tokenizer", help="for --measure")
    args = parser.parse_args(argv)
    costs = measured(args.tokenizer) if args.measure else MEASURED
    print(json.dumps({name: float(f"{value:.3g}") for name, value in dataclasses.asdict(costs).items()}))
    print(f"{args.model} on {args.device}, {args.responses} responses of {args.tokens} tokens, seconds:\n")
    print("\n".join(table(args, costs)))
    print(f"\none rollout manager keeps up with {engines_at_once(args, costs):.0f} engines")
    return 0


if __name__ == "__main__":
    sys.exit(main())

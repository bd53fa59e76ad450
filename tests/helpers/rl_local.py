"""The trainer without Ray, as a program for `engine.Server`: every actor is an object of one process.

What is tested is the driver with real ranks, engines and rewards; `rl_ray.py` runs the same with real actors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state

from minimind_mcore.rl.config.load import resolve
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime import placement, trainer, weight_sync
from minimind_mcore.rl.runtime.rank import Rank
from minimind_mcore.rl.runtime.sharding import Division, Shard
from minimind_mcore.rl.runtime.supervise import Restarts
from minimind_mcore.rl.runtime.weight_sync import WeightVersion
from minimind_mcore.rl.runtime.workers.manager import ManagerWorker, RolloutClient
from minimind_mcore.rl.runtime.workers.reward import RewardWorker
from minimind_mcore.rl.runtime.workers.rollout import RolloutWorker


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tree", type=Path)
    parser.add_argument("--output-dir", type=Path)
    args = parser.parse_args(argv)
    trainer.WorkerGroups = LocalGroups  # type: ignore[assignment,misc]
    trainer.run(resolve(json.loads(args.tree.read_text(encoding="utf-8"))))
    from minimind_mcore.training import distributed

    distributed.finish()


class Done:
    """A call that is already answered."""

    def __init__(self, found: Any = None) -> None:
        self.found = found

    def result(self) -> list[Any]:
        return [self.found]


@dataclass
class LocalWeights:
    """A `WeightSource` of this process."""

    rank: Rank
    version: WeightVersion

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for names in self.version.buckets:
            yield from weight_sync.join([self.rank.shards(self.version.number, names)]).items()


class LocalTrain:
    """A `TrainGroup` of this process."""

    def __init__(self, config: Config, role: Any, reference: bool = False) -> None:
        self.config, self.role, self.kept = config, role, reference

    def start(self, at: int | None = None) -> dict[str, Any]:
        if parallel_state.model_parallel_is_initialized():  # another role of this process did it
            parallel_state.destroy_model_parallel()
        self.rank = Rank(self.config, self.role, self.kept)
        return self.rank.load(at)

    @property
    def division(self) -> Division:
        return self.rank.division()[1]

    def measure(self, shards: list[Shard], reference: bool = False) -> list[Any]:
        return [self.rank.measure(shards[0], reference)]

    def update(self, shards: list[Shard], iteration: int, kl_coef: float | None = None) -> dict[str, float]:
        return self.rank.update(shards[0], iteration, kl_coef)

    def weights(self, keep: bool = False) -> LocalWeights:
        return LocalWeights(self.rank, self.rank.publish(keep))

    def save(self, iteration: int, consumed: int, state: dict[str, Any]) -> None:
        self.rank.save(iteration, consumed, state)


class LocalRollout:
    """A `RolloutGroup` of this process."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker

    def load(self, source: Any) -> Done:
        self.source = source
        self.worker.load(source)
        return Done()

    def check(self) -> list[str]:
        return self.worker.check(self.source)


class LocalWorkers:
    """`Workers` of this process: a single one."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def __len__(self) -> int:
        return 1

    def run(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(self.worker, method)(*part) for part in parts]


class LocalManager(RolloutClient):
    """The rollout manager in this process."""

    def __init__(self, config: Config, engine: Any, rewards: Any) -> None:
        self.worker, self.prepared = ManagerWorker(config, LocalWorkers(engine), LocalWorkers(rewards)), False

    def go_to(self, position: Any, state: dict[str, Any]) -> None:
        (self.worker.go_to if self.prepared else self.worker.prepare)(position, state)
        self.prepared = True

    def ask(self, method: str, *arguments: Any) -> Any:
        return self.worker.ask(method, *arguments).value

    def generate(self, step: int, ahead: int = 0) -> int:
        return int(self.ask("generate", step, ahead))

    def shards(self, division: Division, step: int | None = None) -> list[Any]:
        return self.worker.shards(division, step)[1:]


class LocalGroups:
    """`WorkerGroups` of this process."""

    start, _wait = placement.WorkerGroups.start, placement.WorkerGroups._wait
    training = placement.WorkerGroups.training

    def __init__(self, config: Config, algorithm: Any, vocab_size: int) -> None:
        self.restarts = Restarts("training ranks", 1, print, lambda: None)
        self.cluster, self.patience = SimpleNamespace(wait_for_hosts=lambda patience: None), 0.0
        apart = algorithm.kl != "none" and not config.rl.use_integrated_worker
        self.actor = LocalTrain(config, "actor", reference=algorithm.kl != "none" and not apart)
        self.reference = LocalTrain(config, "reference") if apart else None
        self.critic = LocalTrain(config, "critic") if algorithm.advantage == "gae" else None
        model = placement.ModelConfig.from_args(placement.command_line(config, "actor"))
        self.rollout = LocalRollout(RolloutWorker(config, model, vocab_size, 1))
        self.manager = LocalManager(config, self.rollout.worker, RewardWorker(config))

    def finished(self, step: int) -> None:
        self.restarts.finished(step)

    def close(self) -> None:
        pass

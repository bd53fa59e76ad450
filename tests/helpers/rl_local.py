"""The trainer without Ray, as a program for `engine.Server`: every actor is an object of one process.

What is tested is the driver with real ranks, engines and rewards; `rl_ray.py` runs the same with real actors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state

from minimind_mcore.rl.config.load import resolve
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime import placement, trainer
from minimind_mcore.rl.runtime.batch import Batch
from minimind_mcore.rl.runtime.rank import Rank
from minimind_mcore.rl.runtime.supervise import Restarts
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


class LocalTrain:
    """A `TrainGroup` of this process."""

    def __init__(self, config: Config, role: Any, reference: bool = False) -> None:
        self.config, self.role, self.kept = config, role, reference

    def start(self, at: int | None = None) -> dict[str, Any]:
        if parallel_state.model_parallel_is_initialized():  # another role of this process did it
            parallel_state.destroy_model_parallel()
        self.rank = Rank(self.config, self.role, self.kept)
        return self.rank.load(at)

    def measure(self, batch: Batch, reference: bool = False) -> dict[str, torch.Tensor]:
        share = self.rank.measure(batch, reference)
        assert share is not None
        columns = {name: torch.zeros(len(batch), batch.width) for name in share.columns}
        for name, values in share.columns.items():
            columns[name][share.rows] = values
        return columns

    def update(self, batch: Batch, iteration: int, kl_coef: float | None = None) -> dict[str, float]:
        return self.rank.update(batch, iteration, kl_coef)

    def weights(self) -> list[Any]:
        return [self.rank.shards()]

    def save(self, iteration: int, consumed: int, state: dict[str, Any]) -> None:
        self.rank.save(iteration, consumed, state)


class LocalRollout:
    """A `RolloutGroup` of this process."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker

    def load(self, shards: list[Any]) -> Done:
        self.shards = shards
        self.worker.load(*shards)
        return Done()

    def check(self) -> list[str]:
        return self.worker.check(*self.shards)

    def generate(self, prompts: Any, n: int, draw: Any, seeds: Any) -> Callable[[], Any]:
        found = self.worker.generate(prompts, n, draw, seeds)
        return lambda: found


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
        worker = RewardWorker(config)
        self.rewards = SimpleNamespace(
            submit=lambda method, parts: Done(getattr(worker, method)(*parts[0])),
            run=lambda method, parts: [getattr(worker, method)(*parts[0])],
        )

    def finished(self, step: int) -> None:
        self.restarts.finished(step)

    def close(self) -> None:
        pass

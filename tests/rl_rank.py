"""A rank of a reinforcement-learning step, as a program for `engine.Server`: no Ray, saved rollouts.

It is given `--task FILE` (a torch file: the YAML tree and a batch) and writes `rank0.pt`: log-probabilities of the
actor and the reference, metrics of an update, log-probabilities after it, and every rank's shards.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def main(argv: Sequence[str]) -> None:
    from minimind_mcore.rl.batch import Batch
    from minimind_mcore.rl.config import resolve
    from minimind_mcore.rl.rank import Rank

    parser = argparse.ArgumentParser()
    parser.add_argument("--task")
    parser.add_argument("--output-dir", type=Path)
    args = parser.parse_args(argv)
    task = torch.load(args.task, weights_only=False)
    rank = Rank(resolve(task["tree"]), task.get("role", "actor"), reference=task.get("reference", True))
    rank.load()
    batch = Batch(**task["batch"])
    found: dict[str, Any] = {"before": gathered(rank.measure(batch)), "shards_before": gathered(rank.shards())}
    if rank.frozen:
        found["reference"] = gathered(rank.measure(batch, reference=True))
    found["metrics"] = [rank.update(batch, step) for step in range(1, task.get("updates", 1) + 1)]
    found["after"] = gathered(rank.measure(batch))
    found["shards"] = gathered(rank.shards())
    if dist.get_rank() == 0:
        torch.save(found, args.output_dir / "found.pt")
    from minimind_mcore.training import distributed

    distributed.finish()


def gathered(value: Any) -> list[Any]:
    """Of every rank."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere

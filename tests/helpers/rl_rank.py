"""A rank of a reinforcement-learning step, as a program for `engine.Server`: no Ray.

It is given `--task FILE` (a torch file with the YAML tree and a batch, or prompts to write one for) and writes
`found.pt`: what the ranks say of the batch before and after some updates, and the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helpers.rl_trees import N
from minimind_mcore.rl.algorithms.batches import mini_batches
from minimind_mcore.rl.config.load import resolve
from minimind_mcore.rl.runtime import batch as batches
from minimind_mcore.rl.runtime import weight_sync
from minimind_mcore.rl.runtime.batch import Batch
from minimind_mcore.rl.runtime.engines.decoder import DecoderEngine
from minimind_mcore.rl.runtime.engines.protocol import Response, RolloutSamplingParams
from minimind_mcore.rl.runtime.rank import Rank
from minimind_mcore.rl.runtime.sharding import Share, measured, trained
from minimind_mcore.training import distributed

DRAW = RolloutSamplingParams(max_tokens=8, temperature=0.8, top_k=50, top_p=0.95)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task")
    parser.add_argument("--output-dir", type=Path)
    args = parser.parse_args(argv)
    task = torch.load(args.task, weights_only=False)
    only_load = task.get("only_load", False)
    rank = Rank(resolve(task["tree"]), task.get("role", "actor"), reference=not only_load)
    rank.load()
    if only_load:
        distributed.finish()
        return
    weights = whole(rank)
    batch = Batch(**task["batch"]) if "batch" in task else write(rank, weights, task["prompts"])
    found: dict[str, Any] = {"batch": batch.state_dict(), "weights": weights, "adapters": adapters(rank)}
    place, division = rank.division()
    asked = measured(batch, division)[place]
    found["before"] = columns(rank.measure(asked), batch)
    found["reference"] = columns(rank.measure(asked, reference=True), batch)
    batch = dataclasses.replace(batch, ref_logp=found["reference"]["logp"])
    found["metrics"] = []
    rl = rank.config.rl
    for step in range(1, task.get("updates", 0) + 1):
        sizes = len(batch) // N, N, rl.mini_batch_size // N, rl.epochs
        orders = list(mini_batches(*sizes, rl.shuffle_mini_batch, division.seed + step))
        found["metrics"].append(rank.update(trained(batch, division, orders)[place], step))
    found["after"] = columns(rank.measure(asked), batch)
    found["weights_after"] = whole(rank)
    found["adapters_after"] = adapters(rank)
    if dist.get_rank() == 0:
        torch.save(found, args.output_dir / "found.pt")
    distributed.finish()


def gathered(value: Any) -> list[Any]:
    """Of every rank."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere


def whole(rank: Rank) -> dict[str, Tensor]:
    """The weights, joined as a rollout engine joins them."""
    version = rank.publish()
    parts = [gathered(rank.shards(version.number, names)) for names in version.buckets]
    return {name: tensor.clone() for part in parts for name, tensor in weight_sync.join(part).items()}


def adapters(rank: Rank) -> dict[str, Tensor]:
    """This rank's LoRA adapters."""
    from minimind_mcore.models.loading import whole_model_parameters

    return {name: p.detach().clone() for name, p in whole_model_parameters(rank.model) if ".lora_" in name}


def columns(share: Share | None, batch: Batch) -> dict[str, Tensor]:
    """What all ranks say together."""
    found: dict[str, Tensor] = {}
    for part in gathered(share):
        for name, values in part.columns.items() if part else ():
            whole = found.setdefault(name, torch.full((len(batch), batch.width), torch.nan))
            whole[part.rows, : values.shape[1]] = values
    return found


def _routes(found: Sequence[Response], keep: list[int], prompts: list[list[int]]) -> list[Any]:
    """Of the tokens that are kept."""
    rows = zip(found, keep, [prompt for prompt in prompts for _ in range(N)], strict=True)
    return [one.routes[: len(prompt) + k - 1] for one, k, prompt in rows if one.routes is not None]


def engine_with(rank_config: Any, weights: dict[str, Tensor], records: bool = False) -> DecoderEngine:
    engine = DecoderEngine(rank_config, rank_config.vocab_size, torch.float32, batch=64, records=records)
    engine.load_weights(weights.items())
    return engine


def write(rank: Rank, weights: dict[str, Tensor], prompts: list[list[int]]) -> Batch:
    """Responses of the rollout engine, with advantages of chance."""
    engine = engine_with(rank.training.architecture, weights, rank.config.minimind.router_replay)
    found = engine.generate(prompts, N, DRAW, list(range(len(prompts) * N)))
    lengths = torch.Generator().manual_seed(0)
    keep = torch.randint(2, 9, (len(found),), generator=lengths).tolist()  # as if ends had been drawn
    batch = batches.make(
        [prompt for prompt in prompts for _ in range(N)],
        [response.ids[:k] for response, k in zip(found, keep, strict=True)],
        [response.logp[:k] for response, k in zip(found, keep, strict=True)],
        [True] * len(found),
        [row // N for row in range(len(found))],
        routes=_routes(found, keep, prompts),
    )
    advantages = torch.randn(len(found), 1, generator=lengths) * batch.mask
    return dataclasses.replace(batch, rewards=torch.rand(len(found), generator=lengths), advantages=advantages)

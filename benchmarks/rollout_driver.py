"""What a step's responses cost the driver: CPU seconds, resident memory, and Ray's object store.

    python benchmarks/rollout_driver.py --tokenizer data/tokenizer
    python benchmarks/rollout_driver.py --tokenizer data/tokenizer --prompts 128 --tokens 512      # 1,024 responses

The rollout manager is the real one. Engines, reward workers and ranks are actors that return random values of the right
shapes. The first step is a warm-up. The CPU time covers all threads of the driver's process. The size of the object
store is the growth of /dev/shm, which no other program may use during the measurement.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

from minimind_mcore.inference.loading import load_tokenizer
from minimind_mcore.preprocess.indexed import IndexedWriter
from minimind_mcore.preprocess.tokenize import tokenizer_info
from minimind_mcore.rl.config.load import compose, resolve
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.rewards.rewards import Scores
from minimind_mcore.rl.runtime import cluster
from minimind_mcore.rl.runtime.engines.protocol import Response
from minimind_mcore.rl.runtime.rollouts import Position
from minimind_mcore.rl.runtime.sharding import Division, Shard, Share
from minimind_mcore.rl.runtime.supervise import ActorPool, Restarts
from minimind_mcore.rl.runtime.workers.manager import RolloutClient, start_manager

RANKS = 2


class Engine:
    """Responses of random ids."""

    def generate(self, prompts: list[list[int]], n: int, sampling: Any, seeds: list[int]) -> list[Response]:
        count = sampling.max_tokens
        numbers = np.random.default_rng(seeds[0] & 0xFFFF)
        ids = numbers.integers(300, 6000, (len(seeds), count), dtype=np.int32)
        return [Response(row.copy(), np.full(count, -1.0, np.float32), False) for row in ids]


class Judge:
    """Random scores."""

    def score(self, responses: list[str], *arguments: Any) -> Scores:
        scores = torch.rand(len(responses))
        return Scores(scores, {"random": scores})


class Trainer:
    """A rank that computes nothing."""

    def measure(self, shard: Shard) -> tuple[None, Share]:
        return None, Share(shard.rows, {"logp": torch.full_like(shard.batch.mask, -1.0)})

    def update(self, shard: Shard) -> int:
        return len(shard.batch)


def configuration(args: argparse.Namespace, folder: Path) -> Config:
    """A run with these prompts and responses, and its data."""
    numbers = np.random.default_rng(0)
    for name, length in (("input_ids", 64), ("labels", 4)):
        with IndexedWriter(folder / f"prompts_packed_{name}_document") as writer:
            rows = args.prompts * 2
            writer.add(numbers.integers(300, 6000, rows * length), np.full(rows, length))
    words = {
        "megatron_training.tokenizer_name_or_path": args.tokenizer,
        "megatron_training.data_path": folder / "prompts",
        "megatron_training.global_batch_size": args.prompts,
        "megatron_training.seq_length": 128 + args.tokens,
        "megatron_training.dataset_additional_keys": "[labels]",
        "rl_config.n_samples_per_prompt": args.responses,
        "rl_config.mini_batch_size": args.prompts,
        "generate_config.sampling_config.max_tokens": args.tokens,
        "generate_config.max_model_len": 128 + args.tokens,
        "generate_config.max_num_seqs": 256,
        "minimind.output_dir": folder,
    }
    return resolve(compose("grpo_minimind_tiny", [f"{key}={value}" for key, value in words.items()], device="cpu"))


def step(client: RolloutClient, ranks: list[Any], division: Division, number: int) -> None:
    """What `trainer.Trainer` does in a step, without a model."""
    client.generate(number)
    for column in ("ref_logp", "old_logp"):
        shards = client.shards(division)
        pairs = [rank.measure.options(num_returns=2).remote(shard) for rank, shard in zip(ranks, shards, strict=True)]
        ray.get([done for done, _ in pairs])
        client.ask("fill", column, *[share for _, share in pairs])
    client.ask("rewards")
    client.ask("compute_advantages", number, False)
    shards = client.shards(division, number)
    ray.get([rank.update.remote(shard) for rank, shard in zip(ranks, shards, strict=True)])


def main() -> None:
    """Print the costs of some steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    load_tokenizer(tokenizer_info(args.tokenizer))  # what is wrong with it is said here
    used, peak, over = psutil.disk_usage("/dev/shm").used, 0, threading.Event()
    joined = cluster.connect(print, cpus=4)

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.05):
            peak = max(peak, psutil.disk_usage("/dev/shm").used - used)

    with tempfile.TemporaryDirectory() as folder:
        config = configuration(args, Path(folder))
        restarts = Restarts("actors", 0, print, lambda: None)
        engine, judge = (ray.remote(kind).options(num_cpus=0) for kind in (Engine, Judge))
        pools: Any = {
            "rollout": ActorPool("rollout", lambda _: engine.remote(), 2, 600.0, restarts),
            "reward": ActorPool("reward", lambda _: judge.remote(), 2, 600.0, restarts),
        }
        client = RolloutClient(lambda: start_manager(config), pools, restarts)
        client.go_to(Position(), {})
        remote: Any = ray.remote(Trainer).options(num_cpus=0)
        ranks = [remote.remote() for _ in range(RANKS)]
        division = Division(RANKS, RANKS, 8, 8, 8, "token-mean", 1)
        process = psutil.Process()
        step(client, ranks, division, 1)
        resident, began = process.memory_info().rss, time.process_time()
        polling = threading.Thread(target=watch, daemon=True)
        polling.start()
        wall = time.perf_counter()
        for number in range(2, 2 + args.steps):
            step(client, ranks, division, number)
        seconds = (time.process_time() - began) / args.steps
        over.set()
        grown = process.memory_info().rss - resident
        rows = args.prompts * args.responses
        elapsed = (time.perf_counter() - wall) / args.steps
        print(f"{rows} responses of {args.tokens} tokens, {RANKS} ranks: {elapsed:.1f} s a step")
        print(f"driver: {seconds:.2f} CPU seconds a step, resident memory grew by {max(0, grown) / 2**20:.0f} MiB")
        print(f"object store: at most {peak / 2**20:.0f} MiB")
        client.close()
        joined.close()


if __name__ == "__main__":
    main()

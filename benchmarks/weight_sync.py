"""Measure time and object store memory of a weight transfer from training ranks to rollout engines.

    python benchmarks/weight_sync.py                       # 500M parameters in fp32, two ranks, two engines
    python benchmarks/weight_sync.py --bucket-mib 100000   # the same in a single bucket

The ranks are tensor-parallel and hold random weights without an optimizer. The engines copy the received weights into
their own tensors, and compare them. The last line is JSON. The exit status is 1 if a tensor differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from math import prod
from typing import Any

import ray
import torch
from ray._private.internal_api import node_stats

from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import get_preset
from minimind_mcore.models.weights import is_split, mcore_shapes, shard
from minimind_mcore.rl.runtime import weight_sync
from minimind_mcore.rl.runtime.hosts import SYSTEM_CONFIG
from minimind_mcore.rl.runtime.weight_sync import WeightPart, WeightShard, WeightVersion
from minimind_mcore.rl.runtime.workers.train import TrainWorker, WeightSource

MIB = 2**20


def tensor_of(config: ModelConfig, name: str) -> torch.Tensor:
    """Return a tensor of the whole model: random, but the same in every process."""
    shapes = mcore_shapes(config)
    generator = torch.Generator().manual_seed(list(shapes).index(name))
    return torch.randn(shapes[name], generator=generator)


class Weights:
    """Stands for a `Rank`: the tensors of one tensor-parallel rank."""

    def __init__(self, config: ModelConfig, rank: int, size: int) -> None:
        names = [name for name in mcore_shapes(config) if is_split(name) or rank == 0]
        self.own = {
            name: WeightPart(rank, size, shard(name, tensor_of(config, name), rank, size).contiguous())
            if is_split(name)
            else WeightPart(0, 1, tensor_of(config, name))
            for name in names
        }

    def shards(self, version: int, names: Sequence[str]) -> list[WeightShard]:
        return weight_sync.shards(self.own, names)


class TrainingRank(TrainWorker):
    """A training rank without training."""

    def __init__(self, config: ModelConfig, rank: int, size: int) -> None:
        super().__init__()
        self.rank = Weights(config, rank, size)  # type: ignore[assignment]


class RolloutEngine:
    """Copies weights into its own tensors."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.tensors = {name: torch.full(shape, torch.nan) for name, shape in mcore_shapes(config).items()}

    def load(self, source: WeightSource) -> None:
        for name, tensor in source.tensors():
            self.tensors[name].copy_(tensor)

    def wrong(self) -> list[str]:
        """Return the names of tensors that differ from the ranks'."""
        return [name for name, held in self.tensors.items() if not torch.equal(held, tensor_of(self.config, name))]


def peak_while(stop: threading.Event, found: list[int]) -> None:
    """Record the peak use of the object store, in bytes."""
    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    while not stop.is_set():
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)  # type: ignore[no-untyped-call]
        found[0] = max(found[0], stats.store_stats.object_store_bytes_used)
        time.sleep(0.005)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1280, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--bucket-mib", type=int, default=weight_sync.BUCKET_BYTES // MIB, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--engines", type=int, default=2, help="default: %(default)s")
    args = parser.parse_args(argv)
    hidden = args.hidden_size
    config = get_preset("minimind3").replace(
        hidden_size=hidden, num_layers=args.layers, num_heads=hidden // 64, num_kv_heads=hidden // 128, head_dim=64,
        ffn_hidden_size=4 * hidden,
    )  # fmt: skip
    size = sum(prod(shape) for shape in mcore_shapes(config).values()) * 4
    with tempfile.TemporaryDirectory(prefix="ws", dir="/tmp") as folder:
        ray.init(num_cpus=args.ranks + args.engines, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
                 object_store_memory=max(2 * size, 128 * MIB),
                 _system_config=SYSTEM_CONFIG)  # fmt: skip
        ranks: list[Any] = [ray.remote(TrainingRank).remote(config, rank, args.ranks) for rank in range(args.ranks)]
        engines: list[Any] = [ray.remote(RolloutEngine).remote(config) for _ in range(args.engines)]
        ray.get([actor.__ray_ready__.remote() for actor in (*ranks, *engines)])
        version = WeightVersion(1, weight_sync.buckets(config, 4, args.bucket_mib * MIB))
        stop, peak = threading.Event(), [0]
        watcher = threading.Thread(target=peak_while, args=(stop, peak))
        watcher.start()
        began = time.perf_counter()
        ray.get([engine.load.remote(WeightSource(ranks, version)) for engine in engines])
        seconds = time.perf_counter() - began
        stop.set()
        watcher.join()
        wrong = [name for names in ray.get([engine.wrong.remote() for engine in engines]) for name in names]
        ray.shutdown()
    found = {"weights_mib": size / MIB, "buckets": len(version.buckets), "bucket_mib": args.bucket_mib,
             "peak_mib": peak[0] / MIB, "seconds": seconds, "wrong": wrong}  # fmt: skip
    print(f"{size / MIB:.0f} MiB of weights in {len(version.buckets)} buckets: object store {peak[0] / MIB:.0f} MiB")
    print(json.dumps(found))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

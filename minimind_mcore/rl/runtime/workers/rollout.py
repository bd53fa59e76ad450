"""Rollout engines as Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import ray
import torch

from minimind_mcore import log
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import cpu, device
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime import weight_sync
from minimind_mcore.rl.runtime.cluster import Bundle, threads_of
from minimind_mcore.rl.runtime.engines.protocol import Response, RolloutEngine, RolloutSamplingParams
from minimind_mcore.rl.runtime.supervise import ActorPool, PoolCall, Restarts
from minimind_mcore.rl.runtime.weight_sync import WeightShard


class RolloutWorker:
    """One engine."""

    def __init__(self, config: Config, model: ModelConfig, vocab_size: int, threads: int) -> None:
        log.setup()
        torch.set_num_threads(threads)
        if device.current().kind == "cpu":
            cpu.tune()
        self.make = partial(build_engine, config, model, vocab_size)

    @cached_property
    def engine(self) -> RolloutEngine:
        """Made when first needed: an error would end an actor's `__init__`."""
        return self.make()

    def load(self, *parts: list[WeightShard]) -> None:
        """Take weights: the shards of every training rank."""
        self.engine.load_weights(weight_sync.join(parts))

    def check(self, *parts: list[WeightShard]) -> list[str]:
        """Snapshot, spoil every weight, load, compare; returns the names that are not what they were."""
        before = self.engine.weights()
        self.engine.perturb()
        self.load(*parts)
        after = self.engine.weights()
        return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]

    def generate(
        self, prompts: list[list[int]], n: int, sampling: RolloutSamplingParams, seeds: list[int]
    ) -> list[Response]:
        return self.engine.generate(prompts, n, sampling, seeds)


def build_engine(config: Config, model: ModelConfig, vocab_size: int) -> RolloutEngine:
    """The engine of `minimind.rollout_engine`."""
    if config.minimind.rollout_engine == "vllm":
        from minimind_mcore.rl.runtime.engines.vllm import VLLMEngine

        return VLLMEngine(config, model)
    from minimind_mcore.rl.runtime.engines.decoder import DecoderEngine

    dtype = getattr(torch, config.generate.dtype)
    return DecoderEngine(model, vocab_size, dtype, config.generate.max_num_seqs)


class RolloutGroup:
    """All engines: prompts are split over them; one that dies is replaced, given the weights, and asked again.

    Args:
        config: of the run.
        model: the architecture.
        vocab_size: ids that the tokenizer has.
        places: one for each engine.
        share: of a device that an engine takes.
        restarts: see `Restarts`.
    """

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        vocab_size: int,
        places: Sequence[Bundle],
        share: float,
        restarts: Restarts,
    ) -> None:
        gpus = {"num_gpus": share} if device.current().kind != "cpu" else {}
        self.shards: list[Any] = []

        def start(number: int) -> Any:
            remote: Any = ray.remote(RolloutWorker).options(**places[number].options(**gpus))
            actor = remote.remote(config, model, vocab_size, threads_of(places, number))
            if self.shards:
                actor.load.remote(*self.shards)  # answered before whatever it is asked next
            return actor

        self.pool = ActorPool("rollout", start, len(places), config.minimind.actor_timeout_s, restarts)

    def load(self, shards: list[Any]) -> PoolCall:
        """Begin to hand over weights (references of every rank's shards); asked now or later, all use them."""
        self.shards = shards
        return self.pool.submit("load", [tuple(shards)] * len(self.pool))

    def check(self) -> list[str]:
        """Spoil and restore the weights of every engine; returns the names that differ afterwards."""
        return [name for names in self.pool.everywhere("check", *self.shards) for name in names]

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: RolloutSamplingParams, seeds: Sequence[int]
    ) -> Callable[[], list[Response]]:
        """Begin to write `n` responses to each prompt; what is returned waits for them, in the prompts' order."""
        shares = [list(range(i, len(prompts), len(self.pool))) for i in range(len(self.pool))]
        shares = [share for share in shares if share]
        parts = [
            ([prompts[i] for i in s], n, sampling, [seeds[i * n + k] for i in s for k in range(n)]) for s in shares
        ]
        task = self.pool.submit("generate", parts)

        def finish() -> list[Response]:
            found: dict[int, Response] = {}
            for share, responses in zip(shares, task.result(), strict=True):
                rows = [i * n + k for i in share for k in range(n)]
                found |= dict(zip(rows, responses, strict=True))
            return [found[row] for row in range(len(prompts) * n)]

        return finish

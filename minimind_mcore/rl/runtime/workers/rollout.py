"""Rollout engines as Ray actors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import ray
import torch

from minimind_mcore import log
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import cpu, device
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime.cluster import Bundle, threads_of
from minimind_mcore.rl.runtime.engines.protocol import Response, RolloutEngine, RolloutSamplingParams
from minimind_mcore.rl.runtime.supervise import ActorPool, PoolCall, Restarts
from minimind_mcore.rl.runtime.workers.train import WeightSource


class RolloutWorker:
    """One engine."""

    def __init__(self, config: Config, model: ModelConfig, vocab_size: int, threads: int, number: int = 0) -> None:
        log.setup()
        torch.set_num_threads(threads)
        if device.current().kind == "cpu":
            cpu.tune()
        self.make = partial(build_engine, config, model, vocab_size, number)
        self.failure: Exception | None = RuntimeError("the rollout engine has no weights: they were not loaded yet")

    @cached_property
    def engine(self) -> RolloutEngine:
        """Made when first needed: an error would end an actor's `__init__`."""
        return self.make()

    def load(self, source: WeightSource) -> None:
        """Take the weights of the training ranks. After an error the engine generates nothing until a load succeeds."""
        try:
            self.engine.load_weights(source.tensors())
        except Exception as error:
            self.failure = error
            raise
        self.failure = None

    def _require_weights(self) -> None:
        """Raise the error of the last `load`: nobody waits for the load of an engine that replaces another."""
        if self.failure is not None:
            raise self.failure

    def check(self, source: WeightSource) -> list[str]:
        """Snapshot, spoil every weight, load, compare; returns the names that are not what they were."""
        self._require_weights()
        before = self.engine.weights()
        self.engine.perturb()
        self.load(source)
        after = self.engine.weights()
        return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]

    def generate(
        self, prompts: list[list[int]], n: int, sampling: RolloutSamplingParams, seeds: list[int]
    ) -> list[Response]:
        self._require_weights()
        return self.engine.generate(prompts, n, sampling, seeds)


def build_engine(config: Config, model: ModelConfig, vocab_size: int, number: int) -> RolloutEngine:
    """The engine of `minimind.rollout_engine`; `number` counts the engines."""
    dtype = getattr(torch, config.generate.dtype)
    if config.minimind.rollout_engine == "sglang":
        from minimind_mcore.rl.runtime.engines.sglang import SGLangEngine

        return SGLangEngine(config.minimind, config.minimind.sglang_base_url[number], model, vocab_size, dtype)
    if config.minimind.rollout_engine == "vllm":
        from minimind_mcore.rl.runtime.engines.vllm import VLLMEngine

        return VLLMEngine(config, model, vocab_size)
    from minimind_mcore.rl.runtime.engines.decoder import DecoderEngine

    records = config.minimind.router_replay
    return DecoderEngine(model, vocab_size, dtype, config.generate.max_num_seqs, records)


class RolloutGroup:
    """All engines; one that dies is replaced, and given the weights. The rollout manager calls them.

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
        self.source: WeightSource | None = None

        def start(number: int) -> Any:
            remote: Any = ray.remote(RolloutWorker).options(**places[number].options(**gpus))
            actor = remote.remote(config, model, vocab_size, threads_of(places, number), number)
            if self.source:
                actor.load.remote(self.source)  # comes before other calls, which raise its error if it fails
            return actor

        self.pool = ActorPool("rollout", start, len(places), config.minimind.actor_timeout_s, restarts)

    def load(self, source: WeightSource) -> PoolCall:
        """Begin to hand over weights; an engine that is replaced later gets them too."""
        self.source = source
        return self.pool.submit("load", [(source,)] * len(self.pool))

    def check(self) -> list[str]:
        """Spoil and restore the weights of every engine; returns the names that differ afterwards."""
        return [name for names in self.pool.everywhere("check", self.source) for name in names]

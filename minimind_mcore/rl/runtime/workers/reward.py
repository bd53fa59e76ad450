"""Rewards as a Ray actor, with its own pool of processes for what may take for ever."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import ray

from minimind_mcore import log
from minimind_mcore.errors import UserError
from minimind_mcore.rl.config.objective import overlong_lengths
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.rewards.reward_model import RewardModel
from minimind_mcore.rl.rewards.rewards import Overlong, Rewards, Scores
from minimind_mcore.rl.runtime.supervise import ActorPool, Restarts


class RewardWorker:
    """Scores responses. What it does so with is made when first needed: an error would end an actor's `__init__`."""

    def __init__(self, config: Config) -> None:
        log.setup()
        self.config = config

    @cached_property
    def rewards(self) -> Rewards:
        """The rewards that the YAML names, with their model."""
        return build(self.config, reward_model(self.config))

    def prepare(self) -> None:
        """Load what there is to load."""
        self.rewards  # noqa: B018

    def score(
        self, responses: list[str], labels: list[str], messages: list[list[dict[str, str]]], more: dict[str, Any]
    ) -> Scores:
        """Score responses; `messages` are for a reward model, `more` are further arguments of `Rewards.score`."""
        return self.rewards.score(responses, labels, messages=messages, **more)


def reward_model(config: Config) -> RewardModel | None:
    """The reward model that the YAML names, if it does.

    Raises:
        UserError: it cannot be loaded, or is none.
    """
    ours = config.minimind
    if not ours.reward_model:
        return None
    return RewardModel(
        ours.reward_model, limit=ours.reward_model_range, trust_remote_code=ours.reward_model_trust_remote_code
    )


def build(config: Config, model: RewardModel | None = None) -> Rewards:
    """The rewards that the YAML names, with its reward model if that is given.

    Raises:
        UserError: an unknown verifier, or one that cannot be imported; a reward model that is no directory of one.
    """
    rl, ours = config.rl, config.minimind
    if ours.reward_model and not (Path(ours.reward_model) / "config.json").is_file():
        raise UserError(f"minimind.reward_model: {ours.reward_model} has no config.json; expected a model's directory")
    longest, buffer = overlong_lengths(config)
    penalty = Overlong(longest, buffer, rl.overlong_buffer_penalty_factor) if buffer else None
    return Rewards(
        config.reward_names,
        config.reward_weights,
        timeout=rl.verifier_timeout,
        parallel=rl.verifier_parallel,
        max_failures=ours.reward_failure_limit,
        overlong=penalty,
        model=model,
        model_weight=ours.reward_model_weight,
        columns=[name for name in config.actor.dataset_additional_keys if name != "labels"],
    )


def reward_pool(config: Config, restarts: Restarts) -> ActorPool:
    """`minimind.reward_workers` actors, spread over the hosts; `verifier_parallel` counts the processes of each."""
    build(config).close()  # here an unknown name is the user's error, in the actor a death
    remote = ray.remote(RewardWorker).options(num_cpus=0, scheduling_strategy="SPREAD")
    ours = config.minimind
    count = ours.reward_workers
    pool = ActorPool("reward", lambda number: remote.remote(config), count, ours.actor_timeout_s, restarts)
    if ours.reward_model:
        pool.everywhere("prepare")  # one that cannot be loaded is the user's error before the first step
    return pool

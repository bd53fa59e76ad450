"""Who does what, and where: the training ranks, the rollout engines and the rewards of a run, on the cluster."""

from __future__ import annotations

from typing import Any

from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import device
from minimind_mcore.rl.algorithms.table import Algorithm
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime import supervise
from minimind_mcore.rl.runtime.cluster import Cluster, connect, spread, where
from minimind_mcore.rl.runtime.metrics import say
from minimind_mcore.rl.runtime.rank import command_line
from minimind_mcore.rl.runtime.supervise import ActorPool, Restarts
from minimind_mcore.rl.runtime.workers.manager import Kind, RolloutClient, start_manager
from minimind_mcore.rl.runtime.workers.reward import reward_pool
from minimind_mcore.rl.runtime.workers.rollout import RolloutGroup
from minimind_mcore.rl.runtime.workers.train import TrainGroup


class WorkerGroups:
    """The actors of a run.

    The ranks of the actor and the rollout engines share devices and work in turn. With `minimind.rollout_resource` the
    engines have devices of their own. The actor's ranks hold the reference model. With `use_integrated_worker: false`
    it has ranks and devices of its own.

    Args:
        config: of the run.
        algorithm: what is optimised.
        vocab_size: ids that the tokenizer has.

    Raises:
        UserError: the cluster does not have what the run needs.
    """

    def __init__(self, config: Config, algorithm: Algorithm, vocab_size: int) -> None:
        rl, kl = config.rl, algorithm.kl != "none"
        apart, critic = kl and not rl.use_integrated_worker, algorithm.advantage == "gae"
        self.patience, most, world = config.minimind.cluster_wait_s, config.minimind.max_restarts, devices(rl, "actor")
        own_engines = config.rollout_engines if config.minimind.rollout_resource else 0
        # Errors of the flags are raised before any process starts.
        model = ModelConfig.from_args(command_line(config, "actor"))
        self.cluster: Cluster = connect(say, cpus=world + (devices(rl, "reference") if apart else 0) + own_engines)
        try:
            cpus = {"CPU": float(rl.num_cpus_for_placement_group)}
            bundle = cpus if device.current().kind == "cpu" else {"GPU": 1.0, **cpus}
            self.places = self.cluster.reserve(world, bundle, self.patience, "the actor (rl_config.actor_resource)")
            say(f"actor: {where(self.places)}")
            share = 0.3 if critic else 0.5
            self.actor = TrainGroup(config, "actor", self.places, share, reference=kl and not apart)
            self.reference: TrainGroup | None = None
            if apart:
                what = "the reference (rl_config.reference_resource)"
                own = self.cluster.reserve(devices(rl, "reference"), bundle, self.patience, what)
                self.reference = TrainGroup(config, "reference", own, 1.0)
            self.critic = TrainGroup(config, "critic", self.places, share) if critic else None
            self.restarts = Restarts("training ranks", most, say, self._wait)
            if own_engines:
                what = "the group of rollout engines (minimind.rollout_resource)"
                engines = self.cluster.reserve(own_engines, bundle, self.patience, what, "SPREAD")
                say(f"rollout engines: {where(engines)}")
            else:
                engines = spread(self.places)[: config.rollout_engines]
            restarts = Restarts("rollout actors", most, say, self._wait_for_ranks)
            self.rollout = RolloutGroup(config, model, vocab_size, engines, 1.0 if own_engines else 0.4, restarts)
            self.rewards: ActorPool = reward_pool(config, Restarts("reward actors", most, say, self._wait))
            pools: dict[Kind, ActorPool] = {"rollout": self.rollout.pool, "reward": self.rewards}
            restarts = Restarts("rollout manager", most, say, self._wait)
            self.manager = RolloutClient(lambda: start_manager(config), pools, restarts)
        except BaseException:
            self.cluster.close()
            raise

    def _wait(self) -> None:
        self.cluster.wait_for_hosts(self.patience)

    def _wait_for_ranks(self) -> None:
        """An engine is replaced only where there are ranks to give it weights: `Lost` says if there are not."""
        self._wait()
        supervise.require_alive(self.actor.actors, self.actor.names)

    def start(self) -> dict[str, Any]:
        """Start (again) all training ranks; returns where the actor's checkpoint is: see `Rank.load`."""
        self._wait()
        found = self.actor.start()
        for group in (self.reference, self.critic):
            if group is not None:
                group.start(found["iteration"])
        return found

    def finished(self, step: int) -> None:
        """A step is done: restarts are counted from the furthest one on."""
        for restarts in (self.restarts, self.rollout.pool.restarts, self.rewards.restarts, self.manager.restarts):
            restarts.finished(step)

    def training(self) -> list[TrainGroup]:
        """The groups that learn."""
        return [group for group in (self.actor, self.critic) if group is not None]

    def close(self) -> None:
        """End everything that this run started."""
        for group in (self.actor, self.reference, self.critic):
            if group is not None:
                group.stop()
        self.manager.close()
        self.rollout.pool.close()
        self.rewards.close()
        self.cluster.close()


def devices(rl: Any, role: str) -> int:
    """Return the number of devices that `actor_resource` and the like ask for."""
    return int(getattr(rl, f"{role}_resource").num_npus)

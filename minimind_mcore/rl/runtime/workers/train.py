"""The ranks of a model as Ray actors, and their group. If one rank dies, the whole group starts again."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from minimind_mcore import log
from minimind_mcore.platform import device
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime import supervise, weight_sync
from minimind_mcore.rl.runtime.cluster import Bundle, threads_of
from minimind_mcore.rl.runtime.sharding import Division
from minimind_mcore.rl.runtime.supervise import collect
from minimind_mcore.rl.runtime.weight_sync import IN_FLIGHT, WeightVersion


def own_address() -> str:
    """Return the address of this host in the Ray cluster."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


class TrainWorker:
    """One training rank. It reports its address, joins the process group, and then runs the methods of `Rank`."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, int], Any] = {}  # object references of the last requested buckets

    def where(self) -> tuple[str, int]:
        """Open a TCP store and return its address and port. The group uses the store of its rank 0 as rendezvous."""
        address = own_address()
        # The store listens from now on. With a port that was only chosen here and opened later, another program took
        # the port in between. `start` makes torch use this store, as torchrun does.
        self._meeting = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return address, int(self._meeting.port)

    def start(
        self,
        config: Config,
        role: Any,
        reference: bool,
        place: tuple[int, int],
        rendezvous: tuple[str, int],
        threads: int,
    ) -> None:
        """Join the group as rank `place[0]` of `place[1]`."""
        log.setup()
        rank, world = place
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK="0",  # Ray shows an actor only its own device
            MASTER_ADDR=rendezvous[0],
            MASTER_PORT=str(rendezvous[1]),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        device.use_interface(own_address())
        torch.set_num_threads(threads)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        from minimind_mcore.rl.runtime.rank import Rank

        self.rank = Rank(config, role, reference)

    def call(self, method: str, *arguments: Any, acknowledge: bool = False) -> Any:
        """Call a method of the rank. With `acknowledge`, return (None, result): two Ray objects with num_returns=2, so
        that the caller can wait for errors without fetching the result."""
        found = getattr(self.rank, method)(*arguments)
        return (None, found) if acknowledge else found

    def bucket(self, weights: WeightVersion, number: int) -> list[Any]:
        """Put this rank's shards of a bucket into the object store once, and return the reference to every engine.

        The reference is in a list, because Ray would replace a bare reference by the object.
        """
        key = (weights.number, number)
        if key not in self._buckets:
            found = self.rank.shards(weights.number, weights.buckets[number])
            while len(self._buckets) >= IN_FLIGHT:
                del self._buckets[next(iter(self._buckets))]
            self._buckets[key] = ray.put(found)
        return [self._buckets[key]]


@dataclass(frozen=True)
class PerRank:
    """An argument that differs by data-parallel rank."""

    values: list[Any]


@dataclass(frozen=True)
class WeightSource:
    """One version of the weights, which stays on the training ranks until an engine asks for it.

    Attributes:
        ranks: the actors that hold the weights.
        version: number of the version, and its buckets.
    """

    ranks: list[Any]
    version: WeightVersion

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the whole megatron-core model. They share the memory of the object store.

        Raises:
            RayError: a rank died.
        """
        count = len(self.version.buckets)
        asked = deque[list[Any]]()
        for number in range(count + IN_FLIGHT - 1):
            if number < count:
                asked.append([rank.bucket.remote(self.version, number) for rank in self.ranks])
            if number >= IN_FLIGHT - 1:
                given = ray.get([reference for [reference] in ray.get(asked.popleft())])
                yield from weight_sync.join(given).items()
                del given  # frees the bucket before `ray.get` waits for the next one


class TrainGroup:
    """All ranks of one model.

    Args:
        config: configuration of the run.
        role: "actor", "reference" or "critic".
        places: one bundle of the placement group for each rank.
        share: fraction of a device that a rank takes.
        reference: also hold the weights of the reference model.
    """

    def __init__(
        self, config: Config, role: str, places: Sequence[Bundle], share: float, reference: bool = False
    ) -> None:
        self.config, self.role, self.places, self.reference = config, role, list(places), reference
        self.timeout = config.minimind.actor_timeout_s
        self.share = share
        self.names = [f"{role} rank {rank}" for rank in range(len(self.places))]
        self.actors: list[Any] = []
        self.ranks: list[int] = []  # data-parallel rank of each actor
        self.division: Division

    def start(self, at: int | None = None) -> dict[str, Any]:
        """Start the ranks and load the weights of iteration `at`. Return the result of `Rank.load`."""
        self.stop()
        gpus = {"num_gpus": self.share} if device.current().kind != "cpu" else {}
        remote = ray.remote(TrainWorker)
        self.actors = [remote.options(**place.options(**gpus)).remote() for place in self.places]
        # If Ray has not noticed yet that the node of a bundle is lost, the actor waits until Ray replaces the bundle.
        patience = self.config.minimind.cluster_wait_s
        rendezvous = collect([a.where.remote() for a in self.actors], self.names, "to start", patience)[0]
        world = len(self.actors)
        refs = [
            actor.start.remote(
                self.config, self.role, self.reference, (rank, world), rendezvous, threads_of(self.places, rank)
            )
            for rank, actor in enumerate(self.actors)
        ]
        collect(refs, self.names, "start", self.timeout)
        found: dict[str, Any] = self.call("load", at)[0]
        places = self.call("division")
        self.ranks, self.division = [place for place, _ in places], places[0][1]
        return found

    def submit(self, method: str, *arguments: Any, acknowledge: bool = False) -> list[Any]:
        """Start a call of a method of `Rank` on every rank. Return the references to the results.

        Args:
            method: name of the method.
            arguments: arguments, equal for all ranks except those in `PerRank`.
            acknowledge: return two references for each rank, the first one to None (see `TrainWorker.call`).
        """
        found = []
        for number, actor in enumerate(self.actors):
            own = [one.values[self.ranks[number]] if isinstance(one, PerRank) else one for one in arguments]
            call = actor.call.options(num_returns=2) if acknowledge else actor.call
            found.append(call.remote(method, *own, **({"acknowledge": True} if acknowledge else {})))
        return found

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `Rank` on every rank, and return what the ranks return.

        Raises:
            Lost: a rank died or does not answer. The group must `start` again.
            UserError: a rank raised it.
        """
        return collect(self.submit(method, *arguments), self.names, f"{self.role}: {method}", self.timeout)

    def measure(self, shards: list[Any], reference: bool = False) -> list[Any]:
        """Call `Rank.measure` with the shards of each data-parallel rank. Return references to the results."""
        found = self.submit("measure", PerRank(shards), reference, acknowledge=True)
        collect([done for done, _ in found], self.names, f"{self.role}: measure", self.timeout)
        return [share for _, share in found]

    def update(self, shards: list[Any], iteration: int, kl_coef: float | None = None) -> dict[str, float]:
        """Train on the shards of each data-parallel rank (`Rank.update`). Return the metrics."""
        found: dict[str, float] = self.call("update", PerRank(shards), iteration, kl_coef)[0]
        return found

    def weights(self, keep: bool = False) -> WeightSource:
        """Return the current weights for the engines. `keep` copies them, so that later updates do not change them."""
        return WeightSource(self.actors, self.call("publish", keep)[0])

    def save(self, iteration: int, consumed: int, state: dict[str, Any]) -> None:
        """Write a checkpoint on all ranks (`Rank.save`)."""
        self.call("save", iteration, consumed, state)

    def stop(self) -> None:
        """Stop the ranks' processes."""
        supervise.stop(self.actors)
        self.actors = []

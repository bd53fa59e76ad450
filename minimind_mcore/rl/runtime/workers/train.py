"""Ranks of a trained model as Ray actors, and the group of them: if one dies, all begin anew."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

import ray
import torch

from minimind_mcore import log
from minimind_mcore.platform import device
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime import supervise
from minimind_mcore.rl.runtime.batch import Batch
from minimind_mcore.rl.runtime.cluster import Bundle, threads_of
from minimind_mcore.rl.runtime.supervise import collect


def own_address() -> str:
    """By which the cluster knows this host."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


class TrainWorker:
    """One training rank. It reports its address, joins the process group, and then runs the methods of `Rank`."""

    def where(self) -> tuple[str, int]:
        """Address of this host, and a port of it that stays reserved until this rank joins the group."""
        address = own_address()
        self._reserved = socket.socket()
        self._reserved.bind((address, 0))
        return address, int(self._reserved.getsockname()[1])

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
            LOCAL_RANK="0",  # Ray shows an actor its own device alone
            MASTER_ADDR=rendezvous[0],
            MASTER_PORT=str(rendezvous[1]),
        )
        device.use_interface(own_address())
        torch.set_num_threads(threads)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        from minimind_mcore.rl.runtime.rank import Rank  # seconds, in which another program could take the port

        self._reserved.close()
        self.rank = Rank(config, role, reference)

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of the rank."""
        return getattr(self.rank, method)(*arguments)


class TrainGroup:
    """All ranks of one model.

    Args:
        config: of the run.
        role: "actor", "reference" or "critic".
        places: one for each rank.
        share: of a device that a rank takes.
        reference: hold the reference's weights too.
    """

    def __init__(
        self, config: Config, role: str, places: Sequence[Bundle], share: float, reference: bool = False
    ) -> None:
        self.config, self.role, self.places, self.reference = config, role, list(places), reference
        self.timeout = config.minimind.actor_timeout_s
        self.share = share
        self.names = [f"{role} rank {rank}" for rank in range(len(self.places))]
        self.actors: list[Any] = []

    def start(self, at: int | None = None) -> dict[str, Any]:
        """Start the ranks and load their weights (of iteration `at`); returns what `Rank.load` does."""
        self.stop()
        gpus = {"num_gpus": self.share} if device.current().kind != "cpu" else {}
        remote = ray.remote(TrainWorker)
        self.actors = [remote.options(**place.options(**gpus)).remote() for place in self.places]
        # A place may have been lost and not yet be known to be: an actor then waits for it.
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
        return found

    def submit(self, method: str, *arguments: Any) -> list[Any]:
        """Begin a call of `Rank`'s method on every rank; returns the references of what they return."""
        return [actor.call.remote(method, *arguments) for actor in self.actors]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `Rank` on every rank, and return what the ranks return.

        Raises:
            Lost: a rank died, or does not answer: `start` again.
            UserError: as a rank raised it.
        """
        return collect(self.submit(method, *arguments), self.names, f"{self.role}: {method}", self.timeout)

    def measure(self, batch: Batch, reference: bool = False) -> dict[str, torch.Tensor]:
        """Columns [rows, T] of a batch: see `Rank.measure`."""
        columns: dict[str, torch.Tensor] = {}
        for share in self.call("measure", ray.put(batch), reference):
            for name, values in share.columns.items() if share else ():
                whole = columns.setdefault(name, torch.zeros(len(batch), batch.width))
                whole[share.rows] = values
        return columns

    def update(self, batch: Batch, iteration: int, kl_coef: float | None = None) -> dict[str, float]:
        """Train on a batch: see `Rank.update`."""
        found: dict[str, float] = self.call("update", ray.put(batch), iteration, kl_coef)[0]
        return found

    def weights(self) -> list[Any]:
        """References of the shards of every rank, which stay where they are."""
        return self.submit("shards")

    def save(self, iteration: int, consumed: int, state: dict[str, Any]) -> None:
        """Write a checkpoint: see `Rank.save`."""
        self.call("save", iteration, consumed, state)

    def stop(self) -> None:
        """End the ranks."""
        supervise.stop(self.actors)
        self.actors = []

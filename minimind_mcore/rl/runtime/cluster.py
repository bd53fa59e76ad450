"""The Ray cluster: join it or start one, wait for what the run needs, and place the actors.

`ray start --head` on one host and `ray start --address` on others make a cluster; a run joins the one that
RAY_ADDRESS names, or that was started on this host. Where there is none it starts its own for as long as it lasts.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from minimind_mcore import log
from minimind_mcore.errors import UserError
from minimind_mcore.paths import CHECKOUT
from minimind_mcore.platform import cpu
from minimind_mcore.rl.runtime.hosts import Patience, require_ray

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 2 << 30  # of a cluster that is started here: the weights of two steps, and batches

RAYLET_ENDED = (
    "Ray's process of this host (raylet) has ended, and this run cannot go on without it. Nothing of the step that was "
    "under way is saved; checkpoints are whole, and the same command goes on from the last. Ray's logs say why it "
    "ended (session_latest/logs in RAY_TMPDIR, or in /tmp/ray)"
)

Say = Callable[[str], None]


@dataclass
class Cluster:
    """A cluster in use.

    Attributes:
        own: it was started here and ends with the run.
        say: where progress is told.
        groups: placement groups to give back.
        hosts: addresses of the hosts where they are.
        node: Ray's id of this host, to which the driver is bound for as long as it runs.
        waiting: a context in which to wait for hosts: a signal then ends the program at once.
        closed: the run does not need the cluster any more.
    """

    own: bool
    say: Say
    groups: list[Any] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)
    node: str = field(default_factory=lambda: str(ray.get_runtime_context().get_node_id()))
    waiting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    closed: threading.Event = field(default_factory=threading.Event)

    def reserve(self, count: int, bundle: dict[str, float], patience: float, what: str) -> list[Bundle]:
        """So many places of the same resources, on as few hosts as possible; those of a host are neighbours.

        Raises:
            UserError: the cluster does not have them within `patience` seconds.
        """
        group = placement_group([dict(bundle)] * count, strategy="PACK")
        self.groups.append(group)
        group.wait(1)  # the places that are free are there at once
        self._wait([group], lambda: what, self._patience(patience))
        nodes = placement_group_table(group)["bundles_to_node_id"]
        # This host's are the first: rank 0 is beside the driver.
        hosts = sorted(dict.fromkeys(nodes.values()), key=lambda node: node != self.node)
        order = sorted(range(count), key=lambda i: (hosts.index(nodes[i]), i))
        api: Any = ray
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in api.nodes()}
        self.hosts |= {addresses[node] for node in nodes.values()}
        return [Bundle(group, i, nodes[i], addresses[nodes[i]]) for i in order]

    def _wait(self, groups: Sequence[Any], what: Callable[[], str], patience: Patience, advice: str = "") -> None:
        while missing := [group for group in groups if placement_group_table(group)["state"] != "CREATED"]:
            self._require_own_node()
            patience.more(self._missing(missing[0].bundle_count, missing[0].bundle_specs[0], what()), advice)

    def wait_for_hosts(self, patience: float) -> None:
        """Wait until all places are there again, after a host was lost.

        Raises:
            UserError: they are not within `patience` seconds, or this host's own part of the cluster has ended.
        """
        with self.waiting():
            waits, advice = self._patience(patience), "checkpoints are whole: the same command goes on"
            self._wait(self.groups, lambda: f"a host was lost{self._gone()}; the run", waits, advice)

    def _patience(self, seconds: float) -> Patience:
        return Patience(seconds, None, "waiting for the cluster", self.say)

    def _require_own_node(self) -> None:
        """Refuse to wait where this host's raylet has ended: a driver cannot join another one.

        Raises:
            UserError: it has.
        """
        api: Any = ray
        if any(node["NodeID"] == self.node and not node["Alive"] for node in api.nodes()):
            raise UserError(RAYLET_ENDED)

    def _gone(self) -> str:
        api: Any = ray
        gone = self.hosts - {node["NodeManagerAddress"] for node in api.nodes() if node["Alive"]}
        return f" ({', '.join(sorted(gone))})" if gone else ""

    def _missing(self, count: int, bundle: dict[str, float], what: str) -> str:
        """What there is, and what is needed."""
        api: Any = ray
        total, free = api.cluster_resources(), api.available_resources()
        wanted = {name: amount * count for name, amount in bundle.items()}
        nodes = [node for node in api.nodes() if node["Alive"]]
        facts = ", ".join(
            f"{name}: {amount:g} wanted, {total.get(name, 0):g} there, {free.get(name, 0):g} of them free"
            for name, amount in wanted.items()
        )
        return (
            f"{what} needs {count} x {bundle}; {facts}, on {len(nodes)} host{'s' * (len(nodes) != 1)}. Start Ray on "
            "more hosts (grpo_minimind_worker.sh, or `ray start --address=HEAD:PORT`), or ask for less "
            "(rl_config.actor_resource)"
        )

    def close(self) -> None:
        """Give back what was reserved; a cluster of one's own ends."""
        for group in self.groups:
            remove_placement_group(group)
        self.groups = []
        self.closed.set()
        if self.own:
            ray.shutdown()


@dataclass(frozen=True)
class Bundle:
    """Where an actor runs: a bundle of a placement group, and its host (as it was when it was reserved)."""

    group: Any
    index: int
    node: str
    address: str

    def options(self, **resources: float) -> dict[str, Any]:
        """Ray's options of an actor there."""
        strategy = PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=self.index, placement_group_capture_child_tasks=False
        )
        return {"scheduling_strategy": strategy, "num_cpus": 0, **resources}


def threads_of(places: Sequence[Bundle], number: int) -> int:
    """The threads of a process, which shares the cores of its host with the others there."""
    beside = sum(place.node == places[number].node for place in places)
    return max(1, cpu.usable_cores() // beside)


def where(places: Sequence[Bundle]) -> str:
    """Which ranks are on which host, for messages."""
    hosts: dict[str, list[str]] = {}
    for rank, place in enumerate(places):
        hosts.setdefault(place.address, []).append(str(rank))
    return "; ".join(f"rank{'s' * (len(of) > 1)} {', '.join(of)} on {address}" for address, of in hosts.items())


def connect(say: Say, environment: dict[str, str] | None = None, cpus: int = 1) -> Cluster:
    """Join the cluster of this host or of RAY_ADDRESS, or start one here.

    Args:
        say: where progress is told.
        environment: variables of every actor.
        cpus: that a cluster started here has at least, whatever the host has.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer, or something that is not Ray.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))}
    variables |= {log.SETTING: os.environ[log.SETTING]} if log.SETTING in os.environ else {}
    common: dict[str, Any] = {
        "runtime_env": {"env_vars": variables | (environment or {})},
        "log_to_driver": True,
        "logging_level": logging.WARNING,
    }
    if ray.is_initialized():
        return Cluster(False, say)
    asked = os.environ.get("RAY_ADDRESS")
    if asked != "local":
        if asked and asked != "auto" and "://" not in asked:
            require_ray(asked, f"RAY_ADDRESS={asked}")
        try:
            ray.init(address=asked or "auto", **common)
            say(f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}")
            return _watched(Cluster(False, say))
        except ConnectionError as error:
            if asked:
                raise UserError(f"RAY_ADDRESS={asked}: no Ray cluster answers there; start it, or unset it") from error
    ray.init(
        address="local",
        num_cpus=max(cpus, cpu.usable_cores()),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=os.environ.get("RAY_TMPDIR"),
        **common,
    )
    return _watched(Cluster(True, say))


def _watched(cluster: Cluster) -> Cluster:
    """End this program with a sentence when this host's raylet ends. Ray 2.60 ends a driver without a reason."""
    flag = f"--node_id={cluster.node}"
    found = [p for p in psutil.process_iter(["cmdline"]) if flag in (p.info["cmdline"] or [])]
    if found and hasattr(os, "pidfd_open"):
        atexit.register(cluster.closed.set)  # before Ray's own, which ends the raylet
        watch_process(found[0].pid, cluster.closed)
    return cluster


def watch_process(process: int, closed: threading.Event) -> None:
    """Start a thread that ends this program when the raylet `process` has ended, unless `closed` is set."""

    def watch(descriptor: int) -> None:
        select.select([descriptor], [], [])
        if not closed.is_set():
            logger.error(RAYLET_ENDED)
            os._exit(1)

    threading.Thread(target=watch, args=(os.pidfd_open(process),), name="raylet", daemon=True).start()

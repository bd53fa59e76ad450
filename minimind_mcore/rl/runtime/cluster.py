"""The Ray cluster: join or start one, wait for the resources of the run, and reserve them.

`ray start --head` on one host and `ray start --address` on others form a cluster. A run joins the cluster of
RAY_ADDRESS, or the cluster that was started on this host. Without either it starts a cluster, which ends with the run.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import threading
from collections import Counter
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
from minimind_mcore.platform import processor
from minimind_mcore.rl.runtime.hosts import SYSTEM_CONFIG, Patience, require_ray

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 2 << 30  # of a cluster started by the run: enough for a few buckets of weights, and batches

RAYLET_ENDED = (
    "The Ray process of this host (raylet) has ended, and this run cannot continue without it. The step in "
    "progress is lost; saved checkpoints are complete, and the same command resumes from the last one. Ray's logs "
    "show the reason (session_latest/logs in RAY_TMPDIR, or in /tmp/ray)"
)

Say = Callable[[str], None]


@dataclass
class Cluster:
    """A Ray cluster that the run has joined or started.

    Attributes:
        own: the run started the cluster and ends it.
        say: prints progress.
        groups: placement groups to remove at the end.
        hosts: addresses of the hosts of the placement groups.
        node: Ray's id of this host. The driver cannot move to another host.
        waiting: context manager around waits for hosts, in which a signal ends the program at once.
        closed: set when the run no longer needs the cluster.
    """

    own: bool
    say: Say
    groups: list[Any] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)
    node: str = field(default_factory=lambda: str(ray.get_runtime_context().get_node_id()))
    waiting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    closed: threading.Event = field(default_factory=threading.Event)

    def reserve(
        self, count: int, bundle: dict[str, float], patience: float, what: str, strategy: str = "PACK"
    ) -> list[Bundle]:
        """Reserve `count` equal bundles. Bundles of one host are neighbours in the result.

        Args:
            count: number of bundles.
            bundle: resources of a bundle.
            patience: seconds to wait for free resources.
            what: what the bundles are for and the key that sets their number, for messages.
            strategy: "PACK": on as few hosts as possible. "SPREAD": on as many.

        Raises:
            UserError: the cluster does not have the resources within `patience` seconds.
        """
        group = placement_group([dict(bundle)] * count, strategy=strategy)
        self.groups.append(group)
        group.wait(1)  # free resources are assigned at once
        self._wait([group], lambda: what, self._patience(patience))
        nodes = placement_group_table(group)["bundles_to_node_id"]
        # This host's bundles come first, so that rank 0 runs next to the driver.
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
        """Wait after the loss of a host until all bundles are available again.

        Raises:
            UserError: they are not within `patience` seconds, or the raylet of this host has ended.
        """
        with self.waiting():
            waits, advice = self._patience(patience), "saved checkpoints are complete: the same command resumes"
            self._wait(self.groups, lambda: f"a host was lost{self._gone()}; the run", waits, advice)

    def _patience(self, seconds: float) -> Patience:
        return Patience(seconds, None, "waiting for the cluster", self.say)

    def _require_own_node(self) -> None:
        """Check that the raylet of this host runs: a driver cannot connect to another one.

        Raises:
            UserError: the raylet has ended.
        """
        api: Any = ray
        if any(node["NodeID"] == self.node and not node["Alive"] for node in api.nodes()):
            raise UserError(RAYLET_ENDED)

    def _gone(self) -> str:
        api: Any = ray
        gone = self.hosts - {node["NodeManagerAddress"] for node in api.nodes() if node["Alive"]}
        return f" ({', '.join(sorted(gone))})" if gone else ""

    def _missing(self, count: int, bundle: dict[str, float], what: str) -> str:
        """Return which resources are needed and which the cluster has."""
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
            "more hosts (grpo_minimind_worker.sh, or `ray start --address=HEAD:PORT`), or ask for less"
        )

    def close(self) -> None:
        """Remove the placement groups, and end a cluster that the run started."""
        for group in self.groups:
            remove_placement_group(group)
        self.groups = []
        self.closed.set()
        if self.own:
            ray.shutdown()


@dataclass(frozen=True)
class Bundle:
    """A bundle of a placement group, in which an actor runs, and its host at the time of the reservation."""

    group: Any
    index: int
    node: str
    address: str

    def options(self, **resources: float) -> dict[str, Any]:
        """Return Ray's options for an actor in this bundle."""
        strategy = PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=self.index, placement_group_capture_child_tasks=False
        )
        return {"scheduling_strategy": strategy, "num_cpus": 0, **resources}


def spread(places: Sequence[Bundle]) -> list[Bundle]:
    """Return places in turns: the first of every host, then the second of every host, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for number, place in enumerate(places):
        turns.append((seen[place.node], number))
        seen[place.node] += 1
    return [places[number] for _, number in sorted(turns)]


def threads_of(places: Sequence[Bundle], number: int) -> int:
    """Return the thread count of a process: the cores of its host divided by the run's processes there."""
    processes = sum(place.node == places[number].node for place in places)
    return max(1, processor.usable_cores() // processes)


def where(places: Sequence[Bundle]) -> str:
    """Describe which ranks are on which host, for messages."""
    hosts: dict[str, list[str]] = {}
    for rank, place in enumerate(places):
        hosts.setdefault(place.address, []).append(str(rank))
    return "; ".join(f"rank{'s' * (len(of) > 1)} {', '.join(of)} on {address}" for address, of in hosts.items())


def connect(say: Say, environment: dict[str, str] | None = None, cpus: int = 1) -> Cluster:
    """Join the cluster of RAY_ADDRESS or of this host, or start one here.

    Args:
        say: prints progress.
        environment: environment variables of every actor.
        cpus: minimum number of CPUs that a cluster started here declares, whatever the host has.

    Raises:
        UserError: nothing answers at RAY_ADDRESS, or something that is not Ray.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Absolute, because an actor on another host has the working directory of that host's Ray.
    given = [os.path.abspath(one) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    variables = {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), *given])}
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
        num_cpus=max(cpus, processor.usable_cores()),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=os.environ.get("RAY_TMPDIR"),
        _system_config=SYSTEM_CONFIG,
        **common,
    )
    return _watched(Cluster(True, say))


def _watched(cluster: Cluster) -> Cluster:
    """End this program with a message when this host's raylet ends. Ray 2.60 ends the driver without a reason."""
    flag = f"--node_id={cluster.node}"
    found = [p for p in psutil.process_iter(["cmdline"]) if flag in (p.info["cmdline"] or [])]
    if found and hasattr(os, "pidfd_open"):
        atexit.register(cluster.closed.set)  # runs before Ray's own handler, which ends the raylet
        watch_process(found[0].pid, cluster.closed)
    return cluster


def watch_process(process: int, closed: threading.Event) -> None:
    """Start a thread that ends this program when the process `process` (the raylet) ends before `closed` is set."""

    def watch(descriptor: int) -> None:
        select.select([descriptor], [], [])
        if not closed.is_set():
            logger.error(RAYLET_ENDED)
            os._exit(1)

    threading.Thread(target=watch, args=(os.pidfd_open(process),), name="raylet", daemon=True).start()

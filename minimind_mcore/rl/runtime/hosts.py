"""Hosts of a Ray cluster: find their addresses, and wait for each other. ADDRESS is HOST:PORT of the head."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from minimind_mcore.errors import UserError
from minimind_mcore.hosts import runs
from minimind_mcore.rl.runtime.metrics import say

# Free an object at once when its last reference is gone. By default Ray frees objects once a second, and within a
# second all buckets of a model pass through the object store.
SYSTEM_CONFIG = {"free_objects_period_milliseconds": 0}
POLL_SECONDS = 2.0
SAY_EVERY_SECONDS = 10.0
END_SECONDS = 10.0  # time for Ray to shut down before it is killed
GONE_AFTER = 5  # consecutive failures after which the head counts as lost
ANSWER_SECONDS = 10.0  # timeout of a Ray head's first bytes, long enough for a busy host
ANYWHERE = "192.0.2.1:9"  # documentation range (RFC 5737): selects the default route; no packet is sent


def own_address(towards: str | None, interface: str | None) -> str:
    """Return the address at which other hosts reach this host.

    Args:
        towards: HOST:PORT of the peer (default: the default route).
        interface: network interface whose address to use.

    Raises:
        UserError: the interface does not exist or has no address, or there is no route to `towards`.
    """
    if interface:
        there = psutil.net_if_addrs()
        if interface not in there:
            raise UserError(f"SOCKET_IFNAME={interface}: no such interface; found {', '.join(there)}")
        found = [entry.address for entry in there[interface] if entry.family == socket.AF_INET]
        if not found:
            raise UserError(f"SOCKET_IFNAME={interface}: this interface has no IPv4 address")
        return str(found[0])
    host, port = split(towards or ANYWHERE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))
        except OSError as error:
            if towards:
                raise UserError(f"no route to {towards}: {error}; check the address of the head") from error
            raise UserError(
                "this host has no default route and no known address: set MASTER_ADDR, or SOCKET_IFNAME to one of "
                f"{', '.join(psutil.net_if_addrs())}"
            ) from error
        return str(probe.getsockname()[0])


def split(address: str) -> tuple[str, int]:
    """Split HOST:PORT into host and port.

    Raises:
        UserError: the text has another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{address!r}: expected HOST:PORT")
    return host, int(port)


def answers(address: str) -> bool:
    """Return whether a server listens at HOST:PORT."""
    try:
        with socket.create_connection(split(address), timeout=POLL_SECONDS):
            return True
    except OSError:
        return False


def require_ray(address: str, name: str) -> None:
    """Check that a Ray head listens at an address. `ray.init` waits for ever if another program listens there.

    A head speaks gRPC, that is HTTP/2: after the client's preface the server sends a SETTINGS frame (RFC 9113, 3.4).

    Args:
        address: HOST:PORT.
        name: the setting with the address, and its value, for messages.

    Raises:
        UserError: nothing listens there, or another program does.
    """
    try:
        where = split(address)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    try:
        with socket.create_connection(where, timeout=ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":  # the preface would have to be encrypted
                return
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
            answer = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                while len(answer) < 4 and (more := connection.recv(4 - len(answer))):
                    answer += more
    except OSError as error:
        raise UserError(f"{name}: no Ray cluster answers there ({error}); start it, or unset it") from error
    if answer[3:4] != b"\x04":
        raise UserError(
            f"{name}: the program that listens there is not Ray: it sent {answer!r} where a Ray head sends an HTTP/2 "
            "SETTINGS frame. Expected the HOST:PORT of a `ray start --head` (its --port, not the dashboard's)"
        )


def require_free(address: str) -> None:
    """Check that a port is free.

    Raises:
        UserError: a program listens there.
    """
    if answers(address):
        raise UserError(
            f"something listens at {address} already: another run's head? Give this one a MASTER_PORT of its own, or "
            f"use that cluster: RAY_ADDRESS={address} bash examples/rlxf/grpo_minimind_single.sh"
        )


class Patience:
    """A wait with a deadline that prints its progress.

    Args:
        seconds: deadline.
        process: id of a Ray process. The wait fails when that process ends.
        title: first words of a progress line.
        tell: prints progress.
    """

    def __init__(
        self, seconds: float, process: int | None, title: str = "waiting", tell: Callable[[str], None] = say
    ) -> None:
        self.seconds, self.process, self.title, self.tell = seconds, process, title, tell
        self.began, self.said = time.monotonic(), 0.0

    def more(self, what: str, advice: str) -> None:
        """Wait for a moment.

        Raises:
            UserError: the deadline has passed, or the process has ended.
        """
        self.check(what, advice)
        waited = time.monotonic() - self.began
        if waited >= self.said:
            self.tell(f"{self.title} ({waited:.0f} of {self.seconds:g} s): {what}")
            self.said = waited + SAY_EVERY_SECONDS
        time.sleep(POLL_SECONDS)

    def check(self, what: str, advice: str) -> None:
        """Go on if there is time left.

        Raises:
            UserError: the deadline has passed, or the process has ended.
        """
        if self.process is not None and not runs(self.process):
            raise UserError(f"Ray has ended on this host: {what}")
        if time.monotonic() - self.began > self.seconds:
            raise UserError(f"after {self.seconds:g} s: {'; '.join(filter(None, [what, advice]))}")


def reach(address: str, patience: Patience) -> None:
    """Wait until the head answers.

    Raises:
        UserError: the deadline has passed.
    """
    while not answers(address):
        patience.more(f"no Ray head at {address} yet", "is grpo_minimind_head.sh running there, is the port open?")


def wait(address: str, nodes: int, patience: Patience) -> None:
    """Wait until the cluster has `nodes` hosts.

    Raises:
        UserError: the deadline has passed. The message lists the hosts found.
    """
    reach(address, patience)
    require_ray(address, f"RAY_ADDRESS={address}")
    import ray

    while True:
        try:
            _connect(address, patience)
            break
        except ConnectionError:  # the head answers before its own node is registered
            patience.more(f"the head at {address} has no node yet", "see Ray's log on the head")
    api: Any = ray
    try:
        while True:
            there = [node for node in api.nodes() if node["Alive"]]
            named = ", ".join(f"{node['NodeManagerAddress']} ({_amounts(node)})" for node in there)
            found = f"{len(there)} of {nodes} hosts are there: {named}"
            if len(there) >= nodes:
                say(found)
                return
            patience.more(found, "start grpo_minimind_worker.sh on the others")
    finally:
        ray.shutdown()


def _connect(address: str, patience: Patience) -> None:
    """Connect to a cluster.

    Ray waits for minutes if the head ends meanwhile. Therefore it connects in a thread, which is left behind if the
    patience ends.

    Raises:
        UserError: the deadline has passed, or the process of the head has ended.
        ConnectionError: the head has no node yet.
    """
    import ray

    failures: list[Exception] = []

    def connect() -> None:
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:
            failures.append(error)

    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # no warning that threads cannot handle signals
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        patience.check(f"the head at {address} does not answer", "see Ray's log on the head")
    if failures:
        raise failures[0]


def _amounts(node: dict[str, Any]) -> str:
    """Return the devices and cores of a host."""
    kinds = {name: amount for name, amount in node["Resources"].items() if name.isupper()}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(kinds.items()))


def follow(address: str, process: int | None) -> None:
    """Return when the head no longer answers.

    Raises:
        UserError: the Ray process of this host ended first.
    """
    say(f"this host belongs to the cluster of {address} until that ends")
    failures = 0
    while failures < GONE_AFTER:
        if process is not None and not runs(process) and answers(address):
            raise UserError("Ray has ended on this host, and the head is there still: run this script again")
        failures = 0 if answers(address) else failures + 1
        time.sleep(POLL_SECONDS)
    say(f"the head at {address} is gone: leaving")


def end(process: int) -> None:
    """End a `ray start --block` and its children. Processes that do not end, because the head is gone, are killed."""
    try:
        root = psutil.Process(process)
        tree = [root, *root.children(recursive=True)]
        root.terminate()
    except psutil.NoSuchProcess:
        return
    _, left = psutil.wait_procs(tree, timeout=END_SECONDS)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(left, timeout=END_SECONDS)

"""Detect ranks that have died or are stuck, name them, and end the run instead of waiting for ever.

A thread of every rank sends a heartbeat to rank 0 every few seconds, and rank 0 answers. The heartbeat tells how long
ago the rank's main thread last made progress, and its current position in the code. Three faults are reported:

- A rank whose connection closes without a good-bye has died.
- A rank that sends nothing for `SILENT_SECONDS` is stopped, or its host is unreachable.
- A rank without progress for `--distributed-timeout-minutes` is stuck, unless it only waits for other ranks.

The rank that detects a fault writes one message for the launcher, which prints it last, and exits. The process groups
time out `distributed.GRACE_MINUTES` later, so that errors of gloo or the device's library do not come first.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil
import torch.distributed as dist

from minimind_mcore import errors
from minimind_mcore.platform import ranks

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0
SILENT_SECONDS = 40.0
# A rank that ends with an error has printed it, and its launcher is about to end the others.
ENDED_SECONDS = 8.0
# Calls in which a main thread waits for other ranks, directly or through a device.
_WAITING = (".wait(", "synchronize(", ".item(", ".tolist(", "barrier(")


@dataclass
class _Progress:
    """The latest progress of the main thread."""

    at: float = field(default_factory=time.monotonic)
    count: int = 0
    busy: bool = False


_progress = _Progress()


def mark() -> None:
    """Record that the main thread has made progress. Costs one clock reading."""
    _progress.at = time.monotonic()
    _progress.count += 1


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Within the context silence is not a fault: writing a large file can hold the GIL, which the heartbeat needs."""
    mark()
    _progress.busy = True
    try:
        yield
    finally:
        _progress.busy = False
        mark()


@dataclass
class _Peer:
    """The state of another rank.

    Attributes:
        rank: number of the rank.
        link: connection to the rank.
        heard: time of the last message.
        ended: time when the connection closed without a good-bye.
        left: the rank has said good-bye.
        pid, host: its process.
        age: seconds since its last progress, at the last message.
        count: its progress counter.
        busy: the rank may be silent.
        waits: its main thread waits for other ranks.
        where: position of its main thread in the code.
    """

    rank: int
    link: socket.socket
    heard: float = field(default_factory=time.monotonic)
    ended: float | None = None
    left: bool = False
    pid: int = 0
    host: str = ""
    age: float = 0.0
    count: int = 0
    busy: bool = False
    waits: bool = False
    where: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on host {self.host})"

    def take(self, line: bytes) -> None:
        """Update the state with a message."""
        message = json.loads(line)
        self.heard = time.monotonic()
        for name in ("pid", "host", "age", "count", "busy", "waits", "where", "left"):
            setattr(self, name, message.get(name, getattr(self, name)))

    def fault(self) -> str:
        """Return the fault of the process, or an empty text."""
        now = time.monotonic()
        if self.left:
            return ""
        here = self.host == socket.gethostname()
        if self.ended is not None:
            return f"{self} has ended" if now - self.ended > ENDED_SECONDS else ""
        if now - self.heard < SILENT_SECONDS:
            return ""
        if here:
            try:
                status = psutil.Process(self.pid).status()
            except psutil.Error:
                return f"{self} has ended"
            if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                with contextlib.suppress(OSError):
                    os.kill(self.pid, signal.SIGKILL)  # its launcher would wait for it
                return f"{self} was stopped (SIGSTOP, or a debugger) for {now - self.heard:.0f} s"
            return ""  # the process runs, and something holds the GIL
        if self.busy:
            return ""
        return f"{self} has sent no heartbeat for {now - self.heard:.0f} s: it is stopped, or its host is unreachable"


class Liveness:
    """Sends the heartbeat of this rank, and on rank 0 monitors all others.

    Args:
        timeout: seconds without progress after which a rank counts as stuck.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.rank = ranks.rank()
        self.peers: list[_Peer] = []
        self.main = threading.main_thread().ident
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def start(self) -> None:
        """Connect the ranks and start the threads. Collective."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        mark()
        master = os.environ.get("MASTER_ADDR", "127.0.0.1")
        server = _listening(master) if self.rank == 0 else None
        port, token = ranks.from_main(lambda: (server.getsockname()[1] if server else 0, secrets.token_hex(16)))
        if server is not None:
            self._run("accept", self._accept, server, token, dist.get_world_size() - 1)
        else:
            try:
                link = socket.create_connection((master, port), timeout=20)
                link.settimeout(None)
                hello = {"token": token, "rank": self.rank} | self._state()
                link.sendall(json.dumps(hello).encode() + b"\n")
                peer = _Peer(0, link)
                self.peers.append(peer)
                self._run("listen", self._listen, peer, link.makefile("rb"))
            except OSError as error:
                logger.warning(
                    f"cannot reach rank 0 at {master}:{port} ({error}): a rank that dies or "
                    "stops is not named, and only --distributed-timeout-minutes ends the run"
                )
        self._run("heartbeat", self._beat)

    def _run(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, name=name, daemon=True).start()

    def close(self) -> None:
        """Say good-bye to the other ranks."""
        self._closed.set()
        self._send({"left": True})

    def give_up(self, error: BaseException) -> NoReturn:
        """End this process after a collective has failed, and name the rank that caused it if possible."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        # The launcher of a rank that ended also ends this one. If that rank was on another host, the heartbeat thread
        # reports it. A stopped rank takes longer to detect.
        longest = ENDED_SECONDS + (SILENT_SECONDS + 2 * INTERVAL_SECONDS if self.peers else 0)
        deadline = time.monotonic() + longest
        while time.monotonic() < deadline and not self._closed.is_set():
            time.sleep(0.1)
        self._end(f"rank {self.rank} lost the connection to another rank ({str(error).strip().splitlines()[0]})")

    # Threads

    def _accept(self, server: socket.socket, token: str, expected: int) -> None:
        while len(self.peers) < expected:
            link, _ = server.accept()
            link.settimeout(20)
            file = link.makefile("rb")
            try:
                line = file.readline(4096)
                hello = json.loads(line)
                if hello["token"] != token:
                    raise ValueError("another program")
                link.sendall(json.dumps(self._state()).encode() + b"\n")
                peer = _Peer(int(hello["rank"]), link)
                peer.take(line)
            except (OSError, ValueError, LookupError, TypeError):
                link.close()
                continue
            link.settimeout(None)
            self.peers.append(peer)
            self._run("listen", self._listen, peer, file)
        server.close()

    def _listen(self, peer: _Peer, lines: Iterable[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in lines:
                if b'"problem"' in line:  # rank 0 has found the cause
                    self._end(str(json.loads(line)["problem"]))
                peer.take(line)
        peer.ended = time.monotonic()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(INTERVAL_SECONDS):
            now = time.monotonic()
            if now - last > 3 * INTERVAL_SECONDS:  # the whole job was stopped, and continues
                for peer in self.peers:
                    peer.heard = now
                mark()
            last = now
            self._send(self._state())
            if problem := self._found():
                self._send({"problem": problem})
                self._end(problem)

    def _state(self) -> dict[str, object]:
        waits, where = describe_frame(sys._current_frames().get(self.main or 0))
        return {
            "pid": os.getpid(), "host": socket.gethostname(), "age": time.monotonic() - _progress.at,
            "count": _progress.count, "busy": _progress.busy, "waits": waits, "where": where,
        }  # fmt: skip

    def _send(self, message: dict[str, object]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            for peer in self.peers:
                with contextlib.suppress(OSError):
                    peer.link.send(line, socket.MSG_DONTWAIT)

    def _found(self) -> str:
        """Return a message about the first rank with a fault, or an empty text."""
        for peer in self.peers:
            if fault := peer.fault():
                return f"{fault}; the run ends. The same command resumes from the last checkpoint"
        return self._stuck() if self.rank == 0 else ""

    def _stuck(self) -> str:
        """Return a message about ranks without progress, or an empty text. Called on rank 0."""
        own = _Peer(0, socket.socket())
        own.link.close()
        own.take(json.dumps(self._state()).encode())
        everyone = [own, *(peer for peer in self.peers if not peer.left)]
        if max(peer.age for peer in everyone) < self.timeout:
            return ""
        active = [peer for peer in everyone if not peer.waits] or everyone
        behind = [peer for peer in active if peer.count == min(peer.count for peer in active)]
        named = ", ".join(f"{peer}, which is at {peer.where}" for peer in behind)
        return (
            f"no progress for {self.timeout:.0f} s (--distributed-timeout-minutes): the other ranks wait for {named}. "
            "The run ends; the same command resumes from the last checkpoint"
        )

    def _end(self, problem: str) -> NoReturn:
        errors.tell_launcher(problem)
        os._exit(1)


def _listening(master: str) -> socket.socket:
    """Return a socket for the other ranks. On a single host only local processes can connect."""
    if master in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", 0), backlog=128)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    return socket.create_server(("", 0), backlog=128)


def describe_frame(frame: FrameType | None) -> tuple[bool, str]:
    """Return whether a thread waits for other ranks, and the innermost line outside torch."""
    where, waits = "an unknown line", False
    inner = frame
    while frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        line_waits = frame is inner and any(word in linecache.getline(file, line) for word in _WAITING)
        waits = waits or line_waits or f"torch{os.sep}distributed" in file
        if where == "an unknown line" and f"{os.sep}torch{os.sep}" not in file:
            where = f"{Path(file).name}:{line} ({frame.f_code.co_name})"
        frame = frame.f_back
    return waits, where


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an exception means that the other side of a collective is gone or does not answer."""
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)

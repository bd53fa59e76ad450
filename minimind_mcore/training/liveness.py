"""Ranks that watch each other: one that is dead, stopped or stuck is named, and no other waits for it unseen.

A thread of every rank sends a heartbeat to rank 0 every few seconds, and rank 0 answers. The heartbeat says how long
ago the rank's main thread last made progress, and where that thread is. Then

- a rank whose connection ends without a good-bye is dead,
- a rank that sends nothing for `SILENT_SECONDS` is stopped, or its host is gone,
- a rank that makes no progress for `--distributed-timeout-minutes` is stuck, unless it only waits for others.

Who finds that writes one sentence for the launcher, which prints it last, and ends its process. The process groups have
a timeout that is `distributed.GRACE_MINUTES` longer, so that gloo and the device's library do not raise before.
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
# A rank that ends with an error of its own has said it, and its launcher is about to end the others.
ENDED_SECONDS = 8.0
# Functions in which a main thread waits for other ranks, or for a device that does.
_WAITING = (".wait(", "synchronize(", ".item(", ".tolist(", "barrier(")


@dataclass
class _Progress:
    """What the main thread has done last."""

    at: float = field(default_factory=time.monotonic)
    count: int = 0
    busy: bool = False


_progress = _Progress()


def mark() -> None:
    """Note that the main thread has made progress. Costs a clock reading."""
    _progress.at = time.monotonic()
    _progress.count += 1


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Inside, silence is no fault: writing a large file can hold Python's lock, which the heartbeat needs too."""
    mark()
    _progress.busy = True
    try:
        yield
    finally:
        _progress.busy = False
        mark()


@dataclass
class _Peer:
    """A rank as another one knows it.

    Attributes:
        rank: its number.
        link: the connection to it.
        heard: when something arrived last.
        ended: when the connection ended without a good-bye.
        left: it has said good-bye.
        pid, host: its process.
        age: seconds since its last progress, when it was heard last.
        count: of its progress.
        busy: it may be silent.
        waits: its main thread waits for other ranks.
        where: its main thread is.
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
        """Note what has arrived."""
        message = json.loads(line)
        self.heard = time.monotonic()
        for name in ("pid", "host", "age", "count", "busy", "waits", "where", "left"):
            setattr(self, name, message.get(name, getattr(self, name)))

    def fault(self) -> str:
        """What is wrong with its process, or nothing."""
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
                    os.kill(self.pid, signal.SIGKILL)  # it would keep its launcher waiting
                return f"{self} was stopped (SIGSTOP, or a debugger) for {now - self.heard:.0f} s"
            return ""  # it runs, and something holds Python's lock
        if self.busy:
            return ""
        return (
            f"{self} has sent no heartbeat for {now - self.heard:.0f} s: it is stopped, or its host or network is gone"
        )


class Liveness:
    """The heartbeat of this rank, and on rank 0 the watch over all others.

    Args:
        timeout: seconds without progress after which a rank is named.
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
                    "stops is not named, and found only by --distributed-timeout-minutes"
                )
        self._run("heartbeat", self._beat)

    def _run(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, name=name, daemon=True).start()

    def close(self) -> None:
        """Say good-bye to the other ranks."""
        self._closed.set()
        self._send({"left": True})

    def give_up(self, error: BaseException) -> NoReturn:
        """End this process after a collective has failed: another rank is the reason, and is named if it can be."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        # The launcher of a rank that has ended is about to end this one. If that rank was on another host, the thread
        # of the heartbeat names it; a rank that was stopped takes longer.
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
                if b'"problem"' in line:  # rank 0 has found who it is
                    self._end(str(json.loads(line)["problem"]))
                peer.take(line)
        peer.ended = time.monotonic()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(INTERVAL_SECONDS):
            now = time.monotonic()
            if now - last > 3 * INTERVAL_SECONDS:  # the whole job was stopped, and goes on
                for peer in self.peers:
                    peer.heard = now
                mark()
            last = now
            self._send(self._state())
            if problem := self._found():
                self._send({"problem": problem})
                self._end(problem)

    def _state(self) -> dict[str, object]:
        waits, where = place(sys._current_frames().get(self.main or 0))
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
        """The sentence about the first rank that something is wrong with, or nothing."""
        for peer in self.peers:
            if fault := peer.fault():
                return f"{fault}; the run ends. The same command goes on from the last checkpoint"
        return self._stuck() if self.rank == 0 else ""

    def _stuck(self) -> str:
        """The sentence about ranks that make no progress, or nothing; asked on rank 0."""
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
            "The run ends; the same command goes on from the last checkpoint"
        )

    def _end(self, problem: str) -> NoReturn:
        errors.tell_launcher(problem)
        os._exit(1)


def _listening(master: str) -> socket.socket:
    """A socket for the other ranks; on a single host nobody else can reach it."""
    if master in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", 0), backlog=128)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    return socket.create_server(("", 0), backlog=128)


def place(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and the innermost line of it that says what it does."""
    where, waits = "an unknown place", False
    inner = frame
    while frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        line_waits = frame is inner and any(word in linecache.getline(file, line) for word in _WAITING)
        waits = waits or line_waits or f"torch{os.sep}distributed" in file
        if where == "an unknown place" and f"{os.sep}torch{os.sep}" not in file:
            where = f"{Path(file).name}:{line} ({frame.f_code.co_name})"
        frame = frame.f_back
    return waits, where


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception is that of a collective whose other side is gone or does not answer."""
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)

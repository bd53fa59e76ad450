"""A function of the user with a time limit: one that waits forever would otherwise hang the run without a message."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

from minimind_mcore.errors import UserError

POLL_SECONDS = 1.0


class Stopwatch:
    """Measures how long a function has been busy with its own code. Work that has deadlines of its own is left out."""

    def __init__(self) -> None:
        self.lock, self.working, self.since = threading.Lock(), 0, time.monotonic()

    def restart(self) -> None:
        """Start again at 0, for a new call."""
        with self.lock:
            self.working, self.since = 0, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no time passes. Afterwards the time starts again at 0."""
        with self.lock:
            self.working += 1
        try:
            yield
        finally:
            with self.lock:
                self.working, self.since = self.working - 1, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start, or since the last pause."""
        with self.lock:
            return 0.0 if self.working else time.monotonic() - self.since


def limited(function: Callable[..., Any], key: str, path: str, limit: float, watch: Stopwatch) -> Callable[..., Any]:
    """Return the function with a time limit.

    Args:
        function: of the user. It runs in a thread of its own.
        key: setting that names it, for messages.
        path: its import path, for messages.
        limit: seconds of `watch` that it may take.
        watch: paused while the function waits for the engines.
    """

    def call(*arguments: Any) -> Any:
        result: Future[Any] = Future()

        def work() -> None:
            try:
                result.set_result(function(*arguments))
            except BaseException as error:
                result.set_exception(error)

        # Not an executor: Python waits for the threads of an executor at its exit.
        thread = threading.Thread(target=work, name=key, daemon=True)
        watch.restart()
        thread.start()
        while not wait([result], min(POLL_SECONDS, limit)).done:
            if watch.seconds > limit:
                raise UserError(
                    f"{key}: {path} has neither returned nor called the engines for {limit:g} s, the limit of "
                    f"minimind.actor_timeout_s. It is at {_current_line(thread)}. Give what it waits for a "
                    "time limit, or set minimind.actor_timeout_s higher"
                )
        return result.result()

    return call


def _current_line(thread: threading.Thread) -> str:
    """What a thread executes: the line of the user's function, the next call, and the innermost one."""
    frame = sys._current_frames().get(thread.ident or 0)
    calls = traceback.extract_stack(frame) if frame else []
    ours = max((number for number, call in enumerate(calls) if call.filename == __file__), default=-1)
    own = calls[ours + 1 :]
    shown = [*own[:2], *own[2:][-1:]]
    return " > ".join(f"{call.filename}:{call.lineno} {call.line or call.name}" for call in shown) or "its end"

"""Processes that score what may take for ever; one that hangs or dies is replaced, and its response alone suffers."""

from __future__ import annotations

import logging
import math
import multiprocessing
import signal
import sysconfig
import traceback
from collections.abc import Callable
from concurrent.futures import TimeoutError as Expired
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from minimind_mcore.rl.registry import imported

# Of one worker: sympy can ask for all memory of the machine over a tower of powers.
_MEMORY = 4 << 30
_GRACE = 5.0  # seconds


class Failed(NamedTuple):
    """Why a response has no score, and the file, line and function that raised, where one did."""

    reason: str
    where: str = ""


class VerifierPool:
    """A pool of processes, begun at the first task.

    They start from a small server process that holds no model and no device, so that a new one costs little.
    """

    def __init__(self, names: list[str], parallel: int, timeout: float) -> None:
        """Keep `parallel` processes that are ready for the verifiers `names`; a task may take `timeout` seconds."""
        self.names = names
        self.parallel = parallel
        self.timeout = timeout
        self._pool: ProcessPool | None = None

    def map(self, tasks: list[tuple[str, str, str, dict[str, Any]]]) -> list[float | Failed]:
        """Score each `(name, response, label, context)`: a number, or why there is none."""
        if not tasks:
            return []
        if self._pool is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["minimind_mcore.rl.rewards.verifiers", "math_verify", "mathruler.grader"])
            self._pool = ProcessPool(self.parallel, initializer=_begin, initargs=(self.names,), context=context)
        futures = [self._pool.schedule(_score, args=(self.timeout, *task), timeout=self.timeout) for task in tasks]
        return [self._result(future) for future in futures]

    def _result(self, future: Any) -> float | Failed:
        try:
            found = future.result()
            if isinstance(found, Failed):
                return found
            score = float(found)
            return score if math.isfinite(score) else Failed(f"gave {score}")
        except Expired:
            return Failed(f"took longer than {self.timeout:g} s")
        except ProcessExpired as error:
            return Failed(f"its process died: {error}")
        except Exception as error:  # what cannot be sent between processes
            return failure(error)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None


def resolve(name: str) -> Callable[..., float]:
    """The function of a verifier's name or of an import path `package.module:function`."""
    from minimind_mcore.rl.rewards.verifiers import VERIFIERS

    if name in VERIFIERS:
        return VERIFIERS[name].score
    return imported(name, "verifier_function")  # type: ignore[no-any-return]


def _begin(names: list[str]) -> None:
    """Limit the memory, and import what the verifiers need before any deadline runs."""
    import resource

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own deadlines are off
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, hard))
    for name in names:
        resolve(name)


def failure(error: Exception) -> Failed:
    """What a verifier raised, and the file and line: the last one that is not of an installed package."""
    places = traceback.extract_tb(error.__traceback__)
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    own = [place for place in places if not place.filename.startswith((*installed, __file__, "<"))]
    where = [f"{place.filename}:{place.lineno}, in {place.name}" for place in own or places]
    return Failed(f"{type(error).__name__}: {error}", where[-1] if where else "")


def _score(timeout: float, name: str, response: str, label: str, context: dict[str, Any]) -> float | Failed:
    # The parent ends what takes too long. If the parent itself is gone, the kernel does, a little later.
    signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE)
    try:
        return float(resolve(name)(response, label, **context))
    except Exception as error:  # here is its traceback; an exception that is sent loses it
        return failure(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

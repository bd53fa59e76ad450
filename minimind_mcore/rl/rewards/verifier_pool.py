"""Worker processes for verifiers that may hang or crash. Such a worker is replaced, and only its response fails."""

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

# Memory limit of one worker: sympy can ask for all memory of the machine to compute a tower of powers.
_MEMORY = 4 << 30
_GRACE = 5.0  # seconds from the pool's deadline to the worker's own alarm


class Failed(NamedTuple):
    """Why a response has no score, with the file, line and function that raised, if an exception was raised."""

    reason: str
    where: str = ""


class VerifierPool:
    """A pool of processes that is started at the first task.

    The processes are forked from a small server process without model and device, so that a replacement is cheap.
    """

    def __init__(self, names: list[str], parallel: int, timeout: float) -> None:
        """Keep `parallel` processes that have imported the verifiers `names`. A task may take `timeout` seconds."""
        self.names = names
        self.parallel = parallel
        self.timeout = timeout
        self._pool: ProcessPool | None = None

    def map(self, tasks: list[tuple[str, str, str, dict[str, Any]]]) -> list[float | Failed]:
        """Score each `(name, response, label, context)`. A result is a number, or the reason of a failure."""
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
        except Exception as error:  # arguments or results that cannot be pickled
            return failure(error)

    def close(self) -> None:
        """Stop the processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None


def resolve(name: str) -> Callable[..., float]:
    """Return the verifier of a name, or the function of an import path `package.module:function`."""
    from minimind_mcore.rl.rewards.verifiers import VERIFIERS

    if name in VERIFIERS:
        return VERIFIERS[name].score
    return imported(name, "minimind.rewards or rl_config.verifier_function")  # type: ignore[no-any-return]


def _begin(names: list[str]) -> None:
    """Limit the memory of the process, and import the verifiers' libraries before any deadline starts."""
    import resource

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are disabled
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, hard))
    for name in names:
        resolve(name)


def failure(error: Exception) -> Failed:
    """Return the error of a verifier, and the innermost file and line outside installed packages."""
    places = traceback.extract_tb(error.__traceback__)
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    own = [place for place in places if not place.filename.startswith((*installed, __file__, "<"))]
    where = [f"{place.filename}:{place.lineno}, in {place.name}" for place in own or places]
    return Failed(f"{type(error).__name__}: {error}", where[-1] if where else "")


def _score(timeout: float, name: str, response: str, label: str, context: dict[str, Any]) -> float | Failed:
    # The parent kills a task that takes too long. The alarm is for the case that the parent itself has died.
    signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE)
    try:
        return float(resolve(name)(response, label, **context))
    except Exception as error:  # the traceback is lost when an exception is sent to another process
        return failure(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

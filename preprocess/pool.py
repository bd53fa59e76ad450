"""Worker processes that take tasks one at a time. A dead worker is an error, never an endless wait.

    for result in run_tasks(setup, state, tasks, workers=4, tick=bar.update):
        ...                                    # in the order of completion

`concurrent.futures` is not used, because its pool cannot be stopped at once on an interrupt, and does not report the
signal that killed a worker.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from minimind_mcore.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
State = TypeVar("State")

TICK_SECONDS = 0.2


def _serve(connection: Connection, setup: Callable[[State], Callable[[Task], Result]], state: State) -> None:
    """Run a worker: prepare once, then answer each task with ("done", result) or the failure."""
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has ended or closed the pipe
        try:
            work = setup(state)
            while True:
                connection.send(("done", work(connection.recv())))
        except (EOFError, ConnectionError):
            raise
        except (UserError, OSError) as error:  # the system names the file in its errors
            connection.send(("user error", str(error)))
        except Exception:
            connection.send(("failure", traceback.format_exc()))


def _receive(connection: Connection, process: Any) -> Any:
    try:
        kind, value = connection.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        raise UserError(
            f"worker process {process.pid} was {how} (when the machine runs out of memory, its system does that: "
            "try fewer --workers); what was finished is kept, the same command continues from there"
        ) from None
    if kind == "user error":
        raise UserError(value)
    if kind == "failure":
        raise RuntimeError(f"in worker process {process.pid}:\n{value}")
    return value


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start workers with SIGINT blocked permanently: a terminal sends Ctrl-C to the workers too, but the parent must
    stop them."""
    # Starting the first process would start multiprocessing's tracker, which unblocks SIGINT (Python 3.8 to 3.14).
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_tasks(
    setup: Callable[[State], Callable[[Task], Result]],
    state: State,
    tasks: Sequence[Task],
    workers: int,
    tick: Callable[[], None],
) -> Iterator[Result]:
    """Run tasks in worker processes.

    Args:
        setup: called once in each worker with `state`. Returns the function that runs a task. Both
            `setup` and `state` must be picklable, because workers are fresh interpreters.
        state: shared input of the workers.
        tasks: assigned in this order.
        workers: number of processes, at most one per task.
        tick: called several times a second, and after each result.

    Yields:
        Results in the order of completion.

    Raises:
        UserError: raised by a task, or a worker died.
        RuntimeError: any other exception in a worker, with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    pending = deque(tasks)
    crew: dict[Connection, Any] = {}
    try:
        for _ in range(min(workers, len(pending))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, setup, state), daemon=True)
            with _interrupts_held():
                process.start()
            theirs.close()  # only then the death of the worker closes the pipe
            crew[ours] = process
            ours.send(pending.popleft())
        busy = set(crew)
        while busy:
            for connection in wait(list(busy), TICK_SECONDS):
                assert isinstance(connection, Connection)
                result = _receive(connection, crew[connection])
                if pending:
                    connection.send(pending.popleft())
                else:
                    busy.remove(connection)
                yield result
            tick()
    finally:
        for connection, process in crew.items():
            connection.close()
            process.terminate()
            process.join()

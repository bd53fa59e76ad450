"""The exception for errors that a user can fix, and how a program ends with it."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import NoReturn

from minimind_mcore import log

logger = logging.getLogger(__name__)


class UserError(Exception):
    """An input or a resource of the user is wrong.

    The message names the thing, the value found, the value expected, and what to do. Programs print
    it without a traceback and exit with status 1.
    """


def require(condition: bool, message: str) -> None:
    """Raise a `UserError` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def problems_of(check: Callable[[], object]) -> list[str]:
    """Return the message of the UserError that a check raises, in a list. The list is empty if the check passes."""
    try:
        check()
    except UserError as error:
        return [str(error)]
    return []


def shown(value: object) -> str:
    """Return a value for a message, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def did_you_mean(name: str, known: Iterable[str], begin: str = "; did") -> str:
    """Return the end of a message about an unknown name: "; did you mean X?", or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"{begin} you mean {near[0]}?" if near else ""


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Put the path of the file in front of the message of a `UserError` that does not name it."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a file size limit
VERDICT = "MINIMIND_VERDICT"  # variable with the file in which a rank tells the launcher the reason of the end
STOPS = (signal.SIGINT, signal.SIGTERM)
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # at these a training saves and ends


def end_signals() -> tuple[signal.Signals, ...]:
    """Return END_SIGNALS; without SIGHUP under nohup, where a program continues after its terminal closes."""
    kept = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in END_SIGNALS if not (kept and number == signal.SIGHUP))


@contextlib.contextmanager
def stops_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread and in child processes started meanwhile, until their `run`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def stops_handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Call `handler` for SIGINT and SIGTERM during the block."""
    before = {number: signal.signal(number, handler) for number in STOPS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def last_error(stderr: str, status: int) -> str:
    """Return the error that a program of the kit printed last: from "error:" on, else the last three lines."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    start = next((n for n, line in enumerate(lines) if line.startswith("error:")), max(0, len(lines) - 3))
    return "\n".join(lines[start:]).removeprefix("error: ") or f"exit status {status}"


def tell_launcher(problem: str) -> None:
    """Report why a run ended: to this kit's launcher, which prints the message last, or on stderr without a launcher.

    Only the first message of all ranks is used.
    """
    file = os.environ.get(VERDICT)
    try:
        if file:
            with open(file, "x", encoding="utf-8") as f:
                f.write(problem)
            return
    except FileExistsError:
        return
    except OSError:
        pass  # the launcher and its directory no longer exist
    logger.error(problem)


def run(main: Callable[[], None]) -> None:
    """Run a program's `main`. A `UserError` or a full disk becomes one message on stderr and exit status 1.

    Ctrl-C becomes one message and exit status 130. If the reader of stdout has closed it, as in `... | head`, the exit
    status is 141.
    """
    try:
        try:
            _set_up_log()
            # A parent may have blocked the signals (`stops_blocked`), because Python can lose a signal during its
            # start.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        logger.info("interrupted; what was finished is kept: the same command continues from there")
        _exit(128 + signal.SIGINT)
    except (UserError, OSError) as error:
        problem = str(error)
        if isinstance(error, OSError):  # a write without its own error handling, or stdout
            if error.errno == errno.EPIPE and _stdout_is_closed():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
                _exit(128 + signal.SIGPIPE)
            if error.errno not in NO_SPACE:
                raise
            problem = f"{error.filename or 'an output file'}: {error.strerror}. Free some space, or raise the limit"
        if os.environ.get("RANK", "0") != "0":
            # Most errors occur on every rank. The launcher must be able to end this rank, to print the message of rank
            # 0.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        logger.error(problem)
        _exit(1)


def _set_up_log() -> None:
    # A locale without Chinese must not end a run whose model answers in Chinese.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        log.setup()
    except ValueError as error:
        raise UserError(str(error)) from error


def _stdout_is_closed() -> bool:
    """Return whether stdout is a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _exit(status: int) -> NoReturn:
    """End this process."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)  # a normal exit can wait for other ranks for ever
    sys.exit(status)

"""The one exception for what a user can put right, and how a program ends on it."""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from minimind_mcore import log

logger = logging.getLogger(__name__)


class UserError(Exception):
    """Something the user gave or owns is wrong.

    The message names the thing, what was found, what was expected, and what to do. Programs print
    it without a traceback and exit with status 1.
    """


def require(condition: bool, message: str) -> None:
    """Raise a `UserError` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def did_you_mean(name: str, known: Iterable[str], begin: str = "; did") -> str:
    """Return the end of a message about an unknown name: "; did you mean X?", or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"{begin} you mean {near[0]}?" if near else ""


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Put the path of what is read before the message of a `UserError` that does not name it."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on the size of files
VERDICT = "MINIMIND_VERDICT"  # variable with the file in which a rank tells the launcher what ended the run


def tell_launcher(problem: str) -> None:
    """Say what ended a run: to the launcher of this kit, which prints it last, or on stderr where there is none.

    The first rank to say something is heard.
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
        pass  # the launcher is gone, and its directory with it
    logger.error(problem)


def run(main: Callable[[], None]) -> None:
    """Run a program's `main`; a `UserError`, or a full disk, becomes one message on stderr and exit status 1.

    Ctrl-C becomes one message and exit status 130. Where the reader of stdout has ended, as in `... | head`, the exit
    status is 141.
    """
    try:
        try:
            _set_up_log()
            main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        logger.info("interrupted; what was finished is kept: the same command continues from there")
        _exit(128 + signal.SIGINT)
    except (UserError, OSError) as error:
        problem = str(error)
        if isinstance(error, OSError):  # of a file whose writer does not know what else to say, or of stdout
            if error.errno == errno.EPIPE and _stdout_is_closed():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
                _exit(128 + signal.SIGPIPE)
            if error.errno not in NO_SPACE:
                raise
            problem = f"{error.filename or 'an output file'}: {error.strerror}. Free some space, or raise the limit"
        if os.environ.get("RANK", "0") != "0":
            # Most errors are every rank's: the launcher then ends this one before it says what rank 0 has said.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        logger.error(problem)
        _exit(1)


def _set_up_log() -> None:
    try:
        log.setup()
    except ValueError as error:
        raise UserError(str(error)) from error


def _stdout_is_closed() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _exit(status: int) -> NoReturn:
    """End this process."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)  # among other ranks an orderly exit can wait for them for ever
    sys.exit(status)

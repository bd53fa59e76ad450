"""Logging of the kit: standard `logging`, below the logger `minimind_mcore`.

A module has `logger = logging.getLogger(__name__)`. Every command calls `setup` before it does anything, through
`errors.run`; the launcher and the Ray workers call it themselves.

| level | where it goes |
|---|---|
| DEBUG, INFO | the bare message, from rank 0 only, on standard output |
| WARNING | `warning: ...` on standard error; every rank except 0 adds its number |
| ERROR | `error: ...` on standard error |

The setting LOG_LEVEL (debug, info, warning, error; default info) leaves out the levels below it.

`print` is for the product of a command only: what the command exists to print, whatever LOG_LEVEL is. Examples are the
table of `doctor`, a generated text, a dry run's plan, and settings that a shell reads. Progress, results of steps and
notes are logged. A test lists the modules that may print.

Only the logger `minimind_mcore` is changed. The root logger and those of other libraries keep their handlers.
"""

from __future__ import annotations

import logging
import os
import sys

KIT = "minimind_mcore"
LAUNCHER = "MINIMIND_LAUNCHER"  # variable with the process id of the kit's launcher, in the ranks it started
SETTING = "LOG_LEVEL"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# Modules and packages of commands whose standard output is their product: INFO goes to standard error.
ON_STDERR = tuple(
    f"{KIT}.{name}."
    for name in (
        "errors", "hosts", "inference", "launch", "mindspeed", "models", "preprocess.convert", "preprocess.main",
        "preprocess.messages", "preprocess.readers", "progress", "rl.commands", "rl.config", "serve",
    )
)  # fmt: skip


def rank() -> int:
    """Return the rank of this process: from its process group, else from the launcher or torchrun, else 0.

    RANK alone is ignored, because schedulers such as Kubeflow's set it to the number of the host.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    launched = LAUNCHER in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    return int(os.environ.get("RANK", "0")) if launched else 0  # the launcher itself has no RANK


def _is_shown(record: logging.LogRecord) -> bool:
    """Filter records: only rank 0 logs information, every rank logs warnings and errors."""
    return record.levelno >= logging.WARNING or rank() == 0


class Console(logging.Handler):
    """Prints records. Unlike `StreamHandler` it looks up the streams at each record, because programs replace them.

    Write errors are raised: a closed pipe ends the program, and a full disk is reported.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record, flushed."""
        text, number = self.format(record), rank()
        if record.levelno >= logging.ERROR:
            text = f"error: {text}"
        elif record.levelno >= logging.WARNING:
            text = f"warning: rank {number}: {text}" if number else f"warning: {text}"
        aside = record.levelno >= logging.WARNING or f"{record.name}.".startswith(ON_STDERR)
        print(text, file=sys.stderr if aside else sys.stdout, flush=True)


def setup() -> None:
    """Print the kit's messages from the level LOG_LEVEL on. Repeated calls change only the level.

    Raises:
        ValueError: LOG_LEVEL is not a level; messages are printed from INFO on.
    """
    logger = logging.getLogger(KIT)
    if not any(isinstance(handler, Console) for handler in logger.handlers):
        console = Console()
        console.addFilter(_is_shown)
        logger.addHandler(console)
        logger.propagate = False  # a handler of the root logger would print the message again
    name = os.environ.get(SETTING) or "info"
    logger.setLevel(LEVELS.get(name.lower(), logging.INFO))
    if name.lower() not in LEVELS:
        raise ValueError(f"{SETTING}={name}: expected one of {', '.join(LEVELS)}")


def warn_once(logger: logging.Logger, text: str) -> None:
    """Log a warning that applies to every rank only on rank 0."""
    if rank() == 0:
        logger.warning(text)


def hand_over() -> None:
    """Pass the kit's messages to the handlers of the root logger, for programs that configure them."""
    logger = logging.getLogger(KIT)
    logger.handlers.clear()
    logger.propagate = True

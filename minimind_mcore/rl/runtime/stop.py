"""Stop a run on a signal: after the current step, with a checkpoint, or at once while the run only waits."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from minimind_mcore.training.stop import StopSignal

logger = logging.getLogger(__name__)


class Stop(StopSignal):
    """The driver's handler of SIGTERM, SIGINT and SIGHUP. Install it after Ray, which installs its own."""

    def __init__(self) -> None:
        self.waits = False
        super().__init__()

    @property
    def asked(self) -> bool:
        """Whether a signal has arrived."""
        return self.at is not None

    @property
    def status(self) -> int:
        """The exit status of a program that a signal ended."""
        return 128 + int(signal.Signals[self.name])

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """Within the context a signal is only recorded. A second signal still ends the program."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the context a signal ends the program: the current step cannot finish, so there is nothing to save.

        A signal that arrived earlier takes effect now.
        """
        before, self.waits = self.waits, False
        try:
            if self.asked:
                logger.warning(f"{self.name}: leaving without saving, as the step under way cannot end")
                sys.exit(self.status)
            yield
        finally:
            self.waits = before

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.waits:
            sys.exit(128 + number)
        super()._receive(number, frame)

"""A signal ends a run in order: after the step that is under way, saved; at once where it only waits."""

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
    """The driver's answer to SIGTERM, SIGINT and SIGHUP. Set it up after Ray, which has one of its own."""

    def __init__(self) -> None:
        self.waits = False
        super().__init__()

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.at is not None

    @property
    def status(self) -> int:
        """What a program that it ended exits with."""
        return 128 + int(signal.Signals[self.name])

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """Inside, a signal is only noted (a second one still ends the program)."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal ends the program: the step under way cannot end, so that there is nothing to save.

        A signal that came before is answered now.
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

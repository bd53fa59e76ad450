"""Show the progress of long work: a bar on a terminal, otherwise a line at intervals."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import AbstractContextManager

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_SECONDS = 5.0


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """Shows the bytes done, the speed and the remaining time.

    Args:
        what: name of the work.
        total: total number of bytes.
        before: bytes that an earlier run has done, which do not count for the speed.
    """

    def __init__(self, what: str, total: int, before: int = 0) -> None:
        self._what, self._total, self._before = what, max(1, total), before
        self._done = 0
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=before, unit="B", unit_scale=True, desc=what, dynamic_ncols=True)

    def add(self, nbytes: int) -> None:
        """Report `nbytes` more bytes as done."""
        self.show(self._done + nbytes)

    def show(self, done: int, tokens: int | None = None) -> None:
        """Update the display.

        Args:
            done: bytes since the start of this run.
            tokens: tokens written since then.
        """
        self._done, now = done, time.monotonic()
        seconds = max(now - self._start, 1e-9)
        position = min(self._before + done, self._total)
        rate = "" if tokens is None else f"{tokens / seconds / 1e6:.2f} Mtok/s"
        if self._bar is not None:
            self._bar.set_postfix_str(rate, refresh=False)
            self._bar.update(position - self._bar.n)
        elif now - self._last >= LINE_SECONDS:
            self._last = now
            parts = (
                f"{self._what}: {100 * position / self._total:.1f} % of {self._total / 1e6:,.0f} MB",
                f"{done / 1e6 / seconds:.1f} MB/s",
                rate,
                f"{(self._total - position) * seconds / max(done, 1):.0f} s left",
            )
            logger.info(", ".join(filter(None, parts)))

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

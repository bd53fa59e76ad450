"""Progress on stderr: a bar on a terminal, a line every few seconds elsewhere, with GB/s."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 5.0


class Progress:
    """Counts bytes.

    Args:
        what: is done.
        total: bytes.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, max(1, total), 0
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=what, dynamic_ncols=True)

    def add(self, nbytes: int) -> None:
        """So many more are done."""
        self._done += nbytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(nbytes)
        elif now - self._last >= LINE_SECONDS:
            self._last = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            print(
                f"{self._what}: {100 * self._done / self._total:.0f} % of {self._total / 1e9:.2f} GB, "
                f"{rate / 1e9:.2f} GB/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

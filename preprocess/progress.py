"""Progress of a conversion on stderr: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 5.0


class Progress:
    """Show bytes read, MB/s, tokens/s and the time left.

    Args:
        total: bytes of input.
        done: bytes that an earlier run has already done; they do not count for the speed.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total = max(1, total)
        self._done_before = done
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, dynamic_ncols=True)

    def show(self, read: int, tokens: int) -> None:
        """Update.

        Args:
            read: bytes read since the start of this run.
            tokens: tokens written since the start of this run.
        """
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        position = min(self._done_before + read, self._total)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{tokens / seconds / 1e6:.2f} Mtok/s", refresh=False)
            self._bar.update(position - self._bar.n)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = (self._total - position) * seconds / max(read, 1)
            print(
                f"{100 * position / self._total:5.1f} %  {position / 1e6:.0f} of {self._total / 1e6:.0f} MB  "
                f"{read / 1e6 / seconds:.1f} MB/s  {tokens / seconds / 1e6:.2f} Mtok/s  {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the terminal clean."""
        if self._bar is not None:
            self._bar.close()

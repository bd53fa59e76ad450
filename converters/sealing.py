"""Files are hashed while they fill, and made durable as they are complete."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from minimind_mcore.checkpoint.tensors import TensorWriter
from minimind_mcore.platform.cpu import usable_cores
from minimind_mcore.storage import FileEntry


class Sealing:
    """Threads beside those that write: a file is hashed by one at a time, in order, right behind what is written.

    Args:
        writers: of the files.
    """

    def __init__(self, writers: Sequence[TensorWriter]) -> None:
        self._writers = writers
        self._hashing: dict[Path, Future[None]] = {}
        self._closing: dict[Path, Future[FileEntry]] = {}
        self._executor = ThreadPoolExecutor(max(2, min(4, usable_cores())))

    def advance(self) -> None:
        """Hash on where there is something new."""
        for writer in self._writers:
            running = self._hashing.get(writer.path)
            if writer.can_hash and (running is None or running.done()):
                if running is not None:
                    running.result()
                self._hashing[writer.path] = self._executor.submit(writer.hash_written)

    def finish(self) -> None:
        """All is written: begin to close the files."""
        self._closing = {writer.path: self._executor.submit(writer.close) for writer in self._writers}

    def entries(self, root: Path) -> dict[str, FileEntry]:
        """Wait for the files; their manifest entries by path below the root.

        Raises:
            UserError: the disk is full.
        """
        return {str(path.relative_to(root)): future.result() for path, future in self._closing.items()}

    def __enter__(self) -> Sealing:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

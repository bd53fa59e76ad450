"""Disks that fill up."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: float) -> Iterator[Path]:
    """A tmpfs, where mounting one is permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(mebibytes * 1024)}k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip("no permission to mount a small tmpfs: " + (done.stderr.strip() if done else "not root"))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)

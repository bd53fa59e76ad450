"""One run at a time per directory: rank 0 locks a file that names the holder.

    outputs/minimind3/.run.lock              {"host": ..., "pid": ..., "run": ..., "since": ...}

Two runs that save into one directory would delete each other's temporary files and mix their metrics. The kernel
releases the lock when the process ends, however it ends, so the lock of a dead process is free. Only rank 0 of a run
takes it: the other hosts of the same run do not.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import uuid
from pathlib import Path
from typing import TextIO

from minimind_mcore.errors import UserError
from minimind_mcore.storage import writing

logger = logging.getLogger(__name__)

LOCK = ".run.lock"
RUN = uuid.uuid4().hex[:12]
_HELD: dict[Path, TextIO] = {}


def lock_files(output_dir: Path, save: Path | None) -> dict[Path, Path]:
    """Return the directories of a run that are locked, each with its lock file.

    The lock file of the checkpoints lies next to their directory, which contains only checkpoints. It lies inside if
    only the inside is writable.
    """
    found = {output_dir: output_dir / LOCK}
    if save is not None and save.resolve() != output_dir.resolve():
        place = save.resolve()  # a directory and a symbolic link to it share one lock
        inside = place.parent.is_dir() and not os.access(place.parent, os.W_OK | os.X_OK)
        found[save] = place / LOCK if inside else place.with_name(f".{place.name}.lock")
    return found


def take(output_dir: Path, save: Path | None, advice: str) -> None:
    """Lock the directories of a run until this process ends or releases them.

    output_dir: directory of the metrics.
    save: directory of the checkpoints, if any are saved.
    advice: what to do if a directory is not writable.

    Raises:
        UserError: another run holds a lock, or a directory cannot be written.
    """
    try:
        for directory, file in lock_files(output_dir, save).items():
            with writing(file.parent, advice):
                file.parent.mkdir(parents=True, exist_ok=True)
                _take(directory, file)
    except UserError:
        release()
        raise
    if unlocked := [str(directory) for directory, file in lock_files(output_dir, save).items() if file not in _HELD]:
        logger.warning(
            f"{' and '.join(unlocked)}: the filesystem has no file locks, so nothing prevents a second run "
            "in this directory, which would delete this run's temporary files"
        )


def _take(directory: Path, file: Path) -> None:
    if file in _HELD:
        return
    while True:
        handle = open(file, "a+", encoding="utf-8")  # noqa: SIM115  (the lock lasts as long as the file is open)
        try:
            # A lock of the process, not of the open file, so that worker processes forked later do not hold it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = _read(handle)
            handle.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # this filesystem has no locks
            raise UserError(
                f"{directory} is in use by another run: {_holder(text)}. Stop that run, wait until it ends, or give "
                "this run a directory of its own (OUTPUT_DIR, or --save and --output-dir)"
            ) from error
        # The previous holder may have removed the file, and a lock on a removed file protects nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), file.stat()):
                break
        handle.close()
    handle.truncate(0)
    now = datetime.datetime.now().isoformat(timespec="seconds")
    handle.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "run": RUN, "since": now}) + "\n")
    handle.flush()
    _HELD[file] = handle


def release() -> None:
    """Release the locks of this process and remove their files."""
    for file, handle in _HELD.items():
        file.unlink(missing_ok=True)
        handle.close()
    _HELD.clear()


def _read(handle: TextIO) -> str:
    handle.seek(0)
    return handle.read()


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['pid']} on host {found['host']}, run {found['run']}, since {found['since']}"
    except (ValueError, LookupError, TypeError):
        return "its lock file does not name the run"

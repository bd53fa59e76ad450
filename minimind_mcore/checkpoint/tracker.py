"""The file that names the newest checkpoint of a directory. Imports no torch, so that commands start fast."""

from __future__ import annotations

from pathlib import Path

from minimind_mcore.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"


def read_tracker(root: Path) -> str:
    """Return the text of the tracker file below `root`, "" if there is none; bytes that are not UTF-8 are replaced.

    Raises:
        UserError: the file cannot be read.
    """
    tracker = root / TRACKER
    try:
        return tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else ""
    except OSError as error:
        raise UserError(f"{tracker}: cannot be read ({error.strerror})") from error

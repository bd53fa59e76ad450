"""Choose the checkpoint that a run resumes from: the newest undamaged one."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from minimind_mcore import log
from minimind_mcore.checkpoint import torch_zip
from minimind_mcore.checkpoint.files import directory_of, iterations_in, tracked_directory
from minimind_mcore.checkpoint.tracker import TRACKER, read_tracker
from minimind_mcore.errors import UserError
from minimind_mcore.platform import ranks
from minimind_mcore.storage import MANIFEST, check_manifest

logger = logging.getLogger(__name__)

_whole: set[Path] = set()  # checkpoints whose files were verified, and which are not loaded yet


def choose(root: Path, step: int | None = None) -> Path | None:
    """Return the newest undamaged checkpoint below `root`, or the checkpoint of iteration `step`. Collective.

    Return None if `root` has no checkpoint. The search starts with the checkpoint that the tracker file names. If this
    checkpoint is damaged or missing, the function logs a warning and tries older checkpoints, then newer checkpoints,
    each in descending order.
    """
    # Only the main rank lists the candidates, so that all ranks try the same.
    candidates = ranks.from_main(lambda: [directory_of(root, step)] if step else _candidates(root))
    for directory in candidates:
        problems = [] if directory in _whole else check(directory)
        if not problems:
            _whole.add(directory)
            return directory
        log.warn_once(logger, "\n  ".join([f"checkpoint {directory} is damaged; trying another one:", *problems]))
    if candidates:
        raise UserError(f"no whole checkpoint in {root}; tried {', '.join(d.name for d in candidates)}")
    return None


def forget(directory: Path) -> None:
    """Verify the files of this checkpoint again when it is chosen the next time."""
    _whole.discard(directory)


def _candidates(root: Path) -> list[Path]:
    found = [directory_of(root, iteration) for iteration in iterations_in(root)]
    text = read_tracker(root)
    named = tracked_directory(root, text)
    if named is None:
        if found:
            told = f"{root / TRACKER}: found {text!r}, expected an iteration"
            log.warn_once(logger, f"{told}; looking for the newest checkpoint")
        return found
    older = [d for d in found if text == "release" or d.name < named.name]
    return [named, *older, *(d for d in found if d not in (named, *older))]


def check(directory: Path) -> list[str]:
    """Return the problems of a checkpoint's files, on every rank. Collective: each rank checks some files."""
    number = dist.get_world_size() if dist.is_initialized() else 1
    found = ranks.gather(_check_share(directory, ranks.rank(), number))
    return list(dict.fromkeys(problem for problems in found for problem in problems))


def _check_share(directory: Path, rank: int, number: int) -> list[str]:
    if not directory.is_dir():
        return [f"{directory}: missing"]
    if (directory / MANIFEST).is_file():
        return check_manifest(directory, rank, number)
    # Other programs write no manifest. torch.load ignores the checksums in the archives, so they are checked here.
    files = sorted(file for pattern in ("*.pt", "*.distcp") for file in directory.rglob(pattern))
    if not files:
        return [f"{directory}: no checkpoint files"]
    return [problem for file in files[rank::number] for problem in torch_zip.check_records(file)]

"""The files of Megatron's checkpoints: their names, which checkpoint is meant, and what a checkpoint says of itself.

checkpoints/
    latest_checkpointed_iteration.txt      names the newest checkpoint; written last
    iter_0000100/
        manifest.json                      size and SHA-256 of every file
        mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt    format torch: args, model (or model0, model1, ...)
        metadata.json, common.pt, __0_0.distcp ...   format torch_dist
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from minimind_mcore.checkpoint.torch_zip import Archive, read_archive
from minimind_mcore.checkpoint.tracker import TRACKER, read_tracker
from minimind_mcore.errors import UserError

NAME = "model_optim_rng.pt"
PREFIX = "iter_"


def directory_of(root: Path, iteration: int) -> Path:
    """Directory of an iteration's checkpoint."""
    return root / f"{PREFIX}{iteration:07d}"


def iterations_in(root: Path) -> list[int]:
    """Iterations that have a checkpoint directory, newest first."""
    names = [p.name.removeprefix(PREFIX) for p in root.glob(f"{PREFIX}*") if p.is_dir()]
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def iteration_directory(path: Path) -> Path | None:
    """The directory of the checkpoint that `path` is, or whose tracker file it has; None if it is neither.

    Raises:
        UserError: the tracker names a directory that is not there.
    """
    if is_torch_dist(path) or any(path.glob("mp_rank_*")):
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        found = sorted(p for p in path.glob(f"{PREFIX}*") if p.is_dir())
        return found[-1] if found else None
    text = read_tracker(path)
    directory = tracked_directory(path, text)
    if directory is None:
        raise UserError(
            f"{tracker}: found {text!r}, expected an iteration or 'release': the file is damaged; give the directory "
            f"of one checkpoint, such as {path}/iter_0000100"
        )
    if not directory.is_dir():
        raise UserError(f"{tracker} says {text!r}, but there is no {directory.name}: an unfinished or damaged copy")
    return directory


def tracked_directory(root: Path, text: str) -> Path | None:
    """Return the directory that the text of a tracker file names, or None if the text is damaged."""
    if text == "release":
        return root / text
    return directory_of(root, int(text)) if re.fullmatch("[0-9]{1,18}", text) else None


def is_torch_dist(directory: Path) -> bool:
    """True for a `torch_dist` checkpoint, False for a `torch` one."""
    return (directory / "metadata.json").is_file()


def content(directory: Path) -> Any:
    """What the checkpoint of an iteration, of either format, holds beside tensors.

    Raises:
        UserError: it is damaged, or no checkpoint of Megatron.
    """
    common = directory / "common.pt"  # of torch_dist
    first = next(iter(sorted(directory.glob("mp_rank_*"))), directory / "mp_rank_00")
    archive = read_archive(common if common.is_file() else first / NAME)
    args_in(archive)
    return archive.content


def args_in(archive: Archive) -> argparse.Namespace:
    """Return the arguments that a file of a checkpoint carries.

    Raises:
        UserError: the file is no part of a checkpoint of Megatron.
    """
    found = archive.content.get("args") if isinstance(archive.content, dict) else None
    if not isinstance(found, argparse.Namespace):
        raise UserError(f"{archive.path}: no checkpoint of Megatron: it has no args")
    return found


def saved_args(directory: Path) -> argparse.Namespace:
    """Return the arguments that the checkpoint of an iteration carries."""
    args: argparse.Namespace = content(directory)["args"]
    return args


def is_converted(directory: Path) -> bool:
    """Return whether the checkpoint of an iteration holds weights alone, as converters write it.

    MindSpeed-LLM's converters write iteration 1, and the kit's keep the iteration of the source. A run has to begin at
    iteration 0 with either. A run under `--no-save-optim` saves weights alone, too, but has consumed samples.
    """
    found = content(directory)
    args = found["args"]
    by_a_run = getattr(args, "no_save_optim", None) and getattr(args, "consumed_train_samples", 0)
    return "opt_param_scheduler" not in found and not by_a_run

"""The files of Megatron's checkpoints: names, the directory of a checkpoint, and its stored arguments.

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
    """Return the directory of an iteration's checkpoint."""
    return root / f"{PREFIX}{iteration:07d}"


def iterations_in(root: Path) -> list[int]:
    """Return the iterations with a checkpoint directory, newest first."""
    names = [p.name.removeprefix(PREFIX) for p in root.glob(f"{PREFIX}*") if p.is_dir()]
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def iteration_directory(path: Path) -> Path | None:
    """Find the checkpoint at a path. Return None if the path has none.

    This is the path itself, or the checkpoint that its tracker file names. Without a tracker file it is the newest
    checkpoint in the path.

    Raises:
        UserError: the tracker file names a directory that does not exist.
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
        raise UserError(f"{tracker} names {text!r}, but there is no {directory.name}: an unfinished or damaged copy")
    return directory


def tracked_directory(root: Path, text: str) -> Path | None:
    """Return the directory that the text of a tracker file names, or None if the text is damaged."""
    if text == "release":
        return root / text
    return directory_of(root, int(text)) if re.fullmatch("[0-9]{1,18}", text) else None


def is_torch_dist(directory: Path) -> bool:
    """Return True for a `torch_dist` checkpoint, False for a `torch` checkpoint."""
    return (directory / "metadata.json").is_file()


def content(directory: Path) -> Any:
    """Return the contents of a checkpoint of either format, without its tensors.

    Raises:
        UserError: the checkpoint is damaged, or not Megatron's.
    """
    common = directory / "common.pt"  # exists only in torch_dist
    first = next(iter(sorted(directory.glob("mp_rank_*"))), directory / "mp_rank_00")
    archive = read_archive(common if common.is_file() else first / NAME)
    args_in(archive)
    return archive.content


def args_in(archive: Archive) -> argparse.Namespace:
    """Return the arguments in a checkpoint file.

    Raises:
        UserError: the file does not belong to a Megatron checkpoint.
    """
    found = archive.content.get("args") if isinstance(archive.content, dict) else None
    if not isinstance(found, argparse.Namespace):
        raise UserError(f"{archive.path}: not a Megatron checkpoint: it has no args")
    return found


def saved_args(directory: Path) -> argparse.Namespace:
    """Return the arguments in the checkpoint of an iteration."""
    args: argparse.Namespace = content(directory)["args"]
    return args


def is_converted(directory: Path) -> bool:
    """Return whether a checkpoint was written by a converter and holds only weights.

    MindSpeed-LLM's converters write iteration 1, and this kit's keep the iteration of the source. In both cases a run
    must start at iteration 0. A run with `--no-save-optim` also saves only weights, but has consumed samples.
    """
    found = content(directory)
    args = found["args"]
    by_a_run = getattr(args, "no_save_optim", None) and getattr(args, "consumed_train_samples", 0)
    return "opt_param_scheduler" not in found and not by_a_run

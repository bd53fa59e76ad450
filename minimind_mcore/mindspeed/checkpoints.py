"""Check the checkpoints on a command line of MindSpeed-LLM: they must exist, be complete, and fit the run.

Without these checks the ranks would fail a minute later with a traceback each, or start with random weights and only
log a line about it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from minimind_mcore.checkpoint.files import NAME, is_converted, is_torch_dist, saved_args, tracked_directory
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.torch_zip import check_checkpoint
from minimind_mcore.checkpoint.tracker import TRACKER, read_tracker
from minimind_mcore.errors import UserError, problems_of
from minimind_mcore.models.config import RouterWeight, named_router_weight
from minimind_mcore.training import sample_order
from minimind_mcore.training.checkpoint_fit import (
    check_layout,
    check_model,
    conversion,
    layout_settings,
    other_constants,
)

HF_FILES = ("config.json", "*.safetensors", "pytorch_model*.bin")


def form_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield problems of the format: checkpoints that MindSpeed-LLM could not read, or could not read again later."""
    for flag in ("load", "pretrained_checkpoint", "ref_model"):
        path = getattr(args, flag)
        if path and any(any(Path(path).glob(pattern)) for pattern in HF_FILES):
            yield (
                f"--{flag.replace('_', '-')} {path} is a Hugging Face model. MindSpeed-LLM 26.1.0 would convert it, "
                "and export it with queries, keys and values mixed up (docs/ascend.md, D1, D2); convert it first:\n"
                f"    {conversion(path, 'hf2mcore', layout_settings(ParallelLayout.from_args(args)))}"
            )
    if args.save and args.ckpt_format != "torch":
        yield (
            f"--ckpt-format {args.ckpt_format}: MindSpeed-LLM's converters read torch checkpoints only; "
            "add --ckpt-format torch"
        )


def fit_problems(args: argparse.Namespace, hosts: int) -> list[str]:
    """Return problems of checkpoints that would not load into the run: another model or layout, or no checkpoint."""
    checks = (partial(_check, args, flag, Path(path), hosts) for flag, path in _needed(args))
    return list(dict.fromkeys(problem for check in checks for problem in problems_of(check)))


def loaded_router_weight(args: argparse.Namespace) -> RouterWeight | None:
    """Return the router weight of the weights that the run starts with; None for random weights.

    A checkpoint that cannot be read counts as `normalized` here; `fit_problems` refuses it.
    """
    for flag, path in _needed(args):
        if flag in ("--load", "--pretrained-checkpoint"):
            try:
                return saved_router_weight(Path(path), args.ckpt_step if flag == "--load" else None) or "normalized"
            except UserError:
                return "normalized"
    return None


def saved_router_weight(root: Path, step: int | None = None) -> RouterWeight | None:
    """Return the router weight that the checkpoint below `root` names; None without experts or without a checkpoint.

    Raises:
        UserError: the checkpoint is damaged.
    """
    saved = _saved_mixture(root, step)
    return named_router_weight(vars(saved)) if saved else None


def saved_layout(root: Path) -> ParallelLayout | None:
    """Return the layout of the newest checkpoint below `root`; None without experts or without a checkpoint."""
    saved = _saved_mixture(root)
    return ParallelLayout.from_args(saved) if saved else None


def _saved_mixture(root: Path, step: int | None = None) -> argparse.Namespace | None:
    """Return the arguments of a checkpoint with experts."""
    if not _exists(root) or not (directory := _iteration(root, step)).is_dir():
        return None
    saved = saved_args(directory)
    return saved if getattr(saved, "num_experts", None) else None


def resumed(args: argparse.Namespace) -> Path | None:
    """Return the directory of the checkpoint that a run resumes from; None for a new run."""
    if args.finetune or not _exists(args.load):
        return None
    directory = _iteration(Path(args.load), args.ckpt_step)
    return directory if directory.is_dir() else None


def schedule_problems(args: argparse.Namespace) -> list[str]:
    """Return settings of `--override-opt_param-scheduler` that MindSpeed-LLM does not apply.

    Its schedule reads the maximum and the minimum learning rate from the optimizer's parameter groups, which come from
    the checkpoint (NVIDIA/Megatron-LM#1138).
    """
    directory = resumed(args)
    if not args.override_opt_param_scheduler or args.no_load_optim or directory is None or is_converted(directory):
        return []
    saved = saved_args(directory)
    flags = {"lr": "--lr", "min_lr": "--min-lr"}
    there, here = ({flag: getattr(one, name, None) for name, flag in flags.items()} for one in (saved, args))
    return [
        f"{flag} is {there[flag]} in {directory} and {here[flag]} on the command line: MindSpeed-LLM keeps the "
        f"checkpoint's value even with --override-opt_param-scheduler. Give {flag} {there[flag]}, or resume with "
        "BACKEND=native, or begin a new run with the weights (--finetune)"
        for flag in flags.values()
        if there[flag] is not None and here[flag] is not None and there[flag] != here[flag]
    ]


def resume_remarks(args: argparse.Namespace, directory: Path) -> Iterator[str]:
    """Yield remarks about a run that resumes from a checkpoint with other flags than the saved run's."""
    saved = saved_args(directory)
    if differing := sample_order.differences(vars(args), vars(saved)):
        yield sample_order.warning(directory, differing)
    if constants := other_constants(vars(args), vars(saved), directory, overridable=False):
        yield constants
    if args.no_load_optim:
        yield (
            f"--no-load-optim: Adam begins with zero moments. MindSpeed-LLM begins the learning-rate schedule at 0, "
            f"although the run goes on at iteration {getattr(saved, 'iteration', '?')}; BACKEND=native goes on with it"
        )


def check_pickles(root: Path) -> None:
    """Refuse the newest checkpoint below `root`, if any, when its pickles name classes that could run code."""
    if _exists(root):
        check_checkpoint(_iteration(root))


def _exists(root: str | Path | None) -> bool:
    """Return whether there is a checkpoint, by Megatron's criterion."""
    return root is not None and Path(root, TRACKER).is_file()


def _iteration(root: Path, step: int | None = None) -> Path:
    """Return the directory of the checkpoint of `step`, else of the one that the tracker file names."""
    return tracked_directory(root, str(step) if step else read_tracker(root)) or root / "iter_?"


def _needed(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield the flags of checkpoints that the run reads, with their paths. A checkpoint to resume from is optional."""
    if args.load and (_exists(args.load) or (args.finetune and not args.pretrained_checkpoint)):
        yield "--load", args.load
    elif args.pretrained_checkpoint:
        yield "--pretrained-checkpoint", args.pretrained_checkpoint
    elif args.load and (args.exit_on_missing_checkpoint or args.ckpt_step):
        yield "--load", args.load
    if args.stage == "dpo" and args.ref_model:
        yield "--ref-model", args.ref_model
    if args.lora_load and args.lora_target_modules:
        yield "--lora-load", args.lora_load


def _check(args: argparse.Namespace, flag: str, root: Path, hosts: int) -> None:
    """Refuse a checkpoint that a run with these flags could not load."""
    if not _exists(root):
        raise UserError(f"{flag} {root}: found no checkpoint there (no {TRACKER}); give a directory that has one")
    directory = _iteration(root, args.ckpt_step if flag == "--load" else None)
    if not directory.is_dir():
        raise UserError(f"{flag} {root}: {TRACKER} or --ckpt-step names {directory.name}, which is not there")
    convert = f"convert it:\n    {conversion(root, 'mcore2mcore', layout_settings(ParallelLayout.from_args(args)))}"
    if is_torch_dist(directory) and not args.auto_detect_ckpt_format:
        raise UserError(f"{flag} {directory} is of the format torch_dist, and MindSpeed-LLM reads torch; {convert}")
    check_checkpoint(directory)
    saved = saved_args(directory)
    if not (args.use_checkpoint_args or args.load_checkpoint_loosely):
        check_model(vars(args), vars(saved), directory)
    if args.use_checkpoint_args or is_torch_dist(directory):
        return
    check_layout(ParallelLayout.from_args(args), ParallelLayout.from_args(saved), directory, convert)
    missing = [name for name in ParallelLayout.from_args(saved).folders() if not (directory / name / NAME).is_file()]
    if missing and hosts == 1:  # with several hosts each may have only its own part on its disk
        raise UserError(f"{flag} {directory}: missing {', '.join(f'{name}/{NAME}' for name in missing)}")

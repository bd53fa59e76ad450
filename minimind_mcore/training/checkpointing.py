"""Checkpoints that are whole or not there.

    checkpoints/
        latest_checkpointed_iteration.txt      written last
        iter_0000100/
            manifest.json                      size and SHA-256 of every file
            mp_rank_00/model_optim_rng.pt ...  --ckpt-format torch: as MindSpeed-LLM reads and writes it
            .metadata, __0_0.distcp ...        --ckpt-format torch_dist: loads into any other layout

A save goes to a temporary directory, is synced, renamed, and only then named in the tracker file. A
load compares the files with their manifest; where the newest checkpoint is damaged it says so and
takes the newest whole one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from minimind_mcore.checkpoint.choose import choose, forget
from minimind_mcore.checkpoint.files import (
    PREFIX,
    TRACKER,
    content,
    directory_of,
    is_converted,
    is_torch_dist,
    iterations_in,
    saved_args,
)
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import (
    ModelConfig,
    RouterWeight,
    default_router_weight,
    named_router_weight,
    set_router_weight,
)
from minimind_mcore.platform import ranks
from minimind_mcore.storage import (
    atomic_write_text,
    disk_errors,
    disk_full,
    file_entry,
    publish_directory,
    write_manifest,
    writing,
)
from minimind_mcore.training import checkpoint_dist, checkpoint_torch, checkpoint_weights, sample_order
from minimind_mcore.training.checkpoint_fit import check_layout, check_model, check_optimizer, other_constants
from minimind_mcore.training.metrics import Progress
from minimind_mcore.training.model import weights_gathered
from minimind_mcore.training.optimizer import allocate_moments, build_scheduler
from minimind_mcore.training.step import Engine

CONVERTED = "holds weights and no optimizer: training starts at iteration 0 with sample 0, as with --finetune"


# ---------------------------------------------------------------------------------------------------- save


def save(args: argparse.Namespace, progress: Progress, engine: Engine) -> None:
    """Write the checkpoint of this iteration. Collective.

    Raises:
        UserError: the disk is full, on any rank; what was saved before is untouched.
    """
    root = Path(args.save)
    final = directory_of(root, progress.iteration)
    tmp = root / f".{final.name}.tmp"
    args.iteration = progress.iteration
    args.consumed_train_samples = progress.consumed
    args.skipped_train_samples = progress.skipped * args.global_batch_size
    if ranks.is_main():
        for stale in root.glob(f".{PREFIX}*.tmp"):
            shutil.rmtree(stale)
        tmp.mkdir(parents=True)
    _together(lambda: _require_space(args, tmp) if ranks.is_main() else None, tmp)
    form = checkpoint_dist if args.ckpt_format == "torch_dist" else checkpoint_torch
    if not args.no_save_optim:
        allocate_moments(engine.optimizer)
    with weights_gathered(args, engine.model):
        entries = _together(lambda: _write(form, args, tmp, engine), tmp)
    _together(lambda: _publish(root, tmp, final, entries, args) if ranks.is_main() else None, tmp)
    if ranks.is_main():
        print(f"saved checkpoint of iteration {progress.iteration} to {final}", flush=True)


def require_shared_directory(path: Path) -> None:
    """Refuse a directory that cannot be written, or that is not the same one on every host. Collective."""
    probe = path / ".shared-probe"

    def write() -> None:
        with writing(path, "give a directory of yours with --save (CKPT_SAVE_DIR)"):
            path.mkdir(parents=True, exist_ok=True)
            probe.touch()

    def look() -> None:
        if not probe.exists():
            raise UserError(f"{path}: rank {ranks.rank()} does not see what rank 0 wrote there; hosts must share it")

    ranks.check_on_main(write)
    try:
        ranks.together(look)
    finally:  # every rank has looked
        if ranks.is_main():
            probe.unlink(missing_ok=True)


def expected_bytes(args: argparse.Namespace) -> int:
    """What a checkpoint holds at least: weights, and in fp32 Adam's moments (and the weights of half precision).

    Under LoRA of the adapters alone.
    """
    width = 2 if args.bf16 or args.fp16 else 4
    optimizer = 0 if args.no_save_optim else (12 if width == 2 else 8)
    model, targets = ModelConfig.from_args(args), args.lora_target_modules
    saved = model.num_adapter_parameters(args.lora_r, targets) if targets else model.num_parameters()
    return saved * (width + optimizer)


def _require_space(args: argparse.Namespace, tmp: Path) -> None:
    """Refuse a save that cannot fit before any rank has begun to write."""
    free = free_bytes(args)
    if free < expected_bytes(args):
        raise disk_full(tmp, free, tmp)


def _write(form: Any, args: argparse.Namespace, tmp: Path, engine: Engine) -> dict[str, Any]:
    """This rank's files of the checkpoint; returns their manifest entries."""
    with disk_errors(tmp):
        files = form.write(args, tmp, engine)
        return {str(file.relative_to(tmp)): file_entry(file) for file in files}


def _publish(root: Path, tmp: Path, final: Path, entries: list[dict[str, Any]], args: argparse.Namespace) -> None:
    with disk_errors(final):
        write_manifest(tmp, {name: entry for part in entries for name, entry in part.items()})
        publish_directory(tmp, final)
        atomic_write_text(root / TRACKER, str(args.iteration))
    if args.keep_last:
        # A later one can only be damaged, or the run went back behind it: it does not count.
        older = [iteration for iteration in iterations_in(root) if iteration <= args.iteration]
        for iteration in older[args.keep_last :]:
            _remove(directory_of(root, iteration))


def _remove(directory: Path) -> None:
    """Remove an older checkpoint, or the link to one; the run goes on where that fails."""
    try:
        directory.unlink() if directory.is_symlink() else shutil.rmtree(directory)
    except OSError as error:
        _say(f"warning: {directory}: cannot be removed ({error.strerror or error}), as --keep-last asks", sys.stderr)


def _together(work: Any, tmp: Path) -> list[Any]:
    """See `ranks.together`; where a rank fails, what was written is removed."""
    try:
        return ranks.together(work)
    except UserError:
        if ranks.is_main():
            shutil.rmtree(tmp, ignore_errors=True)
        raise


# ---------------------------------------------------------------------------------------------------- load


def load(args: argparse.Namespace, engine: Engine) -> Progress:
    """Load `--load` into the model and, unless told otherwise, everything else. Collective.

    Returns:
        Where the saved run was; the beginning under `--finetune`, or if there is nothing to load.

    Raises:
        UserError: every checkpoint there is damaged, or belongs to another model or layout.
    """
    if _begins_elsewhere(args):
        args = _beginning(args, args.pretrained_checkpoint)
    if not args.load:
        return Progress()
    root = Path(args.load)
    if checkpoint_weights.is_model(root):
        source = checkpoint_weights.read_model(args, root, engine)
        _say(f"loaded weights of {root}: {source.kind}; training starts at the beginning")
        return Progress()
    directory = _chosen(args, root)
    if directory is None:
        _say(f"no checkpoint in {root}: starting from the beginning")
        return Progress()
    if not args.finetune and is_converted(directory):
        _say(f"{directory} {CONVERTED}")
        args = argparse.Namespace(**vars(args) | {"finetune": True})
    resharded = args.reshard and not is_torch_dist(directory) and checkpoint_weights.is_resharded(args, directory)
    if resharded:
        saved = checkpoint_weights.reshard(args, directory, engine)
        _say(f"resharded {directory} from {checkpoint_weights.saved_layout(directory)}: its optimizer starts anew")
    else:
        form = checkpoint_dist if is_torch_dist(directory) else checkpoint_torch
        saved = form.read(args, directory, engine)
    forget(directory)
    progress = _progress(args, saved)
    if not args.finetune and (args.no_load_optim or "opt_param_scheduler" not in saved):
        _say(_place_in_schedule(args, directory, progress, engine))
    elif not args.finetune and not resharded and (line := other_constants(args, saved["args"], directory)):
        _say(line, sys.stderr)
    _say(f"loaded {directory}: iteration {progress.iteration}, {progress.consumed} samples consumed")
    # In reinforcement learning the driver reads the prompts, and compares their order itself.
    differing = sample_order.differences(args, saved["args"]) if hasattr(args, "sample_order") else []
    if progress.consumed and differing:
        _say(sample_order.warning(directory, differing), sys.stderr)
    return progress


def _place_in_schedule(args: argparse.Namespace, directory: Path, progress: Progress, engine: Engine) -> str:
    """Continue the learning-rate schedule at the iteration of a checkpoint that gives no optimizer.

    Megatron-LM lets the schedule begin again at 0 under `--no-load-optim`, so that the learning rate of a resumed run
    never reaches its minimum.

    Returns:
        What a user should know.
    """
    updates = (progress.iteration - progress.skipped) * getattr(args, "updates_per_iteration", 1)
    engine.scheduler.step(increment=updates * args.global_batch_size)
    why = "--no-load-optim" if args.no_load_optim else f"{directory} holds no optimizer (--no-save-optim)"
    return (
        f"{why}: Adam begins with zero moments, and the learning-rate schedule goes on at iteration "
        f"{progress.iteration}. --finetune begins at iteration 0"
    )


def _begins_elsewhere(args: argparse.Namespace) -> bool:
    """Whether the run has not begun, and takes its weights from `--pretrained-checkpoint`, as Megatron's do."""
    begun = args.load and iterations_in(Path(args.load))
    return bool(args.pretrained_checkpoint and not args.lora_target_modules and not begun)


def _beginning(args: argparse.Namespace, path: str | Path) -> argparse.Namespace:
    """The same run as one that takes the weights of `path`, in whatever layout they are, and nothing else."""
    changes: dict[str, Any] = {"load": str(path), "finetune": True, "reshard": True, "ckpt_step": None}
    return argparse.Namespace(**vars(args) | changes | {"pretrained_checkpoint": None, "lora_target_modules": []})


def _chosen(args: argparse.Namespace, root: Path) -> Path | None:
    """The checkpoint to load; None if there is none, and need not be."""
    directory = choose(root, args.ckpt_step)
    if directory is None and (args.exit_on_missing_checkpoint or args.ckpt_step or args.finetune):
        raise UserError(f"{root}: found no checkpoint there; give where there is one")
    return directory


def load_weights(args: argparse.Namespace, path: Path, model: list[Any]) -> None:
    """The weights below `path` into the model, wrapped or not, and nothing else. Collective.

    Raises:
        UserError: as `load`.
    """
    load(_beginning(args, path), Engine(args, model))


def previews(args: argparse.Namespace, schedule: bool = True) -> dict[str, str]:
    """What a run would begin with, by a name, checked as far as that goes without reading weights into a model.

    Args:
        args: of the run.
        schedule: False where the length of the run is not known yet, and with it the learning-rate schedule.

    Raises:
        UserError: what `load` would raise.
    """
    found = {}
    if args.pretrained_checkpoint and (args.lora_target_modules or _begins_elsewhere(args)):
        found["begin with"] = _preview(_beginning(args, args.pretrained_checkpoint))
    if args.ref_model and not getattr(args, "reference_live", False):  # that one may be of any size
        found["reference"] = _preview(_beginning(args, args.ref_model))
    if args.load:
        found["load"] = _preview(args, not _begins_elsewhere(args), schedule)
    return found


def settle_router_weight(args: argparse.Namespace, **load: Any) -> str:
    """Set `args.router_weight`: what the command line names, else the loaded weights' rule, else the default.

    Collective.

    Args:
        args: changed in place.
        load: flags of loading, where the run does not load what `args` says.

    Returns:
        The rule and where it comes from, for the user; empty for a model without experts.
    """
    if not args.num_experts:
        return ""
    if rule := named_router_weight(args):
        origin = "from the command line"
    elif rule := _loaded_router_weight(argparse.Namespace(**vars(args) | load)):
        origin = "the rule of the loaded weights"
    else:
        rule, origin = default_router_weight(args.moe_router_topk), "the default of new training"
    set_router_weight(args, rule)
    return f"{rule} ({origin})"


def _loaded_router_weight(args: argparse.Namespace) -> RouterWeight | None:
    """The router weight of the weights that a run begins with; None if it begins with random weights. Collective."""
    begun = args.load and iterations_in(Path(args.load))
    if args.pretrained_checkpoint and not begun:
        args = _beginning(args, args.pretrained_checkpoint)
    if not args.load:
        return None
    root = Path(args.load)
    if checkpoint_weights.is_model(root):
        moe = open_source(root).config.moe
        return (moe and moe.router_weight) or "normalized"
    directory = _chosen(args, root)
    return (named_router_weight(saved_args(directory)) or "normalized") if directory else None


def _preview(args: argparse.Namespace, begun: bool = True, schedule: bool = False) -> str:
    root = Path(args.load)
    if checkpoint_weights.is_model(root):
        return f"weights of {root}: {checkpoint_weights.open_model(args, root).kind}"
    directory = _chosen(args, root) if begun else None
    if directory is None:
        return f"nothing in {root}: starts from the beginning"
    saved = saved_args(directory)
    check_model(args, saved, directory)
    if not (args.reshard or is_torch_dist(directory)):
        check_layout(args, saved, directory, checkpoint_torch.INSTEAD)
    if args.finetune:
        return str(directory)
    if is_converted(directory):
        return f"{directory} {CONVERTED}"
    if not args.no_load_optim:
        state = content(directory).get("opt_param_scheduler")
        if state is not None:
            check_optimizer(args, saved, directory)
        if schedule and state is not None:
            checkpoint_torch.load_schedule(build_scheduler(args, argparse.Namespace(param_groups=[])), state, directory)
    return str(directory)


def _progress(args: argparse.Namespace, saved: dict[str, Any]) -> Progress:
    if args.finetune:
        return Progress()
    iteration = int(saved["iteration"])
    # A converter's checkpoint has an iteration but no samples; MindSpeed-LLM counts them as consumed.
    consumed = getattr(saved["args"], "consumed_train_samples", 0) or iteration * args.global_batch_size
    skipped = getattr(saved["args"], "skipped_train_samples", 0) // args.global_batch_size
    return Progress(iteration, consumed, skipped)


def _say(text: str, file: Any = None) -> None:
    if ranks.is_main():
        print(text, file=file or sys.stdout, flush=True)


def free_bytes(args: argparse.Namespace) -> int:
    """Free bytes where `--save` is."""
    where = Path(args.save).absolute()
    while not where.exists():
        where = where.parent
    return shutil.disk_usage(os.fspath(where)).free

"""Save and load checkpoints atomically.

    checkpoints/
        latest_checkpointed_iteration.txt      written last
        iter_0000100/
            manifest.json                      size and SHA-256 of every file
            mp_rank_00/model_optim_rng.pt ...  --ckpt-format torch: as MindSpeed-LLM reads and writes it
            .metadata, __0_0.distcp ...        --ckpt-format torch_dist: loads into any other layout

A save goes to a temporary directory, which is synced and renamed. Only then the tracker file names it. A load compares
the files with their manifest. If the newest checkpoint is damaged, a warning says so and the newest undamaged one is
loaded.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from minimind_mcore import log
from minimind_mcore.checkpoint.choose import choose, forget
from minimind_mcore.checkpoint.files import (
    PREFIX,
    content,
    directory_of,
    is_converted,
    is_torch_dist,
    iterations_in,
    saved_args,
)
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.checkpoint.tracker import TRACKER
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import RouterWeight, default_router_weight, named_router_weight, router_weight_flags
from minimind_mcore.platform import ranks
from minimind_mcore.storage import (
    FileEntry,
    atomic_write_text,
    disk_errors,
    disk_full,
    file_entry,
    free_bytes,
    publish_directory,
    write_manifest,
    writing,
)
from minimind_mcore.training import checkpoint_dist, checkpoint_torch, checkpoint_weights, sample_order
from minimind_mcore.training.checkpoint_fit import check_layout, check_model, check_optimizer, other_constants
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.metrics import Progress
from minimind_mcore.training.model import weights_gathered
from minimind_mcore.training.optimizer import allocate_moments, build_scheduler
from minimind_mcore.training.step import Engine

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

logger = logging.getLogger(__name__)

T = TypeVar("T")
CONVERTED = "holds weights and no optimizer: training starts at iteration 0 with sample 0, as with --finetune"


# ---------------------------------------------------------------------------------------------------- save


def save(config: TrainConfig, progress: Progress, engine: Engine) -> None:
    """Write the checkpoint of this iteration. Collective.
    Raises:
        UserError: the disk of any rank is full. Earlier checkpoints are unchanged.
    """
    root = config.checkpoint.directory
    final = directory_of(root, progress.iteration)
    tmp = root / f".{final.name}.tmp"
    if ranks.is_main():
        for stale in root.glob(f".{PREFIX}*.tmp"):
            shutil.rmtree(stale)
        tmp.mkdir(parents=True)
    _together(lambda: _require_space(config, tmp) if ranks.is_main() else None, tmp)
    form = checkpoint_dist if config.checkpoint.ckpt_format == "torch_dist" else checkpoint_torch
    if not config.checkpoint.no_save_optim:
        allocate_moments(engine.optimizer)
    with weights_gathered(config, engine.model):
        entries = _together(lambda: _entries(lambda: form.write(config, tmp, engine, progress), tmp), tmp)
    kept = (progress.iteration, config.checkpoint.keep_last)
    _together(lambda: _publish(root, tmp, final, entries, *kept) if ranks.is_main() else None, tmp)
    logger.info(f"saved checkpoint of iteration {progress.iteration} to {final}")


def require_shared_directory(path: Path) -> None:
    """Check that a directory is writable, and the same directory on every host. Collective."""
    probe = path / ".shared-probe"

    def write() -> None:
        with writing(path, "give a writable directory with --save (CKPT_SAVE_DIR)"):
            path.mkdir(parents=True, exist_ok=True)
            probe.touch()

    def look() -> None:
        if not probe.exists():
            raise UserError(f"{path}: rank {ranks.rank()} does not see what rank 0 wrote there; hosts must share it")

    ranks.check_on_main(write)
    try:
        ranks.together(look)
    finally:  # wait until every rank has checked
        if ranks.is_main():
            probe.unlink(missing_ok=True)


def expected_bytes(config: TrainConfig) -> int:
    """Return the minimum size of a checkpoint: weights, Adam's moments in fp32, and fp32 copies of half-precision
    weights.

    Under LoRA only the adapters count.
    """
    width = 2 if config.precision.bf16 or config.precision.fp16 else 4
    optimizer = 0 if config.checkpoint.no_save_optim else (12 if width == 2 else 8)
    model, targets = config.architecture, config.model.lora_target_modules
    saved = model.num_adapter_parameters(config.model.lora_r, targets) if targets else model.num_parameters()
    return saved * (width + optimizer)


def _require_space(config: TrainConfig, tmp: Path) -> None:
    """Check the free disk space before any rank starts to write."""
    free = free_bytes(config.checkpoint.directory)
    if free < expected_bytes(config):
        raise disk_full(tmp, free, tmp)


def _entries(write: Callable[[], list[Path]], tmp: Path) -> dict[str, FileEntry]:
    """Write this rank's files of the checkpoint, and return their manifest entries."""
    with disk_errors(tmp):
        files = write()
        return {str(file.relative_to(tmp)): file_entry(file) for file in files}


def _publish(
    root: Path, tmp: Path, final: Path, entries: list[dict[str, FileEntry]], iteration: int, keep_last: int | None
) -> None:
    with disk_errors(final):
        write_manifest(tmp, {name: entry for part in entries for name, entry in part.items()})
        publish_directory(tmp, final)
        atomic_write_text(root / TRACKER, str(iteration))
    if keep_last:
        # Later checkpoints do not count: they are damaged, or the run resumed from an earlier iteration.
        older = [one for one in iterations_in(root) if one <= iteration]
        for one in older[keep_last:]:
            _remove(directory_of(root, one))


def _remove(directory: Path) -> None:
    """Remove an older checkpoint, or the link to one. A failure is only logged."""
    try:
        directory.unlink() if directory.is_symlink() else shutil.rmtree(directory)
    except OSError as error:
        logger.warning(f"{directory}: --keep-last could not remove it ({error.strerror or error})")


def _together(work: Callable[[], T], tmp: Path) -> list[T]:
    """Run `ranks.together`. If a rank fails, rank 0 removes the directory `tmp`."""
    try:
        return ranks.together(work)
    except UserError:
        if ranks.is_main():
            shutil.rmtree(tmp, ignore_errors=True)
        raise


# ---------------------------------------------------------------------------------------------------- load


def load(config: TrainConfig, engine: Engine, role: str = "") -> Progress:
    """Load `--load` into the model and, unless flags exclude them, optimizer, schedule and random states. Collective.

    Args:
        config: configuration of the run.
        engine: engine with the model.
        role: name of the model in messages, in programs with several models.

    Returns:
        The progress of the saved run. Zero under `--finetune`, or if there is no checkpoint.

    Raises:
        UserError: all checkpoints are damaged, or belong to another model or layout.
    """
    if _begins_elsewhere(config):
        config = _beginning(config, config.checkpoint.pretrained_checkpoint)
    if not config.checkpoint.load:
        return Progress()
    who = f"{role}: " if role else ""
    root = Path(config.checkpoint.load)
    if checkpoint_weights.is_model(root):
        source = checkpoint_weights.read_model(config, root, engine)
        start = "" if role else "; training starts at the beginning"
        logger.info(f"{who}loaded weights of {root}: {source.kind}{start}")
        return Progress()
    directory = _chosen(config, root)
    if directory is None:
        logger.info(f"{who}no checkpoint in {root}: starting from the beginning")
        return Progress()
    if not config.checkpoint.finetune and is_converted(directory):
        logger.info(f"{directory} {CONVERTED}")
        config = config.changed(finetune=True)
    resharded = (
        config.checkpoint.reshard
        and not is_torch_dist(directory)
        and checkpoint_weights.saved_layout(directory) != config.layout
    )
    if resharded:
        saved = checkpoint_weights.reshard(config, directory, engine)
        logger.info(
            f"resharded {directory} from {checkpoint_weights.saved_layout(directory)}: the optimizer starts from zero"
        )
    else:
        form = checkpoint_dist if is_torch_dist(directory) else checkpoint_torch
        saved = form.read(config, directory, engine)
    forget(directory)
    progress = _progress(config, saved)
    if not config.checkpoint.finetune and (config.checkpoint.no_load_optim or "opt_param_scheduler" not in saved):
        logger.info(_place_in_schedule(config, directory, progress, engine))
    elif (
        not config.checkpoint.finetune
        and not resharded
        and (line := other_constants(config.flags, vars(saved["args"]), directory))
    ):
        log.warn_once(logger, line)
    logger.info(f"{who}loaded {directory}: iteration {progress.iteration}, {progress.consumed} samples consumed")
    # In reinforcement learning the driver reads the prompts, and checks their order itself.
    own = config.record.sample_order
    differing = sample_order.differences(config.flags, vars(saved["args"]), own) if own else []
    if progress.consumed and differing:
        log.warn_once(logger, sample_order.warning(directory, differing))
    return progress


def _place_in_schedule(config: TrainConfig, directory: Path, progress: Progress, engine: Engine) -> str:
    """Resume the learning-rate schedule at the iteration of a checkpoint without optimizer.

    Megatron-LM restarts the schedule at 0 under `--no-load-optim`, so the learning rate of a resumed run never reaches
    its minimum.

    Returns:
        A message for the user.
    """
    updates = (progress.iteration - progress.skipped) * config.schedule.updates_per_iteration
    engine.scheduler.step(increment=updates * config.schedule.global_batch_size)
    why = "--no-load-optim" if config.checkpoint.no_load_optim else f"{directory} holds no optimizer (--no-save-optim)"
    return (
        f"{why}: Adam starts with zero moments, and the learning-rate schedule resumes at iteration "
        f"{progress.iteration}. --finetune starts at iteration 0"
    )


def _begins_elsewhere(config: TrainConfig) -> bool:
    """Return whether this is a new run that takes its weights from `--pretrained-checkpoint`, as in Megatron."""
    begun = config.checkpoint.load and iterations_in(Path(config.checkpoint.load))
    return bool(config.checkpoint.pretrained_checkpoint and not config.model.lora_target_modules and not begun)


def _beginning(config: TrainConfig, path: str | Path | None) -> TrainConfig:
    """Return a configuration that only loads the weights of `path`, saved in any layout."""
    changes = {"load": str(path), "finetune": True, "reshard": True, "ckpt_step": None}
    return config.changed(**changes, pretrained_checkpoint=None, lora_target_modules=[])


def _chosen(config: TrainConfig, root: Path) -> Path | None:
    """Return the checkpoint to load, or None if there is none and none is required."""
    directory = choose(root, config.checkpoint.ckpt_step)
    if directory is None and (
        config.checkpoint.exit_on_missing_checkpoint or config.checkpoint.ckpt_step or config.checkpoint.finetune
    ):
        raise UserError(f"{root}: found no checkpoint there; give a directory that has one")
    return directory


def load_weights(config: TrainConfig, path: Path, model: Sequence[MegatronModule], role: str = "") -> None:
    """Load the weights of `path` into the model, wrapped or not, and nothing else. Collective.

    Args:
        config: configuration of the run.
        path: path of the weights.
        model: the chunks.
        role: see `load`.

    Raises:
        UserError: see `load`.
    """
    load(_beginning(config, path), Engine(config, [*model]), role)


def previews(config: TrainConfig, schedule: bool = True) -> dict[str, str]:
    """Describe what a run would load, by name, without reading weights into a model.

    Args:
        config: configuration of the run.
        schedule: False if the length of the run, and so the learning-rate schedule, is not known yet.

    Raises:
        UserError: any error that `load` would raise.
    """
    if config.checkpoint.weights_pending:
        return {"begin with": f"{config.checkpoint.pretrained_checkpoint}, to be trained first"}
    found = {}
    if config.checkpoint.pretrained_checkpoint and (config.model.lora_target_modules or _begins_elsewhere(config)):
        found["begin with"] = _preview(_beginning(config, config.checkpoint.pretrained_checkpoint))
    if config.checkpoint.ref_model and not config.objective.reference_live:  # that one may be of any size
        found["reference"] = _preview(_beginning(config, config.checkpoint.ref_model))
    if config.checkpoint.load:
        found["load"] = _preview(config, not _begins_elsewhere(config), schedule)
    return found


def settle_router_weight(config: TrainConfig, **load: object) -> tuple[TrainConfig, str]:
    """Choose the router weight: the command line's, else the one stored with the loaded weights, else the default.

    Collective.

    Args:
        config: configuration of the run.
        load: loading flags that replace those of `config`.

    Returns:
        The configuration with the router weight, and a message with the choice and its source (empty without experts).
    """
    if not config.model.num_experts:
        return config, ""
    if rule := named_router_weight(config.flags):
        origin = "from the command line"
    elif rule := _loaded_router_weight(config.changed(**load)):
        origin = "the rule of the loaded weights"
    else:
        rule, origin = default_router_weight(config.model.moe_router_topk), "the default of new training"
    return config.changed(**router_weight_flags(rule, config.model.moe_router_topk)), f"{rule} ({origin})"


def _loaded_router_weight(config: TrainConfig) -> RouterWeight | None:
    """Return the router weight of the weights that a run loads, or None if it starts with random weights.
    Collective."""
    if config.checkpoint.weights_pending:
        return None
    begun = config.checkpoint.load and iterations_in(Path(config.checkpoint.load))
    if config.checkpoint.pretrained_checkpoint and not begun:
        config = _beginning(config, config.checkpoint.pretrained_checkpoint)
    if not config.checkpoint.load:
        return None
    root = Path(config.checkpoint.load)
    if checkpoint_weights.is_model(root):
        moe = open_source(root).config.moe
        return (moe and moe.router_weight) or "normalized"
    directory = _chosen(config, root)
    return (named_router_weight(vars(saved_args(directory))) or "normalized") if directory else None


def _preview(config: TrainConfig, begun: bool = True, schedule: bool = False) -> str:
    assert config.checkpoint.load
    root = Path(config.checkpoint.load)
    if checkpoint_weights.is_model(root):
        return f"weights of {root}: {checkpoint_weights.open_model(config, root).kind}"
    directory = _chosen(config, root) if begun else None
    if directory is None:
        return f"nothing in {root}: starts from the beginning"
    saved = saved_args(directory)
    check_model(config.flags, vars(saved), directory, config.record.tokenizer_fingerprint)
    if not (config.checkpoint.reshard or is_torch_dist(directory)):
        check_layout(config.layout, ParallelLayout.from_args(saved), directory, checkpoint_torch.INSTEAD)
    if config.checkpoint.finetune:
        return str(directory)
    if is_converted(directory):
        return f"{directory} {CONVERTED}"
    if not config.checkpoint.no_load_optim:
        state = content(directory).get("opt_param_scheduler")
        if state is not None:
            check_optimizer(config.flags, vars(saved), directory)
        if schedule and state is not None:
            checkpoint_torch.load_schedule(build_scheduler(config, torch.optim.SGD([torch.zeros(1)])), state, directory)
    return str(directory)


def _progress(config: TrainConfig, saved: dict[str, Any]) -> Progress:
    if config.checkpoint.finetune:
        return Progress()
    iteration = int(saved["iteration"])
    # A converter's checkpoint has an iteration but no sample count. MindSpeed-LLM counts its samples as consumed.
    consumed = getattr(saved["args"], "consumed_train_samples", 0) or iteration * config.schedule.global_batch_size
    skipped = getattr(saved["args"], "skipped_train_samples", 0) // config.schedule.global_batch_size
    return Progress(iteration, consumed, skipped)

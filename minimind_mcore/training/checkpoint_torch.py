"""`--ckpt-format torch`: one directory per model-parallel rank, in the layout of MindSpeed-LLM and Megatron.

    iter_0000100/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt     config, model, optimizer, schedule, RNG
                                       /distrib_optim.pt       with the distributed optimizer

Source: Megatron-LM core_v0.12.1, megatron/training/checkpointing.py. The checkpoint loads only into the same TP, PP and
EP.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minimind_mcore.checkpoint.files import NAME
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.torch_zip import load_torch
from minimind_mcore.errors import UserError
from minimind_mcore.platform import device, ranks
from minimind_mcore.training.checkpoint_fit import check_layout, check_model, check_optimizer
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.metrics import Progress
from minimind_mcore.training.optimizer import schedule_kept
from minimind_mcore.training.step import Engine

if TYPE_CHECKING:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import MegatronModule

logger = logging.getLogger(__name__)

OPTIMIZER_NAME = "distrib_optim.pt"
INSTEAD = (
    "give --reshard to load its weights into this layout, or convert the checkpoint (convert_ckpt_v2.py), or save with "
    "--ckpt-format torch_dist"
)


def rank_directory(directory: Path) -> Path:
    """Return the directory of this rank: `mp_rank_TT`, then `_PPP` if PP > 1, then `_EEE` if EP > 1."""
    from megatron.core import parallel_state as ps

    layout = ParallelLayout(
        pp=ps.get_pipeline_model_parallel_world_size(), ep=ps.get_expert_model_parallel_world_size()
    )
    stage, part = ps.get_pipeline_model_parallel_rank(), ps.get_expert_model_parallel_rank()
    return directory / layout.folder(ps.get_tensor_model_parallel_rank(), stage, part)


def model_keys(model: Sequence[MegatronModule]) -> list[str]:
    """Return the keys of the chunks: "model", or "model0", "model1", ... with virtual pipeline stages."""
    return ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]


def write(config: TrainConfig, directory: Path, engine: Engine, progress: Progress) -> list[Path]:
    """Write this rank's files and return them. Collective."""
    from megatron.core import parallel_state as ps

    folder, files = rank_directory(directory), []
    if config.parallel.use_distributed_optimizer and not config.checkpoint.no_save_optim:
        folder.mkdir(exist_ok=True)
        engine.optimizer.save_parameter_state(str(folder / OPTIMIZER_NAME))
        # Experts have their own data-parallel groups, with one optimizer file per expert rank.
        files = [p for p in [folder / OPTIMIZER_NAME] if p.is_file() and ps.get_expert_data_parallel_rank() == 0]
    rng = rng_states()
    if ps.get_expert_data_parallel_rank() != 0:
        return files
    state = common_state(config, engine, progress)
    for key, chunk in zip(model_keys(engine.model), engine.model, strict=True):
        state[key] = chunk.state_dict_for_save_checkpoint()
        if config.model.lora_target_modules:  # only the adapters are saved; the base weights stay in their file
            state[key] = _adapters(state[key])
    if not config.checkpoint.no_save_rng:
        state["rng_state"] = rng
    _convert_steps(state.get("optimizer", []), torch.tensor)
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / NAME)
    return [*files, folder / NAME]


def common_state(config: TrainConfig, engine: Engine, progress: Progress) -> dict[str, Any]:
    """Return the contents of a checkpoint other than weights and random states."""
    args = config.saved_arguments(
        iteration=progress.iteration,
        consumed_train_samples=progress.consumed,
        skipped_train_samples=progress.skipped * config.schedule.global_batch_size,
    )
    state: dict[str, Any] = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": progress.iteration,
        "num_floating_point_operations_so_far": 0,
    }
    if not config.checkpoint.no_save_optim:
        state |= {"optimizer": engine.optimizer.state_dict(), "opt_param_scheduler": engine.scheduler.state_dict()}
    return state


def read(config: TrainConfig, directory: Path, engine: Engine) -> dict[str, Any]:
    """Load this rank's part: model, optimizer, schedule. Return the saved dictionary."""
    folder = rank_directory(directory)
    if not (folder / NAME).is_file():
        found = ", ".join(sorted(p.name for p in directory.glob("mp_rank_*"))) or "none"
        raise UserError(
            f"{directory}: no {folder.name}, which this layout needs; it has {found}. A torch checkpoint loads into "
            f"the layout that saved it: {INSTEAD}"
        )
    state: dict[str, Any] = load_torch(folder / NAME)
    saved = vars(state["args"])
    check_model(config.flags, saved, directory, config.record.tokenizer_fingerprint)
    check_layout(config.layout, ParallelLayout.from_args(state["args"]), directory, INSTEAD)
    for key, chunk in zip(model_keys(engine.model), engine.model, strict=True):
        if key not in state:
            raise UserError(
                f"{folder / NAME}: no {key!r}: saved with another number of virtual pipeline stages; give --reshard to "
                "load its weights into this layout"
            )
        _load_chunk(config, chunk, state, key, directory)
    if not config.checkpoint.loads_optimizer or "optimizer" not in state:
        engine.take_weights()
    else:
        check_optimizer(config.flags, saved, directory)
        _convert_steps(state["optimizer"], int)
        with schedule_kept(config, engine.optimizer):
            engine.optimizer.load_state_dict(state["optimizer"])
        if config.parallel.use_distributed_optimizer:
            with torch.no_grad():  # megatron-core 0.12.1 copies into views of leaves that need gradients
                engine.optimizer.load_parameter_state(str(folder / OPTIMIZER_NAME))
        load_schedule(engine.scheduler, state["opt_param_scheduler"], directory)
    if not (config.checkpoint.finetune or config.checkpoint.no_load_rng) and "rng_state" in state:
        restore_rng(state["rng_state"])
    return state


def _convert_steps(state: list[dict[str, Any]] | dict[str, Any], kind: Callable[[Any], Any]) -> None:
    """Convert Adam's step in every parameter group. MindSpeed 2.2.0 accepts only a tensor; 26.1.0 accepts both.
    megatron-core compares the steps of the groups and needs plain numbers."""
    for part in state if isinstance(state, list) else [state]:
        for group in part.get("optimizer", part)["param_groups"]:
            if "step" in group:
                group["step"] = kind(group["step"])


def _adapters(state: Mapping[str, object]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if ".lora_" in name and isinstance(tensor, torch.Tensor)}


def _load_chunk(config: TrainConfig, chunk: MegatronModule, state: dict[str, Any], key: str, directory: Path) -> None:
    """Load the weights of one chunk. In a LoRA run load only the adapters, because the base is already loaded."""
    adapters, wants = _adapters(state[key]), bool(config.model.lora_target_modules)
    if bool(adapters) != wants:
        raise UserError(
            f"{directory}: found no LoRA adapters, expected adapters of --lora-target-modules; base weights belong to "
            "--pretrained-checkpoint"
            if wants
            else f"{directory}: holds LoRA adapters: merge them into their base first, or give --lora-target-modules"
        )
    if wants:
        for name in ("lora_r", "lora_alpha"):
            found, expected = getattr(state["args"], name), getattr(config.model, name)
            if found != expected:
                raise UserError(f"{directory}: {name} is {found} there and {expected} on the command line")
        _check_base(config, state["args"], directory)
        if adapters.keys() != _adapters(chunk.state_dict()).keys():
            found = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapters})
            raise UserError(f"{directory}: the adapters were trained with --lora-target-modules {' '.join(found)}")
    chunk.load_state_dict(adapters if wants else state[key], strict=not wants)


def _check_base(config: TrainConfig, saved: object, directory: Path) -> None:
    """Refuse adapters that were trained on other base weights, if the digest of those weights is known."""
    found, own = getattr(saved, "lora_base", None), str(config.record.lora_base)
    if found not in (None, own) and not config.checkpoint.finetune:
        base = getattr(saved, "pretrained_checkpoint", None)
        raise UserError(
            f"{directory}: its adapters were trained on other weights (digest {found[:12]}, of "
            f"{base} as it was then) than {config.checkpoint.pretrained_checkpoint} has "
            f"(digest {own[:12]}): give --pretrained-checkpoint with those weights to go on, or --finetune to begin "
            "a new run with these adapters"
        )


def load_schedule(scheduler: OptimizerParamScheduler, state: dict[str, Any], directory: Path) -> None:
    """Restore the position in the learning-rate schedule.

    Raises:
        UserError: the schedule differs from the command line's, and no flag selects one of them.
    """
    try:
        scheduler.num_steps = 0  # loading adds to the current count (one step under --lr-at-iteration-end)
        scheduler.load_state_dict(state)
    except AssertionError as error:
        raise UserError(
            f"{directory}: its learning-rate schedule differs from the command line ({error}); give "
            "--override-opt_param-scheduler to use the command line, --use-checkpoint-opt_param-scheduler to use "
            "the checkpoint; in a YAML of reinforcement learning set minimind.resume_schedule: override or checkpoint"
        ) from error


def rng_states() -> list[dict[str, Any]]:
    """Return the random states of every data-parallel rank, under Megatron's names. Collective."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    mine = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": device.rng_state(),
        "rng_tracker_states": tracker.get_states(),
    }
    return ranks.gather(mine, ps.get_data_parallel_group())


def restore_rng(states: list[dict[str, Any]]) -> None:
    """Restore `rng_states`. Megatron itself saves a single state for all data-parallel ranks."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    rank = ps.get_data_parallel_rank()
    state = states[rank] if len(states) == ps.get_data_parallel_world_size() else states[0]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    if len(state["cuda_rng_state"]) != len(device.rng_state()):
        # The generator state of a CPU has 5056 bytes, of a GPU 16, so neither can be restored on the other.
        logger.info(
            "the checkpoint was saved on another kind of device: dropout continues with random numbers of --seed"
        )
        return
    device.set_rng_state(state["cuda_rng_state"])
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states(state["rng_tracker_states"])

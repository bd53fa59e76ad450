"""`--ckpt-format torch_dist`: megatron-core's distributed checkpoint, which loads into any other layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from minimind_mcore.checkpoint import megatron_dist, unpickling
from minimind_mcore.checkpoint.torch_zip import check_checkpoint
from minimind_mcore.errors import UserError
from minimind_mcore.models.wrappers import unwrap
from minimind_mcore.training.checkpoint_fit import check_model, check_optimizer
from minimind_mcore.training.checkpoint_torch import common_state, load_schedule, model_keys, restore_rng, rng_states
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.metrics import Progress
from minimind_mcore.training.optimizer import schedule_kept
from minimind_mcore.training.step import Engine

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
    from megatron.core.transformer.module import MegatronModule


def _metadata(config: TrainConfig) -> dict[str, Any]:
    """Return the sharding options of megatron-core 0.16.1, for files that load on any number of ranks."""
    from megatron.core import parallel_state as ps

    metadata = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
    }
    # With the key present, even if it is false, the file would only load with the same number of expert ranks.
    if config.parallel.use_distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    return metadata


def _sharded_state(
    config: TrainConfig, model: list[MegatronModule], optimizer: ChainedOptimizer | None, loading: bool = True
) -> dict[str, Any]:
    """Return the sharded tensors of the model and, if an optimizer is given, of the optimizer."""
    metadata = _metadata(config)
    chunks = zip(model_keys(model), map(unwrap, model), strict=True)
    state = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in chunks}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
    return state


def _rng_object() -> ShardedObject:
    """Return the random states, as one object per (pipeline, tensor) rank."""
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    shape = (ps.get_pipeline_model_parallel_world_size(), ps.get_tensor_model_parallel_world_size())
    place = (ps.get_pipeline_model_parallel_rank(), ps.get_tensor_model_parallel_rank())
    replica = ps.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", rng_states(), shape, place, replica_id=replica)


def write(config: TrainConfig, directory: Path, engine: Engine, progress: Progress) -> list[Path]:
    """Write the checkpoint. Return the files that this rank hashes for the manifest. Collective."""
    _require_support()
    state = _sharded_state(
        config, engine.model, None if config.checkpoint.no_save_optim else engine.optimizer, loading=False
    )
    common = common_state(config, engine, progress)
    common.pop("optimizer", None)
    state |= common
    if not config.checkpoint.no_save_rng:
        state["rng_state"] = _rng_object()
    kept = {k: v for k, v in _metadata(config).items() if k != "dp_cp_group"}
    megatron_dist.save(state, directory, content_metadata=kept)
    dist.barrier()
    return sorted(p for p in directory.rglob("*") if p.is_file())[dist.get_rank() :: dist.get_world_size()]


def read(config: TrainConfig, directory: Path, engine: Engine) -> dict[str, Any]:
    """Load a checkpoint into this run's layout. Return the saved dictionary."""
    from megatron.core import dist_checkpointing

    _require_support()
    check_checkpoint(directory)
    with unpickling.restricted():
        saved = dist_checkpointing.load_common_state_dict(str(directory))
    flags, layout = vars(saved["args"]), config.layout
    check_model(config.flags, flags, directory, config.record.tokenizer_fingerprint)
    wants_optimizer = config.checkpoint.loads_optimizer and "opt_param_scheduler" in saved
    if wants_optimizer:
        check_optimizer(config.flags, flags, directory)
    state: Any = _sharded_state(config, engine.model, engine.optimizer if wants_optimizer else None)
    # Checkpoints of converters have no world size. Checkpoints saved with --no-save-rng have no random states.
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "world_size")
    same = [flags.get(name) for name in sizes] == [layout.tp, layout.pp, layout.world_size]
    wants_rng = same and not (config.checkpoint.finetune or config.checkpoint.no_load_rng or flags.get("no_save_rng"))
    if wants_rng:
        state["rng_state"] = _rng_object()
    with unpickling.restricted():
        state = dist_checkpointing.load(state, str(directory))
    for key, chunk in zip(model_keys(engine.model), engine.model, strict=True):
        unwrap(chunk).load_state_dict(state[key], strict=True)
    if wants_optimizer:
        fitted = fit_optimizers(state["optimizer"], saved["optimizer"], engine.optimizer.chained_optimizers)
        with schedule_kept(config, engine.optimizer):
            engine.optimizer.load_state_dict(fitted)
        load_schedule(engine.scheduler, saved["opt_param_scheduler"], directory)
    else:
        engine.take_weights()
    if wants_rng:
        restore_rng(state["rng_state"])
    return {**saved, **state}


def fit_optimizers(
    loaded: dict[Any, Any], common: dict[Any, Any], optimizers: list[MegatronOptimizer]
) -> dict[Any, Any]:
    """Return the states to load into this layout's optimizers. With EP > 1 the experts have an optimizer of their own.

    Args:
        loaded: optimizer part of the loaded state, already sharded for this layout.
        common: optimizer part of the data that the file stores once: {0: ..., 1: ...} if saved with EP > 1.
        optimizers: optimizers of this run.
    """
    if len(optimizers) == (2 if 0 in common else 1):
        return loaded
    saved = common.get(0, common)
    first = _inner(saved)["param_groups"][0]
    kept = {"step": first.get("step")} | {name: first[name] for name in ("betas", "eps") if name in first}
    fitted: dict[Any, dict[Any, Any]] = {}
    for i, optimizer in enumerate(optimizers):
        own = loaded[i] if len(optimizers) > 1 else {k: v for k, v in loaded.items() if not isinstance(k, int)}
        fitted[i] = _merged(own, saved)
        # Keep this run's parameter groups: learning rate and weight decay come from the schedule.
        groups = _inner(optimizer.state_dict())["param_groups"]  # pyright: ignore[reportArgumentType]
        _inner(fitted[i])["param_groups"] = [{**group, **kept} for group in groups]
    return fitted if len(optimizers) > 1 else fitted[0]


def _inner(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return torch's part of the state of a Megatron optimizer."""
    inner: dict[Any, Any] = state.get("optimizer", state)
    return inner


def _merged(first: object, second: object) -> Any:
    """Merge two nested dictionaries. Values of `first` take precedence."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return first
    return second | {key: _merged(value, second.get(key)) for key, value in first.items()}


def _require_support() -> None:
    """Refuse megatron-core 0.12.1, whose writer does not work with torch 2.13 (`_write_item` has another signature)."""
    from megatron.core.package_info import __version__ as version

    if tuple(int(part) for part in version.split(".")[:2]) < (0, 13):
        raise UserError(f"--ckpt-format torch_dist needs megatron-core 0.13 or newer, found {version}; use torch")

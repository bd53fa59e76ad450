"""Build Megatron's optimizer and learning-rate schedule from flags."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch

from minimind_mcore.inputs.flags import fields_from
from minimind_mcore.training.config import TrainConfig

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import MegatronModule

# Keys of a parameter group that override the schedule's own values, and Adam's constants.
SCHEDULED = ("max_lr", "min_lr", "start_wd", "end_wd", "betas", "eps")


def build_optimizer(
    config: TrainConfig, model: list[MegatronModule]
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """Build the optimizer (distributed or not) and the schedule of its learning rate and weight decay."""
    from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer

    # The fields have Megatron's names. Versions of megatron-core read different fields: 0.12.1 has no
    # overlap_param_gather.
    settings = {**vars(config.optimizer), **vars(config.precision), **vars(config.parallel), **vars(config.logging)}
    built = OptimizerConfig(**fields_from(OptimizerConfig, settings))
    options: dict[str, Any] = {}
    if config.optimizer.decay_all:
        # By default megatron-core applies no weight decay to vectors (norms). This override applies it to all weights.
        newer = "config_overrides" in inspect.signature(get_megatron_optimizer).parameters
        options = {"config_overrides": {}} if newer else {"no_weight_decay_cond": lambda name, parameter: False}
    optimizer = get_megatron_optimizer(built, model, **options)
    assert isinstance(optimizer, ChainedOptimizer)
    for part in optimizer.chained_optimizers:
        # megatron-core 0.16.1 sets no init_state_fn for SGD, and then fails to load a torch_dist checkpoint: TypeError.
        part.init_state_fn = part.init_state_fn or _begin_momentum
    _connect(config, model, optimizer)
    return optimizer, build_scheduler(config, optimizer)


def _begin_momentum(optimizer: torch.optim.Optimizer, config: object = None) -> None:
    """Set zero momentum for parameters that SGD has never updated. The first step replaces it by the gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group.get("momentum") and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.data)


def _connect(config: TrainConfig, model: list[MegatronModule], optimizer: ChainedOptimizer) -> None:
    """Set how megatron-core's schedules scale the loss, reduce gradients and gather weights."""
    from megatron.core.distributed import finalize_model_grads

    core = model[0].config

    def for_chunks(method: str) -> Any:
        functions = [getattr(chunk, method) for chunk in model]
        return functions if len(functions) > 1 else functions[0]

    core.grad_scale_func = optimizer.scale_loss
    core.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        core.no_sync_func = for_chunks("no_sync")
        core.grad_sync_func = for_chunks("start_grad_sync")
    if config.parallel.overlap_param_gather:
        core.param_sync_func = for_chunks("start_param_sync")


def build_scheduler(
    config: TrainConfig, optimizer: ChainedOptimizer | torch.optim.Optimizer
) -> OptimizerParamScheduler:
    """Build Megatron's schedule. It counts samples, so a change of the batch size does not move its position."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    schedule = config.schedule
    batch = schedule.global_batch_size
    scheduler = OptimizerParamScheduler(
        cast("ChainedOptimizer", optimizer),
        init_lr=schedule.lr_warmup_init,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=schedule.lr_warmup_iters * batch,
        lr_decay_steps=schedule.lr_decay_iters * batch,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=schedule.start_weight_decay,
        end_wd=schedule.end_weight_decay,
        wd_incr_steps=schedule.train_iters * batch,
        wd_incr_style=schedule.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=schedule.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=schedule.override_opt_param_scheduler,
        wsd_decay_steps=schedule.lr_wsd_decay_iters * batch if schedule.lr_wsd_decay_iters else None,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )
    if schedule.lr_at_iteration_end:
        scheduler.step(increment=batch)
    return scheduler


@contextlib.contextmanager
def schedule_kept(config: TrainConfig, optimizer: ChainedOptimizer) -> Iterator[None]:
    """With `--override-opt_param-scheduler`, keep learning rates and Adam's constants while a state is loaded.

    Megatron-LM overrides only the schedule's own values. Its schedule reads the maximum and the minimum from the
    parameter groups, and loading the optimizer replaces these groups by the checkpoint's.
    """
    own = [{name: group[name] for name in SCHEDULED if name in group} for group in optimizer.param_groups]
    yield
    if config.schedule.override_opt_param_scheduler:
        for group, values in zip(optimizer.param_groups, own, strict=True):
            group.update(values)


def allocate_moments(optimizer: ChainedOptimizer) -> None:
    """Set zero moments, Adam's initial state, for parameters that were never updated.

    With fp16 steps are skipped until the loss scale fits. Until the first applied step Adam has no moments, and
    megatron-core's distributed optimizer cannot save it: it raises KeyError: 'exp_avg'.
    """
    for part in optimizer.chained_optimizers:
        if not getattr(part, "is_stub_optimizer", False):
            part.init_state_fn(part.optimizer, part.config)
            for group in part.optimizer.param_groups:
                group.setdefault("step", 0)


def learning_rate(optimizer: ChainedOptimizer) -> float:
    """Return the learning rate of the next step."""
    return next(float(group["lr"]) for group in optimizer.param_groups if not group.get("is_decoupled_lr"))

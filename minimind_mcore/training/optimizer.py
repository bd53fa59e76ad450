"""Megatron's optimizer and learning-rate schedule, from flags."""

from __future__ import annotations

import argparse
import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

# What Megatron's schedule reads from a parameter group in place of its own value, and Adam's constants.
SCHEDULED = ("max_lr", "min_lr", "start_wd", "end_wd", "betas", "eps")


def build_optimizer(args: argparse.Namespace, model: list[Any]) -> tuple[Any, Any]:
    """The optimizer (distributed or not) and the schedule that sets its learning rate and weight decay."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer=args.optimizer,
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        sgd_momentum=args.sgd_momentum,
        clip_grad=args.clip_grad,
        params_dtype=args.params_dtype,
        bf16=args.bf16,
        fp16=args.fp16,
        loss_scale=args.loss_scale,
        initial_loss_scale=args.initial_loss_scale,
        min_loss_scale=args.min_loss_scale,
        loss_scale_window=args.loss_scale_window,
        hysteresis=args.hysteresis,
        use_distributed_optimizer=args.use_distributed_optimizer,
        log_num_zeros_in_grad=args.log_num_zeros_in_grad,
    )
    if hasattr(config, "overlap_param_gather"):  # megatron-core 0.12.1 reads it from the data-parallel config alone
        config.overlap_param_gather = args.overlap_param_gather
    options: dict[str, Any] = {}
    if args.decay_all:
        # megatron-core spares vectors (norms) from weight decay unless told what to spare: nothing.
        newer = "config_overrides" in inspect.signature(get_megatron_optimizer).parameters
        options = {"config_overrides": {}} if newer else {"no_weight_decay_cond": lambda name, parameter: False}
    optimizer = get_megatron_optimizer(config, model, **options)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # megatron-core 0.16.1 has none for SGD, and then cannot load a torch_dist checkpoint: TypeError.
        part.init_state_fn = part.init_state_fn or _begin_momentum
    _connect(args, model, optimizer)
    return optimizer, build_scheduler(args, optimizer)


def _begin_momentum(optimizer: Any, config: Any = None) -> None:
    """Give the parameters that SGD has never updated zero momentum, which the first step replaces by the gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group.get("momentum") and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.data)


def _connect(args: argparse.Namespace, model: list[Any], optimizer: Any) -> None:
    """Tell megatron-core's schedules how to scale the loss and when to reduce gradients and gather weights."""
    from megatron.core.distributed import finalize_model_grads

    config = model[0].config

    def for_chunks(method: str) -> Any:
        functions = [getattr(chunk, method) for chunk in model]
        return functions if len(functions) > 1 else functions[0]

    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        config.no_sync_func = for_chunks("no_sync")
        config.grad_sync_func = for_chunks("start_grad_sync")
    if args.overlap_param_gather:
        config.param_sync_func = for_chunks("start_param_sync")


def build_scheduler(args: argparse.Namespace, optimizer: Any) -> Any:
    """Megatron's schedule; it counts samples, so that a change of batch size keeps its place."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    batch = args.global_batch_size
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters * batch,
        lr_decay_steps=args.lr_decay_iters * batch,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=args.train_iters * batch,
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=args.lr_wsd_decay_iters * batch if args.lr_wsd_decay_iters else None,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )
    if args.lr_at_iteration_end:
        scheduler.step(increment=batch)
    return scheduler


@contextlib.contextmanager
def schedule_kept(args: argparse.Namespace, optimizer: Any) -> Iterator[None]:
    """Under `--override-opt_param-scheduler`, keep learning rates and Adam's constants while others are loaded.

    Megatron-LM overrides the schedule's own values only. Its schedule reads the maximum and the minimum from the
    parameter groups, and loading the optimizer replaces these groups by those of the checkpoint.
    """
    own = [{name: group[name] for name in SCHEDULED if name in group} for group in optimizer.param_groups]
    yield
    if args.override_opt_param_scheduler:
        for group, values in zip(optimizer.param_groups, own, strict=True):
            group.update(values)


def allocate_moments(optimizer: Any) -> None:
    """Give the parameters that were never updated zero moments, with which Adam begins.

    Under fp16 the steps are skipped until the loss scale fits. Before the first applied step Adam has no moments, and
    megatron-core cannot save it: its distributed optimizer raises KeyError: 'exp_avg'.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(part, "is_stub_optimizer", False):
            part.init_state_fn(part.optimizer, part.config)
            for group in part.optimizer.param_groups:
                group.setdefault("step", 0)


def learning_rate(optimizer: Any) -> float:
    """The learning rate of the next step."""
    return next(float(group["lr"]) for group in optimizer.param_groups if not group.get("is_decoupled_lr"))

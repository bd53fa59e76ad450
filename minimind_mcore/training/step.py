"""One training step: forward and backward over the micro-batches, then the optimizer."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from minimind_mcore.errors import UserError
from minimind_mcore.models.wrappers import unwrap
from minimind_mcore.platform import device
from minimind_mcore.training import liveness
from minimind_mcore.training.job import Job

Batches = list[Iterator[dict[str, Any]]]


@dataclass
class StepResult:
    """What one step did, as this rank knows it.

    Attributes:
        losses: per micro-batch, what the job's loss function logs: [summed loss, number, sum of each metric];
            empty before the last stage.
        indices: per micro-batch, the dataset indices of its samples.
        positions: tokens that went through the model, padding included.
        updated: False if fp16 gradients overflowed and the step was skipped.
        grad_norm: global gradient norm before clipping.
        zeros: gradients that are zero, if `--log-num-zeros-in-grad`.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    indices: list[list[int]] = field(default_factory=list)
    positions: int = 0
    updated: bool = True
    grad_norm: float = 0.0
    zeros: int | None = None


def _forward_step(job: Job, result: StepResult, batches: Iterator[dict[str, Any]], model: Any) -> Any:
    """megatron-core's forward-step function: the model's output and what turns it into a loss."""
    liveness.mark()
    batch = next(batches)
    if unwrap(model).post_process:  # the chunk that has the loss
        result.indices.append(batch["index"])
        result.positions += batch["tokens"].numel()
    return job.forward_step(batch, model)


def forward_backward(
    args: argparse.Namespace, job: Job, model: Any, batches: Batches, forward_only: bool = False
) -> StepResult:
    """Run the pipeline schedule over the micro-batches of one global batch."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    result = StepResult()
    result.losses = get_forward_backward_func()(
        forward_step_func=functools.partial(_forward_step, job, result),
        data_iterator=batches if len(model) > 1 else batches[0],
        model=model,
        num_microbatches=args.num_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size * job.sequences,
        forward_only=forward_only,
    )
    return result


def train_step(
    args: argparse.Namespace, job: Job, model: Any, optimizer: Any, scheduler: Any, batches: Batches, iteration: int = 0
) -> StepResult:
    """One update of the weights; `iteration` is its number, for messages.

    Raises:
        UserError: a loss or the gradient norm is not finite; the run must end there.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    result = forward_backward(args, job, model, batches)
    finish_step(args, result, optimizer, iteration)
    if result.updated:
        scheduler.step(increment=args.global_batch_size)
    return result


def finish_step(args: argparse.Namespace, result: StepResult, optimizer: Any, iteration: int) -> None:
    """Update the weights by the gradients of `forward_backward`, and note in `result` how that went.

    The losses are looked at after the update: the host waits for the device once in a step, where Megatron asks for
    the gradient norm. Nothing is saved of a step that ends in an error.

    Raises:
        UserError: see `train_step`.
    """
    result.updated, norm, result.zeros = optimizer.step()
    result.grad_norm = float(norm or 0.0)
    check_losses(result, iteration)
    check_norm(args, result, iteration)


def check_losses(result: StepResult, iteration: int) -> None:
    """Raise if a micro-batch has a loss that is not finite, naming its samples."""
    if not result.losses or bool(torch.isfinite(torch.stack(result.losses)).all()):
        return
    finite = [bool(torch.isfinite(loss).all()) for loss in result.losses]
    bad = [samples for samples, good in zip(result.indices, finite, strict=True) if not good]
    raise UserError(
        f"{_where(bad, iteration)}: the loss is not finite. Nothing of this iteration is saved; go on from the last "
        "checkpoint with a lower --lr or other data"
    )


def check_norm(args: argparse.Namespace, result: StepResult, iteration: int) -> None:
    """Raise if the gradient norm is not finite; under fp16 that is an overflow, and the step was skipped."""
    if not args.fp16 and not math.isfinite(result.grad_norm):
        raise UserError(f"{_where(result.indices, iteration)}: the gradient norm is {result.grad_norm}")


def _where(indices: list[list[int]], iteration: int) -> str:
    samples = [i for batch in indices for i in batch]
    return f"iteration {iteration}, rank {dist.get_rank()}, dataset indices {samples}"


def averages(args: argparse.Namespace, job: Job, results: list[StepResult]) -> tuple[list[float], float]:
    """Over a run of steps and all data-parallel ranks, the same on every rank: [loss, metrics of the job], positions.

    The mean over micro-batches of their means over tokens (or pairs), as Megatron reports it; over all
    tokens under `--calculate-per-token-loss`.
    """
    from megatron.core import parallel_state

    place = device.current().torch_device
    # the summed means, the number of micro-batches (or of tokens), the positions
    total = torch.zeros(len(job.metrics) + 3, dtype=torch.double, device=place)
    losses = [loss for result in results for loss in result.losses]
    if losses:
        stacked = torch.stack(losses).double()
        number, sums = stacked[:, 1:2], torch.cat([stacked[:, :1], stacked[:, 2:]], dim=1)
        if args.calculate_per_token_loss:
            total[:-2], total[-2] = sums.sum(0), number.sum()
        else:
            total[:-2], total[-2] = (sums / number.clamp(min=1)).sum(0), len(losses)
        total[-1] = sum(result.positions for result in results)
    # HCCL cannot sum float64, and MindSpeed's all_reduce of 26.1.0 then reduces a copy and loses the result.
    reduced = total.float()
    if losses:
        dist.all_reduce(reduced, group=parallel_state.get_data_parallel_group())
    # The last rank is in the last pipeline stage, where the losses are.
    dist.broadcast(reduced, src=dist.get_world_size() - 1)
    total = reduced.double()
    return (total[:-2] / total[-2].clamp(min=1)).tolist(), float(total[-1])

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

from minimind_mcore import device
from minimind_mcore.errors import UserError
from minimind_mcore.training.model import unwrap

Batches = list[Iterator[dict[str, torch.Tensor]]]


@dataclass
class StepResult:
    """What one step did, as this rank knows it.

    Attributes:
        losses: per micro-batch, [sum of the token losses, number of tokens]; empty before the last stage.
        indices: per micro-batch, the dataset indices of its samples.
        updated: False if fp16 gradients overflowed and the step was skipped.
        grad_norm: global gradient norm before clipping.
        zeros: gradients that are zero, if `--log-num-zeros-in-grad`.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    indices: list[list[int]] = field(default_factory=list)
    updated: bool = True
    grad_norm: float = 0.0
    zeros: int | None = None


def loss_function(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Sum of the masked token losses [mbs, seq], their number, and both for the log.

    megatron-core divides by the number per micro-batch, or once per step under
    `--calculate-per-token-loss`.
    """
    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    return total, tokens, torch.stack([total.detach(), tokens.float()])


def forward_step(indices: list[list[int]], batches: Iterator[dict[str, torch.Tensor]], model: Any) -> Any:
    """megatron-core's forward-step function: the model's output and what turns it into a loss."""
    batch = next(batches)
    if unwrap(model).post_process:  # the chunk that has the loss
        indices.append(batch["index"].tolist())
    output = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
    return output, functools.partial(loss_function, batch["loss_mask"])


def forward_backward(args: argparse.Namespace, model: Any, batches: Batches, forward_only: bool = False) -> StepResult:
    """Run the pipeline schedule over the micro-batches of one global batch."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    result = StepResult()
    result.losses = get_forward_backward_func()(
        forward_step_func=functools.partial(forward_step, result.indices),
        data_iterator=batches if len(model) > 1 else batches[0],
        model=model,
        num_microbatches=args.num_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=forward_only,
    )
    return result


def train_step(
    args: argparse.Namespace, model: Any, optimizer: Any, scheduler: Any, batches: Batches, iteration: int = 0
) -> StepResult:
    """One update of the weights; `iteration` is its number, for messages.

    Raises:
        UserError: a loss or the gradient norm is not finite; the run must end there.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    result = forward_backward(args, model, batches)
    check_losses(result, iteration)
    result.updated, norm, result.zeros = optimizer.step()
    result.grad_norm = float(norm or 0.0)
    if not args.fp16 and not math.isfinite(result.grad_norm):
        raise UserError(f"{_where(result.indices, iteration)}: the gradient norm is {result.grad_norm}")
    if result.updated:
        scheduler.step(increment=args.global_batch_size)
    return result


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


def _where(indices: list[list[int]], iteration: int) -> str:
    samples = [i for batch in indices for i in batch]
    return f"iteration {iteration}, rank {dist.get_rank()}, dataset indices {samples}"


def mean_loss(args: argparse.Namespace, results: list[StepResult]) -> float:
    """Loss of a run of steps, the same on every rank.

    The mean over micro-batches (and data-parallel ranks) of their mean token losses, as Megatron
    reports it; over all tokens under `--calculate-per-token-loss`.
    """
    from megatron.core import parallel_state

    losses = [loss for result in results for loss in result.losses]
    if losses:
        stacked = torch.stack(losses).double()
        if args.calculate_per_token_loss:
            total = stacked.sum(0)
        else:
            means = stacked[:, 0] / stacked[:, 1].clamp(min=1)
            total = torch.stack([means.sum(), torch.tensor(float(len(means)), dtype=torch.double, device=means.device)])
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    else:
        total = torch.zeros(2, dtype=torch.double, device=device.current().torch_device)
    # The last rank is in the last pipeline stage, where the losses are.
    dist.broadcast(total, src=dist.get_world_size() - 1)
    return float(total[0] / total[1].clamp(min=1))

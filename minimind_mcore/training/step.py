"""One training step: forward and backward over the micro-batches, then the optimizer."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from minimind_mcore.errors import UserError
from minimind_mcore.models.wrappers import unwrap
from minimind_mcore.platform import device
from minimind_mcore.training import liveness
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.job import Job, LossFunction, MicroBatch
from minimind_mcore.training.model import weights_gathered

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import MegatronModule

Batches = list[Iterator[MicroBatch]]
Output = tuple[torch.Tensor, LossFunction]


@dataclass
class StepResult:
    """The result of one step on this rank.

    Attributes:
        losses: per micro-batch, the values that the job's loss function logs: [summed loss, number, sum of each
            metric]. Empty before the last stage.
        indices: per micro-batch, the dataset indices of its samples.
        positions: number of tokens that the model processed, padding included.
        updated: False if fp16 gradients overflowed and the step was skipped.
        grad_norm: global gradient norm before clipping.
        zeros: number of zero gradients, with `--log-num-zeros-in-grad`.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    indices: list[list[int]] = field(default_factory=list)
    positions: int = 0
    updated: bool = True
    grad_norm: float = 0.0
    zeros: float | None = None


def _forward_step(job: Job, result: StepResult, batches: Iterator[MicroBatch], model: MegatronModule) -> Output:
    """Run megatron-core's forward step: return the model's output and the loss function."""
    liveness.mark()
    batch = next(batches)
    if unwrap(model).post_process:  # only the last chunk has a loss
        result.indices.append(batch["index"])
        result.positions += batch["tokens"].numel()
    return job.forward_step(batch, model)


class Engine:
    """Runs training steps on a model, for pretraining, post-training and reinforcement learning.

    Args:
        config: configuration of the run.
        model: this rank's chunks.
        optimizer: None for a model that is not trained.
        scheduler: learning-rate schedule, which counts samples.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: list[MegatronModule],
        optimizer: ChainedOptimizer | None = None,
        scheduler: OptimizerParamScheduler | None = None,
    ) -> None:
        self.config, self.model = config, model
        self._optimizer, self._scheduler = optimizer, scheduler

    @property
    def optimizer(self) -> ChainedOptimizer:
        """The optimizer. Only for a model that is trained."""
        assert self._optimizer is not None
        return self._optimizer

    @property
    def scheduler(self) -> OptimizerParamScheduler:
        """The schedule. Only for a model that is trained."""
        assert self._scheduler is not None
        return self._scheduler

    def forward_backward(self, job: Job, batches: Batches, micro_batches: int, forward_only: bool) -> StepResult:
        """Run the pipeline schedule over `micro_batches` micro-batches. `batches` has one iterator per chunk."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        result = StepResult()
        result.losses = get_forward_backward_func()(
            forward_step_func=functools.partial(_forward_step, job, result),
            data_iterator=batches if len(self.model) > 1 else batches[0],
            model=[*self.model],
            num_microbatches=micro_batches,
            seq_length=self.config.data.seq_length,
            micro_batch_size=self.config.schedule.micro_batch_size * job.sequences,
            forward_only=forward_only,
        )
        return result

    def step(self, job: Job, batches: Batches, micro_batches: int, samples: int, iteration: int) -> StepResult:
        """Update the weights once.

        The losses are checked after the update, so the host synchronizes with the device only once per step, where
        Megatron reads the gradient norm. A step that ends in an error is not saved.

        Args:
            job: provides the loss.
            batches: one iterator over micro-batches per chunk.
            micro_batches: number of micro-batches that this rank runs.
            samples: samples of the global batch, by which the schedule advances.
            iteration: number of the iteration, for messages.

        Raises:
            UserError: a loss or the gradient norm is not finite. The run must end.
        """
        for chunk in self.model:
            chunk.zero_grad_buffer()  # pyright: ignore[reportCallIssue]  (DistributedDataParallel)
        self.optimizer.zero_grad()
        result = self.forward_backward(job, batches, micro_batches, forward_only=False)
        result.updated, norm, result.zeros = self.optimizer.step()
        result.grad_norm = float(norm or 0.0)
        check_losses(result, iteration)
        # With fp16 a non-finite norm is an overflow, and the optimizer has skipped the step.
        if not (self.config.precision.fp16 or math.isfinite(result.grad_norm)):
            raise UserError(f"{_where(result.indices, iteration)}: the gradient norm is {result.grad_norm}")
        if result.updated:
            self.scheduler.step(increment=samples)
        return result

    def take_weights(self) -> None:
        """Update the optimizer's copies after other weights were loaded into the model."""
        if self._optimizer is not None:
            self._optimizer.reload_model_params()

    @torch.no_grad()
    def measure(self, job: Job, batches: Batches, micro_batches: int, rounds: int = 1) -> list[StepResult]:
        """Run the model without dropout and gradients, `rounds` times over `micro_batches` micro-batches."""
        trained = self._optimizer is not None
        for chunk in self.model:
            chunk.eval()
        with weights_gathered(self.config, self.model if trained else []):
            found = [self.forward_backward(job, batches, micro_batches, forward_only=True) for _ in range(rounds)]
        for chunk in self.model:
            chunk.train(trained)
        return found


def check_losses(result: StepResult, iteration: int) -> None:
    """Raise a `UserError` that names the samples if a micro-batch has a non-finite loss."""
    if not result.losses or bool(torch.isfinite(torch.stack(result.losses)).all()):
        return
    finite = [bool(torch.isfinite(loss).all()) for loss in result.losses]
    bad = [samples for samples, good in zip(result.indices, finite, strict=True) if not good]
    raise UserError(
        f"{_where(bad, iteration)}: the loss is not finite. This iteration is not saved; resume from the last "
        "checkpoint with a lower --lr or other data"
    )


def _where(indices: list[list[int]], iteration: int) -> str:
    samples = [i for batch in indices for i in batch]
    return f"iteration {iteration}, rank {dist.get_rank()}, dataset indices {samples}"


def averages(config: TrainConfig, job: Job, results: list[StepResult]) -> tuple[list[float], float]:
    """Average over steps and all data-parallel ranks. Return [loss, metrics of the job] and positions, on every rank.

    The average is the mean over micro-batches of their means over tokens (or pairs), as Megatron reports it. With
    `--calculate-per-token-loss` it is the mean over all tokens.
    """
    from megatron.core import parallel_state

    place = device.current().torch_device
    # the summed means, the number of micro-batches (or of tokens), the positions
    total = torch.zeros(len(job.metrics) + 3, dtype=torch.double, device=place)
    losses = [loss for result in results for loss in result.losses]
    if losses:
        stacked = torch.stack(losses).double()
        number, sums = stacked[:, 1:2], torch.cat([stacked[:, :1], stacked[:, 2:]], dim=1)
        if config.optimizer.calculate_per_token_loss:
            total[:-2], total[-2] = sums.sum(0), number.sum()
        else:
            total[:-2], total[-2] = (sums / number.clamp(min=1)).sum(0), len(losses)
        total[-1] = sum(result.positions for result in results)
    # HCCL cannot sum float64: MindSpeed 26.1.0's all_reduce then reduces a copy and loses the result.
    reduced = total.float()
    if losses:
        dist.all_reduce(reduced, group=parallel_state.get_data_parallel_group())
    # The last rank is in the last pipeline stage, which has the losses.
    dist.broadcast(reduced, src=dist.get_world_size() - 1)
    total = reduced.double()
    return (total[:-2] / total[-2].clamp(min=1)).tolist(), float(total[-1])

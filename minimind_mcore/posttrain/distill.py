"""Knowledge distillation (MiniMind, trainer/train_distillation.py) from labels and from a teacher's distribution.

loss = alpha * CE(labels) + (1 - alpha) * T^2 * KL(teacher || student), with both distributions at temperature T,
averaged over the tokens with a label. For a mixture of experts, alpha also multiplies the load-balancing loss.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from minimind_mcore.errors import require
from minimind_mcore.models.wrappers import unwrap
from minimind_mcore.posttrain.base import run_model
from minimind_mcore.posttrain.reference import FrozenModel
from minimind_mcore.posttrain.sft import SFT
from minimind_mcore.training.config import ObjectiveSection, TrainConfig
from minimind_mcore.training.data import MapDataset
from minimind_mcore.training.job import LossFunction, MicroBatch, averaged
from minimind_mcore.training.step import Engine

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import MegatronModule
    from torch.distributed import ProcessGroup


class Distill(SFT):
    """SFT whose loss also has the KL divergence from a teacher."""

    title = "distillation"
    metrics = ("ce_loss", "kl_loss")

    @classmethod
    @override
    def check(cls, config: TrainConfig) -> TrainConfig:
        require(
            bool(config.objective.teacher_model),
            "--teacher-model is missing: expected a Hugging Face directory or a directory of checkpoints",
        )
        return super().check(config)

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        super().prepare_model(chunks)
        if self.config.model.num_experts:
            for core in {id(chunk.config): chunk.config for chunk in chunks}.values():  # chunks may share a config
                core.moe_aux_loss_coeff = cast("float", core.moe_aux_loss_coeff) * self.config.objective.distill_alpha

    def begin(self, engine: Engine, datasets: list[MapDataset | None]) -> None:
        self.teacher = FrozenModel(self.config, str(self.config.objective.teacher_model))

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        taught = self.teacher(batch) if unwrap(model).post_process else None
        return run_model(model, batch), functools.partial(distillation_loss, self.config.objective, batch, taught)


def distillation_loss(
    objective: ObjectiveSection, batch: MicroBatch, taught: Tensor | None, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss of the module's formula, as a `LossFunction`.

    Args:
        objective: alpha and temperature.
        batch: the micro-batch.
        taught: this rank's shard of the teacher's logits [rows, length, vocabulary / TP].
        logits: this rank's shard of the student's logits, same shape.
    """
    from megatron.core.parallel_state import get_tensor_model_parallel_group
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    assert taught is not None  # only the last chunk has a loss
    mask, temperature = batch["loss_mask"], objective.distill_temperature
    group = cast("ProcessGroup", get_tensor_model_parallel_group())
    kl = vocab_parallel_kl(logits, taught, temperature, group)
    # Computed last, because megatron-core's cross-entropy overwrites fp32 logits.
    ce = vocab_parallel_cross_entropy(logits.float(), batch["labels"])
    kl_total, ce_total = temperature**2 * (kl * mask).sum(), (ce * mask).sum()
    total = objective.distill_alpha * ce_total + (1 - objective.distill_alpha) * kl_total
    return averaged(total, mask.sum(), ce_total, kl_total)


def vocab_parallel_kl(student: Tensor, teacher: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
    """Return KL(teacher || student) of each position over the whole vocabulary, in fp32.

    Args:
        student: this rank's shard of the student's logits [..., vocabulary / TP].
        teacher: this rank's shard of the teacher's logits, without gradient.
        temperature: divisor of both logits.
        group: the ranks that hold the shards.
    """
    kl: Tensor = _VocabParallelKL.apply(student, teacher, temperature, group)  # type: ignore[no-untyped-call]
    return kl


class _VocabParallelKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
        log_p = _log_softmax(teacher.float() / temperature, group)
        log_q = _log_softmax(student.float() / temperature, group)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).sum(-1)
        dist.all_reduce(kl, group=group)
        ctx.save_for_backward(p, log_q)
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        p, log_q = ctx.saved_tensors
        return ((log_q.exp() - p) * (grad / ctx.temperature)[..., None]).to(ctx.dtype), None, None, None


def _log_softmax(logits: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's shard of the log-softmax over the whole vocabulary."""
    largest = logits.amax(-1, keepdim=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits - largest
    total = shifted.exp().sum(-1, keepdim=True)
    dist.all_reduce(total, group=group)
    return shifted - total.log()

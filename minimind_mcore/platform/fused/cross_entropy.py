"""Cross-entropy of half-precision logits without an fp32 copy of the logits.

This loss is for CPUs, and for GPUs on which torch.compile does not work. Other GPUs use the loss of `compiled.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows converted to fp32 at a time. With MiniMind's vocab size of 6400, 64 rows take 1.6 MB and fit in the CPU cache.
# A GPU needs larger blocks, because it starts several kernels for each block: 2048 rows take 52 MB of its memory.
CPU_BLOCK, GPU_BLOCK = 64, 2048


def block_rows(logits: Tensor) -> int:
    """Return the number of rows that are converted to fp32 at a time on the device of `logits`."""
    return CPU_BLOCK if logits.device.type == "cpu" else GPU_BLOCK


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `-log softmax(logits)` at the labels, fp32, for logits whose vocabulary is split over the TP group.

    Args:
        logits: [sequence, batch, vocabulary / TP].
        labels: [sequence, batch], ids of the whole vocabulary.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        from megatron.core import parallel_state

        group: Any = parallel_state.get_tensor_model_parallel_group()
        split = dist.get_world_size(group) > 1
        rows = logits.reshape(-1, logits.shape[-1])
        local = labels.reshape(-1, 1) - dist.get_rank(group) * rows.shape[1]
        here = (local >= 0) & (local < rows.shape[1])  # the label is in this rank's shard of the vocabulary
        local = local.clamp(0, rows.shape[1] - 1)
        largest = rows.amax(-1, keepdim=True).float()
        if split:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        ctx.block = block_rows(rows)
        blocks = zip(torch.split(rows, ctx.block), torch.split(largest, ctx.block), strict=True)
        sums = torch.cat([(block.float() - top).exp_().sum(-1, keepdim=True) for block, top in blocks])
        both = torch.stack([sums, rows.gather(1, local).float().mul_(here)])
        if split:
            dist.all_reduce(both, group=group)
        log_sum = both[0].log() + largest
        ctx.save_for_backward(rows, local, here, log_sum)
        ctx.shape = logits.shape
        return (log_sum - both[1]).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        saved = (*ctx.saved_tensors, grad.reshape(-1, 1))
        result = torch.empty_like(saved[0])
        blocks = zip(*(torch.split(x, ctx.block) for x in (result, *saved)), strict=True)
        for out, rows, local, here, log_sum, scale in blocks:
            shares = (rows.float() - log_sum).exp_()
            out.copy_(shares.scatter_add_(1, local, -here.float()).mul_(scale))
        return result.view(ctx.shape), None

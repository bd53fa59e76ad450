"""The operations of a layer and the loss for a GPU: plain formulas, each of which torch.compile turns into one kernel.

torch's eager operations read and write a tensor each; between the matrix products of a small model these took more than
half of a step on an H200 (docs/benchmarks.md). Only these functions are compiled, not the model: the compiler does not
meet Megatron's autograd functions, and all of them are ready seconds after the first step has begun. The formulas
compute in fp32 and round their result once.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@functools.cache
def usable() -> bool:
    """Whether torch.compile can make kernels here: for CUDA it needs Triton, and Triton needs a C compiler."""
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "cc", "clang"))
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None and has_compiler


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `elementwise.rms_norm`."""
    return compiled(_rms_norm)(_rows(x), weight, eps).view(x.shape)


def swiglu(x: Tensor) -> Tensor:
    """As `elementwise.swiglu`, but `x` stays as it is."""
    return compiled(_swiglu)(_rows(x)).view(*x.shape[:-1], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `elementwise.rotate`, for angles [sequence, 1, ..., n/2] that only the position decides."""
    positions = x.shape[0]
    flat = _dynamic(x.reshape(positions, -1, x.shape[-1]))
    angles = [_dynamic(part.reshape(positions, 1, -1)) for part in (cos, sin)]
    return compiled(_rotate)(flat, *angles).view(x.shape)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `-log softmax(logits)` at the labels, fp32, for logits whose vocabulary is split over the TP group.

    No fp32 copy of the logits is made: each of the three passes over them computes in registers.

    Args:
        logits: [sequence, batch, vocabulary / TP].
        labels: [sequence, batch], ids of the whole vocabulary.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `function` compiled. Not a decorator: torch.compile imports its compiler, which takes seconds."""
    return torch.compile(function)


def _rows(x: Tensor) -> Tensor:
    """[..., n] as [rows, n]."""
    return _dynamic(x.reshape(-1, x.shape[-1]))


def _dynamic(x: Tensor) -> Tensor:
    """Have one kernel serve any size of `x` but that of its last axis, whose kernels differ by more than a bound."""
    import torch._dynamo

    for axis in range(x.dim() - 1):
        torch._dynamo.maybe_mark_dynamic(x, axis)
    torch._dynamo.mark_static(x, x.dim() - 1)
    return x


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        from megatron.core import parallel_state

        group: Any = parallel_state.get_tensor_model_parallel_group()
        rows = _rows(logits)
        # Ids of this rank's part of the vocabulary; others are found nowhere.
        local = _dynamic((labels.reshape(-1, 1) - dist.get_rank(group) * logits.shape[-1]).contiguous())
        largest = compiled(_largest)(rows)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums = compiled(_sums)(rows, local, largest)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(sums, group=group)
        log_sum = sums[0].log() + largest
        ctx.save_for_backward(rows, local, log_sum)
        ctx.shape = logits.shape
        return (log_sum - sums[1]).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, local, log_sum = ctx.saved_tensors
        found = compiled(_logits_gradient)(_dynamic(rows), _dynamic(local), log_sum, grad.reshape(-1, 1))
        return found.view(ctx.shape), None


def _largest(rows: Tensor) -> Tensor:
    """[rows, 1]."""
    return rows.amax(-1, keepdim=True).float()


def _sums(rows: Tensor, local: Tensor, largest: Tensor) -> Tensor:
    """[2, rows, 1]: the sum of exp(logit - largest), and the logit of the label, 0 if it is another rank's."""
    wide = rows.float()
    labelled = torch.where(_is_label(rows, local), wide, 0.0)
    return torch.stack([(wide - largest).exp().sum(-1, keepdim=True), labelled.sum(-1, keepdim=True)])


def _logits_gradient(rows: Tensor, local: Tensor, log_sum: Tensor, grad: Tensor) -> Tensor:
    return (((rows.float() - log_sum).exp() - _is_label(rows, local).float()) * grad.float()).to(rows.dtype)


def _is_label(rows: Tensor, local: Tensor) -> Tensor:
    return torch.arange(rows.shape[-1], device=rows.device) == local

"""RMSNorm, SwiGLU and rotary embedding, each as one node of autograd's graph; for torch.compile their formulas.

An eager backward pass of such a chain costs many times its arithmetic in memory traffic: one tensor an
operation, a copy for every `chunk`. These save the input alone and write into their results.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimind_mcore.platform import ascend
from minimind_mcore.platform.fused import compiled


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis of `x` [..., n], in fp32; `weight` is [n]."""
    if torch.compiler.is_compiling():
        return compiled.rms_norm(x, weight, eps)
    if ascend.operators():
        return ascend.rms_norm(x, weight, eps)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _apply(_RMSNorm, x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) * up` [..., n] of `x` [..., 2 n], gate before up.

    The backward pass overwrites `x`, so nothing else may need it, and there is one such pass only.
    """
    if torch.compiler.is_compiling():
        return compiled.swiglu(x)
    if x.numel() and ascend.operators():  # CANN refuses the empty input of an expert without tokens
        return ascend.swiglu(x)
    return _apply(_SwiGLU, x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + n/2) of the last axis of `x` [sequence, ..., n] by an angle of its own.

    Args:
        x: queries or keys.
        cos: cosines of the n/2 angles, of a shape that broadcasts to x's halves.
        sin: their sines.
    """
    if torch.compiler.is_compiling():
        return compiled.rotate(x, cos, sin)
    if ascend.operators():
        return ascend.rotate(x, cos, sin)
    return _apply(_Rotary, x, cos, sin)


def _apply(function: Any, *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale: Tensor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows = (grad * x).view(-1, x.shape[-1])
        weight_grad = torch.mv(rows.t(), scale.view(-1))
        # d scale / dx = -scale^3 x / n
        along = torch.mv(rows, weight).view_as(scale).mul_(scale.pow(3)).div_(x.shape[-1])
        return (grad * weight).mul_(scale).addcmul_(x, along, value=-1), weight_grad, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.used = False
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # The gradient takes x's place: writing as much memory anew costs more than the arithmetic.
        if ctx.used:
            raise RuntimeError("SwiGLU has no second backward pass: the first one overwrites what it needs")
        ctx.used = True
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        gate_factor = grad * up
        torch.mul(F.silu(gate), grad, out=up)
        torch.ops.aten.silu_backward.grad_input(gate_factor, gate, grad_input=gate)
        result: Tensor = x
        return result


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (left, right), (out_left, out_right) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(left, cos, out=out_left).addcmul_(right, sin, value=-direction)
    torch.mul(right, cos, out=out_right).addcmul_(left, sin, value=direction)
    return out

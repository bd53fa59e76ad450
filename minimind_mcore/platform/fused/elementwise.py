"""RMSNorm, SwiGLU and rotary embedding, each as one node of the autograd graph. torch.compile gets the plain formulas.

The eager backward pass of such a chain is limited by memory traffic: each operation writes a tensor, and each `chunk`
makes a copy. The functions here save only their input and write into their results.
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
    """Return `weight * x / sqrt(mean(x^2) + eps)`, over the last axis of `x` [..., n], in fp32. `weight` is [n]."""
    if torch.compiler.is_compiling():
        return compiled.rms_norm(x, weight, eps)
    if ascend.operators():
        return ascend.rms_norm(x, weight, eps)
    if x.device.type == "cpu":
        return _apply(_RMSNorm, x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """Return `silu(gate) * up` [..., n], where `x` [..., 2 n] is gate and up.

    The backward pass overwrites `x`. Therefore no other operation may need `x`, and backward can run only once.
    """
    if torch.compiler.is_compiling():
        return compiled.swiglu(x)
    if x.numel() and ascend.operators():  # CANN rejects empty input (an expert without tokens)
        return ascend.swiglu(x)
    return _apply(_SwiGLU, x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + n/2) of the last axis of `x` [sequence, ..., n] by its own angle.

    Args:
        x: queries or keys.
        cos: cosines of the n/2 angles, broadcastable to the halves of `x`.
        sin: sines of the same angles.
    """
    if torch.compiler.is_compiling():
        return compiled.rotate(x, cos, sin)
    if ascend.operators():
        return ascend.rotate(x, cos, sin)
    return _apply(_Rotary, x, cos, sin)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a CPU computes with `x`: fp32 for half precision, else the dtype of `x`."""
    return torch.promote_types(x.dtype, torch.float32)


def _apply(function: Any, *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(wide_dtype(x))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale: Tensor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        narrow, narrow_weight, scale = ctx.saved_tensors
        grad, x, weight = (tensor.to(scale.dtype) for tensor in (grad, narrow, narrow_weight))
        rows = (grad * x).reshape(-1, x.shape[-1])
        weight_grad = torch.mv(rows.t(), scale.view(-1))
        # d scale / dx = -scale^3 x / n
        along = torch.mv(rows, weight).view_as(scale).mul_(scale.pow(3)).div_(x.shape[-1])
        x_grad = (grad * weight).mul_(scale).addcmul_(x, along, value=-1)
        return x_grad.to(narrow.dtype), weight_grad.to(narrow_weight.dtype), None


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
        # The gradient is written into x, because allocating and writing new memory costs more than the arithmetic.
        if ctx.used:
            raise RuntimeError(
                "SwiGLU has no second backward pass, because the first backward pass overwrites the input"
            )
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
    narrow = x.dtype
    if x.device.type == "cpu":  # on a CPU torch's addcmul is six times slower in bf16 than in fp32
        x, cos, sin = (tensor.to(wide_dtype(tensor)) for tensor in (x, cos, sin))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (left, right), (out_left, out_right) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(left, cos, out=out_left).addcmul_(right, sin, value=-direction)
    torch.mul(right, cos, out=out_right).addcmul_(left, sin, value=direction)
    return out.to(narrow)

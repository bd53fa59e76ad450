"""Norms, activations and rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .precision import wide


def npu_rms_norm(self: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> Any:
    x = wide(self)
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    # gamma may span several trailing dimensions
    if gamma.dim() > 1:
        dims = tuple(range(-gamma.dim(), 0))
        rstd = torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + epsilon)
    y = x * rstd * wide(gamma)
    return y.to(self.dtype), rstd


def npu_rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor) -> Any:
    xw, dyw, g = wide(x), wide(dy), wide(gamma)
    dims = tuple(range(-gamma.dim(), 0))
    xhat = xw * rstd
    dxhat = dyw * g
    dx = (dxhat - xhat * (dxhat * xhat).mean(dims, keepdim=True)) * rstd
    lead = tuple(range(x.dim() - gamma.dim()))
    dgamma = (dyw * xhat).sum(lead) if lead else dyw * xhat
    return dx.to(x.dtype), dgamma.to(torch.float32)


def npu_add_rms_norm(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> Any:
    x = x1 + x2
    y, rstd = npu_rms_norm(x, gamma, epsilon)
    return y, rstd, x


def npu_swiglu(self: torch.Tensor, dim: Any = -1) -> torch.Tensor:
    a, b = torch.chunk(wide(self), 2, dim=dim)
    return (F.silu(a) * b).to(self.dtype)


def npu_swiglu_backward(grad_output: torch.Tensor, self: torch.Tensor, dim: Any = -1) -> torch.Tensor:
    with torch.enable_grad():
        x = self.detach().requires_grad_(True)
        y = npu_swiglu(x, dim)
    return torch.autograd.grad(y, x, grad_output)[0]


def npu_gelu(self: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    return F.gelu(self, approximate=approximate)


def fast_gelu(self: torch.Tensor) -> torch.Tensor:
    return self * torch.sigmoid(1.702 * self)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def _rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((-b, a), dim=-1).flatten(-2)


def npu_rotary_mul(input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half") -> torch.Tensor:
    x = wide(input)
    turned = _rotate_half(x) if rotary_mode == "half" else _rotate_pairs(x)
    return (x * wide(r1) + turned * wide(r2)).to(input.dtype)


def npu_rotary_position_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: int = 0) -> torch.Tensor:
    return npu_rotary_mul(x, cos, sin, "half" if mode == 0 else "interleave")

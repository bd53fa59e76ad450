"""Optimizer steps."""

from __future__ import annotations

import math
from typing import Any

import torch

from .precision import wide


def npu_apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: torch.Tensor,
    max_grad_norm: Any = None,
    amsgrad: bool = False,
    maximize: bool = False,
    *,
    out: Any,
) -> Any:
    """One AdamW step; the powers are those of the previous step (the op advances them)."""
    var, m, v = out
    b1p, b2p = beta1_power * beta1, beta2_power * beta2
    g = (-grad if maximize else grad).to(m.dtype)
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    new = wide(var) * (1 - lr * weight_decay)
    denom = (v / (1 - b2p)).sqrt().add_(epsilon)
    new = new - lr * (m / (1 - b1p)) / denom
    var.copy_(new)
    return var, m, v


def npu_apply_adam(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: torch.Tensor,
    use_locking: bool = False,
    use_nesterov: bool = False,
    *,
    out: Any,
) -> Any:
    var, m, v = out
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step = lr * math.sqrt(1 - beta2_power) / (1 - beta1_power)
    var.sub_(step * m / (v.sqrt() + epsilon))
    return var, m, v

"""The norms of MiniMind's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimind_mcore.platform import ascend
from minimind_mcore.platform.fused.elementwise import rms_norm


class RMSNorm(torch.nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, in float32 and rounded once.

    That is minimind-3's order. MiniMind2 rounds to half precision before it multiplies with the
    weight; in float32 there is no difference.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank sees a part of the sequence: Megatron must add up the weight's gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., hidden_size]."""
        return rms_norm(x, self.weight, self.eps)


class Norm:
    """The norm of this platform."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        if ascend.active():
            return ascend.norm(config, hidden_size, eps)
        return RMSNorm(config, hidden_size, eps)

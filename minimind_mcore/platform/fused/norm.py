"""RMSNorm for MiniMind's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimind_mcore.platform import ascend
from minimind_mcore.platform.fused.elementwise import rms_norm


class RMSNorm(torch.nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, computed in fp32 and rounded once.

    minimind-3 rounds in the same place. MiniMind2 rounds to half precision before multiplying by the weight. In fp32
    both are equal.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # With sequence parallelism each rank sees a part of the sequence, so Megatron must sum the weight's gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` [..., hidden_size]."""
        return rms_norm(x, self.weight, self.eps)


class Norm:
    """Construct the RMSNorm of this platform: the Ascend kernel on an NPU, else `RMSNorm`."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        if ascend.active():
            return ascend.norm(config, hidden_size, eps)
        return RMSNorm(config, hidden_size, eps)

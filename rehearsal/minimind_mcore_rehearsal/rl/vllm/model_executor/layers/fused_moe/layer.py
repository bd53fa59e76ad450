from __future__ import annotations

import torch
import torch.nn.functional as F

from ..linear import Weights, parts


class UnquantizedFusedMoEMethod: ...


class FusedMoE(Weights):
    """Experts in vLLM-Ascend's layout: w13 [experts, hidden, 2 x ffn], w2 [experts, ffn, hidden]."""

    def __init__(self, experts: int, hidden: int, ffn: int, dtype: torch.dtype) -> None:
        super().__init__()
        if parts() > 1:
            raise NotImplementedError("the stand-in of vLLM has no tensor parallelism of experts")
        self.hold("w13_weight", experts, hidden, 2 * ffn, dtype=dtype)
        self.hold("w2_weight", experts, ffn, hidden, dtype=dtype)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The sum over experts, by weights [..., experts]; every expert sees every token."""
        gate, up = torch.einsum("bsh,ehf->bsef", x, self.w13_weight).chunk(2, -1)
        out = torch.einsum("bsef,efh->bseh", F.silu(gate) * up, self.w2_weight)
        return (out * weights.unsqueeze(-1).to(out.dtype)).sum(2)

from __future__ import annotations

import torch
import torch.distributed as dist

from ...distributed import parallel_state
from .linear import ColumnParallelLinear, parts, summed


class VocabParallelEmbedding(ColumnParallelLinear):
    """vLLM pads the vocabulary to a multiple of 64."""

    def __init__(self, vocabulary: int, width: int, dtype: torch.dtype) -> None:
        super().__init__(width, (vocabulary + 63) // 64 * 64, dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.weight.shape[0]
        local = ids - parallel_state.get_tensor_model_parallel_rank() * rows
        elsewhere = (local < 0) | (local >= rows)
        found = torch.nn.functional.embedding(local.clamp(0, rows - 1), self.weight)
        return summed(found.masked_fill(elsewhere.unsqueeze(-1), 0))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of the whole vocabulary, its padding among it."""
        own = torch.nn.functional.linear(x, self.weight)
        if parts() == 1:
            return own
        all_of_them = [torch.empty_like(own) for _ in range(parts())]
        dist.all_gather(all_of_them, own.contiguous(), group=parallel_state.get_tp_group().device_group)
        return torch.cat(all_of_them, -1)


class ParallelLMHead(VocabParallelEmbedding): ...

"""Low precision: computed in float32, and rounded once at the end."""

from __future__ import annotations

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

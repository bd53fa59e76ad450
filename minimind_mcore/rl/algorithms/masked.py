"""Sums and means over the tokens of a mask. Values outside the mask are ignored, even NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from minimind_mcore.errors import UserError


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum `values` [B, T] where `mask` [B, T] is 1, over all elements or along `dim`."""
    kept = torch.where(mask.bool(), values, torch.zeros_like(values))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average `values` [B, T] where `mask` [B, T] is 1. The mean over an empty mask is 0."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Return (x - mean) / sqrt(unbiased variance + 1e-8) over the mask [B, T], and 0 outside the mask."""
    count = mask.sum()
    centred = values - masked_mean(values, mask)
    variance = masked_sum(centred.square(), mask) / (count - 1).clamp(min=1)
    return torch.where(mask.bool(), centred * torch.rsqrt(variance + 1e-8), torch.zeros_like(values))


def require_shape(values: Tensor, mask: Tensor, what: str) -> None:
    """Check that a user's function returned one value per token.

    Raises:
        UserError: the shape differs from the shape of the mask.
    """
    found, wanted = list(values.shape), list(mask.shape)
    if found != wanted:
        raise UserError(f"{what}: found a result of shape {found}, expected {wanted}: one value per token")

"""Means over the tokens that count. What lies outside the mask may be anything, even NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from minimind_mcore.errors import UserError


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `values` [B, T] where `mask` [B, T] is 1; over everything, or along `dim`."""
    kept = torch.where(mask.bool(), values, torch.zeros_like(values))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` [B, T] where `mask` [B, T] is 1; 0 where it is 1 nowhere."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(unbiased variance + 1e-8) over the mask [B, T]: mean 0, variance 1; 0 outside of it."""
    count = mask.sum()
    centred = values - masked_mean(values, mask)
    variance = masked_sum(centred.square(), mask) / (count - 1).clamp(min=1)
    return torch.where(mask.bool(), centred * torch.rsqrt(variance + 1e-8), torch.zeros_like(values))


def require_shape(values: Tensor, mask: Tensor, what: str) -> None:
    """Refuse a result of a user's function that does not have one value per token.

    Raises:
        UserError: the shape is not that of the mask.
    """
    found, wanted = list(values.shape), list(mask.shape)
    if found != wanted:
        raise UserError(f"{what}: found a result of shape {found}, expected {wanted}: one value per token")

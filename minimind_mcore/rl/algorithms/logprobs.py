"""Log-probabilities of tokens and entropy of the distribution, from whole rows of logits.

Under tensor parallelism a rank holds part of each row: the trainer has its own versions over Megatron's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_logps(logits: Tensor, tokens: Tensor, temperature: float = 1.0, chunk: int = 1024) -> Tensor:
    """Log-probability of each token.

    Args:
        logits: [B, T, V], `logits[:, t]` predicts `tokens[:, t]`.
        tokens: [B, T].
        temperature: that of the rollout: the policy that wrote the answers is softmax(logits / temperature).
        chunk: rows of logits that are copied to float32 at a time (without gradient that bounds the memory).

    Returns:
        [B, T] in float32.
    """
    rows, picks = logits.flatten(0, 1), tokens.reshape(-1)
    parts = [
        _logps(part, pick, temperature)
        for part, pick in zip(torch.split(rows, chunk), torch.split(picks, chunk), strict=True)
    ]
    return torch.cat(parts).view(tokens.shape)


def _logps(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    logits = logits.float() / temperature
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def entropy(logits: Tensor, temperature: float = 1.0, chunk: int = 1024) -> Tensor:
    """H = -sum p log p of each position, in nats: [B, T] in float32 from logits [B, T, V]."""
    parts = []
    for part in torch.split(logits.flatten(0, 1), chunk):
        logp = (part.float() / temperature).log_softmax(dim=-1)
        parts.append(-(logp.exp() * logp).sum(dim=-1))
    return torch.cat(parts).view(logits.shape[:-1])

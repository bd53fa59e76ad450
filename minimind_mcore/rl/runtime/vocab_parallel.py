"""Log-probabilities and entropy from logits that tensor parallelism splits along the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _LogProbs(torch.autograd.Function):
    """Computes (log p of the target, entropy) with a single exponential. Both have a gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, group: Any) -> tuple[Tensor, Tensor]:
        size = dist.get_world_size(group) if group is not None else 1
        width = logits.shape[-1]
        offset = dist.get_rank(group) * width if size > 1 else 0
        ctx.set_materialize_grads(False)
        scaled = logits.float() / temperature
        highest = scaled.amax(dim=-1)
        if size > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        scaled = scaled.sub_(highest.unsqueeze(-1))
        weights = scaled.exp()
        here = targets - offset
        own = (here >= 0) & (here < width)
        here = here.clamp(0, width - 1).unsqueeze(-1)
        chosen = scaled.gather(-1, here).squeeze(-1) * own
        sums = torch.stack([weights.sum(-1), torch.linalg.vecdot(weights, scaled), chosen])
        if size > 1:
            dist.all_reduce(sums, group=group)
        total, moment, chosen = sums
        log_total = total.log()
        entropy = log_total - moment / total
        # p = weights / total, log p = scaled - log_total
        ctx.save_for_backward(scaled, weights, total, log_total, entropy, here, own)
        ctx.temperature = temperature
        return chosen - log_total, entropy

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor, None, None, None]:
        scaled, weights, total, log_total, entropy, here, own = ctx.saved_tensors
        p = weights / total.unsqueeze(-1)
        if d_logp is None:
            d_logp = torch.zeros_like(total)
        factor = -d_logp.unsqueeze(-1)
        if d_entropy is not None:
            # dH / dlogit = -p (log p + H)
            factor = factor - d_entropy.unsqueeze(-1) * (scaled + (entropy - log_total).unsqueeze(-1))
        grad = p.mul_(factor)
        grad.scatter_add_(-1, here, (d_logp * own).unsqueeze(-1))
        return grad.div_(ctx.temperature), None, None, None


def log_probs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, group: Any = None
) -> tuple[Tensor, Tensor]:
    """Return log p of the targets and the entropy (nats) of softmax(logits / temperature), both in float32.

    Args:
        logits: [..., vocabulary / size of the group]. Rank r has the r-th part.
        targets: [...] ids in the whole vocabulary.
        temperature: temperature of the sampling, because the policy is the distribution that is sampled from.
        group: the ranks that share the vocabulary. None if this rank has all of it.
    """
    logp, entropy = _LogProbs.apply(logits, targets, temperature, group)  # type: ignore[no-untyped-call]
    return logp, entropy

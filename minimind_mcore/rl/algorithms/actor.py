"""The actor's loss of one micro-batch: policy loss, KL term and entropy term."""

from __future__ import annotations

import torch
from torch import Tensor

from minimind_mcore.rl.algorithms.kl import kl
from minimind_mcore.rl.algorithms.losses import Stats, aggregate, denominator, policy_loss
from minimind_mcore.rl.algorithms.masked import masked_mean, masked_sum
from minimind_mcore.rl.algorithms.table import Algorithm


def actor_loss(
    algorithm: Algorithm,
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    kl_coef: float | None = None,
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
    length: int | None = None,
    total: Tensor | float | None = None,
    tokens: Tensor | float | None = None,
    taught: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Return L = mean policy loss + kl_coef * mean KL - entropy_coef * mean entropy, and its metrics.

    Args:
        algorithm: a row of `table.ALGORITHMS`.
        logp: [B, T] with gradient. The other tensors [B, T] are those of `policy_loss`.
        advantages: [B, T].
        mask: [B, T].
        old_logp: see `policy_loss`.
        ref_logp: log-probabilities of the reference model. Required if the algorithm has a KL term in the loss.
        rollout_logp: see `policy_loss`.
        entropy: [B, T], with gradient if `entropy_coef` is not 0. None leaves out the entropy term and its metric.
        kl_coef: the current coefficient (`kl.Controller.value`). None takes the algorithm's.
        entropy_coef: weight of the entropy.
        tis_cap: see `policy_loss`.
        length: see `aggregate`.
        total: see `aggregate`. With `total` the loss, the KL divergence and the entropy are shares of the mini-batch.
        tokens: number of response tokens of the whole mini-batch. Required with `total` if the aggregation counts
            responses, because the entropy is always a mean over tokens.
        taught: [B], 0 for responses that count in the divisor of the loss alone. None: every response is 1.

    Returns:
        The loss, a scalar, and detached scalars with MindSpeed-RL's names: `actor/pg_loss` (the policy loss alone),
        `actor/pg_clipfrac`, `actor/ppo_kl`, `actor/kl_loss`, `actor/entropy`.
    """

    weight = torch.ones_like(mask[:, 0]) if taught is None else taught

    def mean(values: Tensor) -> Tensor:
        return aggregate(values * weight[:, None], mask, algorithm.aggregation, length=length, total=total)

    losses, stats = policy_loss(
        logp, old_logp, advantages, mask, kind=algorithm.loss, clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high, dual_clip=algorithm.dual_clip, rollout_logp=rollout_logp, tis_cap=tis_cap,
    )  # fmt: skip
    loss = mean(losses)
    stats["actor/pg_loss"] = loss.detach()
    if algorithm.kl == "loss" and ref_logp is not None:
        divergence = mean(kl(logp, ref_logp, algorithm.kl_kind))
        loss = loss + (algorithm.kl_coef if kl_coef is None else kl_coef) * divergence
        stats["actor/kl_loss"] = divergence.detach()
    if entropy is not None:
        # MindSpeed-RL and TRL average the entropy over tokens, whatever the aggregation of the policy loss. Dividing by
        # `tokens` makes the result independent of the micro-batch size. Weighting micro-batches by responses would not.
        share = 1.0 if total is None else denominator(mask, algorithm.aggregation) / total

        def over_tokens(values: Tensor) -> Tensor:
            return masked_mean(values, mask) * share if tokens is None else masked_sum(values, mask) / tokens

        loss = loss - entropy_coef * over_tokens(entropy * weight[:, None])
        stats["actor/entropy"] = over_tokens(entropy.detach())
    return loss, stats

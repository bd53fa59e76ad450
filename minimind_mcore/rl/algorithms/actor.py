"""The actor's loss of one micro-batch: policy, distance to the reference, entropy."""

from __future__ import annotations

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
) -> tuple[Tensor, Stats]:
    """L = mean of the policy's loss + kl_coef * mean KL - entropy_coef * mean entropy of a token.

    Args:
        algorithm: a row of `table.ALGORITHMS`.
        logp: [B, T] with gradient; the other tensors [B, T] as in `policy_loss`.
        advantages: [B, T].
        mask: [B, T].
        old_logp: see `policy_loss`.
        ref_logp: the reference's; needed where the algorithm has its KL in the loss.
        rollout_logp: see `policy_loss`.
        entropy: [B, T], with gradient where `entropy_coef` is not 0; None where it is not wanted.
        kl_coef: the coefficient now (`kl.Controller.value`); the algorithm's where it is None.
        entropy_coef: weight of the entropy.
        tis_cap: see `policy_loss`.
        length: see `aggregate`.
        total: see `aggregate`; the losses, the divergence and the entropy are then this part's share.
        tokens: number of response tokens in the whole mini-batch, needed with `total` where the aggregation counts
            answers: the entropy is a mean over tokens whatever the aggregation is.

    Returns:
        The loss, a scalar, and detached scalars by MindSpeed-RL's names: `actor/pg_loss` (of the policy alone),
        `actor/pg_clipfrac`, `actor/ppo_kl`, `actor/kl_loss`, `actor/entropy`.
    """

    def mean(values: Tensor) -> Tensor:
        return aggregate(values, mask, algorithm.aggregation, length=length, total=total)

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
        # A mean over tokens whatever the policy's loss is, as in MindSpeed-RL and TRL. With `tokens` it does not depend
        # on how the mini-batch is cut into micro-batches; a mean of this part, weighted by its answers, does.
        share = 1.0 if total is None else denominator(mask, algorithm.aggregation) / total
        bonus = masked_mean(entropy, mask) * share if tokens is None else masked_sum(entropy, mask) / tokens
        loss = loss - entropy_coef * bonus
        stats["actor/entropy"] = bonus.detach()
    return loss, stats

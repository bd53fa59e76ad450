"""Policy and value losses per token, and their aggregation over tokens.

With the ratio rho = exp(logp - old_logp) and the advantage A of each token:

| kind      | loss of a token                                        | source                                       |
|-----------|--------------------------------------------------------|----------------------------------------------|
| clip      | max(-A rho, -A clip(rho, 1 - low, 1 + high))           | PPO, 1707.06347; low != high: DAPO, 2503.14476 |
| gspo      | clip, with the ratio of the response as rho            | GSPO, 2507.18071                             |
| cispo     | -stop(min(rho, high)) A logp                           | MiniMax-M1, 2506.13585; MiniMind's default   |
| reinforce | -A logp                                                | SPO in MiniMind-Ascend, with a single update |

The ratio of a response is exp(mean over its tokens of logp - old_logp). Every log-ratio is clamped to +-20, as in verl:
above that exp overflows in half precision, and one token would dominate the update. Dual clip (1912.09729) limits the
loss of a token with a negative advantage to -A c.

| aggregation             | loss of a batch                                               | used by             |
|-------------------------|---------------------------------------------------------------|---------------------|
| token-mean              | mean over all tokens: long responses weigh more               | MindSpeed-RL, DAPO  |
| seq-mean-token-mean     | mean over responses of their token means: responses weigh alike | GRPO, MiniMind    |
| seq-mean-token-sum      | mean over responses of their token sums                       |                     |
| seq-mean-token-sum-norm | the previous divided by a constant length: tokens weigh alike | Dr.GRPO, 2503.20783 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from minimind_mcore.rl.algorithms.masked import masked_mean, masked_sum, require_shape
from minimind_mcore.rl.registry import lookup, register

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
Stats = dict[str, Tensor]
# Functions (logp, old_logp, advantages, mask, *, clip_low, clip_high) -> (loss per token, whether it is clipped).
PolicyLoss = Callable[..., tuple[Tensor, Tensor]]
POLICY_LOSSES: dict[str, PolicyLoss] = {}


def _bounded(log_ratio: Tensor) -> Tensor:
    """Clamp log-ratios to +-20 so that exp cannot overflow."""
    return log_ratio.clamp(-20, 20)


def _clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return the larger loss of the ratio and the clipped ratio, and where the clipped one is larger."""
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(plain, clipped), clipped > plain


@register("clip", POLICY_LOSSES)
def clip(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO and DAPO: the larger loss of the ratio and the clipped ratio."""
    return _clipped(_bounded(logp - old_logp), advantages, clip_low, clip_high)


@register("gspo", POLICY_LOSSES)
def gspo(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """GSPO: `clip` with one ratio for all tokens of a response."""
    whole = _bounded(masked_mean(logp - old_logp, mask, dim=1)).detach().unsqueeze(1)
    # The value is the ratio of the response. The gradient is that of the token (GSPO-token in the paper), so that
    # `tis_cap` can weight tokens. The mean of the token gradients is the gradient of the response's ratio.
    return _clipped(whole + logp - logp.detach(), advantages, clip_low, clip_high)


@register("cispo", POLICY_LOSSES)
def cispo(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """CISPO: every token keeps its gradient, weighted by the ratio, which is clipped at `clip_high`."""
    ratio = _bounded(logp - old_logp).exp()
    return -advantages * ratio.detach().clamp(max=clip_high) * logp, ratio > clip_high


@register("reinforce", POLICY_LOSSES)
def reinforce(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """REINFORCE: no importance ratio. Correct only for a single update per batch."""
    return -advantages * logp, torch.zeros_like(logp, dtype=torch.bool)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    kind: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    rollout_logp: Tensor | None = None,
    tis_cap: float | None = None,
) -> tuple[Tensor, Stats]:
    """Return the loss of each token [B, T] by the module's table. `aggregate` computes the mean.

    Args:
        logp: [B, T], log-probabilities of the policy in training, with gradient.
        old_logp: [B, T], log-probabilities before this step's updates. None stands for `logp`: in a single update
            the ratio is 1, and its gradient is the gradient of logp.
        advantages: [B, T].
        mask: [B, T].
        kind: a name of `POLICY_LOSSES`, or the import path of a function with the same signature.
        clip_low: lower clip range: the ratio is clipped at 1 - clip_low (clip, gspo).
        clip_high: upper clip range: the ratio is clipped at 1 + clip_high (clip, gspo). For cispo the greatest ratio
            itself, 5 in MiniMind.
        dual_clip: the greatest ratio of tokens with a negative advantage (clip; 3 is usual). None: no limit.
        rollout_logp: [B, T], log-probabilities of the rollout engine. Where its arithmetic differs from the trainer's
            the responses are off-policy. With `tis_cap` each token is weighted by the truncated importance ratio
            min(exp(old_logp - rollout_logp), tis_cap) (Yao et al. 2025, "Your efficient RL framework secretly
            brings you off-policy RL training").
        tis_cap: cap of the truncated importance ratio, usually 2. None leaves the weights at 1.

    Returns:
        The losses, undefined outside the mask, and detached means over the mask: `actor/pg_clipfrac` (share of tokens
        whose ratio is clipped) and `actor/ppo_kl` (mean of old_logp - logp). With `dual_clip` also
        `actor/pg_clipfrac_lower` (share of tokens that it clips), with `tis_cap` also `actor/tis_*`.
    """
    old = logp.detach() if old_logp is None else old_logp
    function = lookup(kind, POLICY_LOSSES, "minimind.policy_loss")
    loss, cut = function(logp, old, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    require_shape(loss, mask, f"minimind.policy_loss: {kind}")
    stats = {"actor/pg_clipfrac": cut.float(), "actor/ppo_kl": old - logp}
    if dual_clip is not None:
        most = -advantages * dual_clip
        beyond = (advantages < 0) & (loss > most)
        loss = torch.where(beyond, most, loss)
        stats["actor/pg_clipfrac_lower"] = beyond.float()
    if tis_cap is not None and rollout_logp is not None:
        weight = _bounded(old - rollout_logp).detach().exp()
        loss = loss * weight.clamp(max=tis_cap)
        stats |= {"actor/tis_weight": weight, "actor/tis_clipfrac": (weight > tis_cap).float()}
    return loss, {name: masked_mean(value.detach(), mask) for name, value in stats.items()}


def denominator(mask: Tensor, how: Aggregation) -> Tensor:
    """Return the divisor of `aggregate` for one part of a batch: tokens (token-mean) or responses. Parts add up."""
    return mask.sum() if how == "token-mean" else torch.tensor(float(mask.shape[0]), device=mask.device)


def aggregate(
    loss: Tensor,
    mask: Tensor,
    how: Aggregation = "token-mean",
    *,
    length: int | None = None,
    total: Tensor | float | None = None,
) -> Tensor:
    """Aggregate the losses of tokens [B, T] to the loss of a batch, a scalar, by the module's table.

    Args:
        loss: [B, T].
        mask: [B, T]. A response without any token counts as 0.
        how: the aggregation.
        length: divisor of seq-mean-token-sum-norm, the maximum response length. None takes T.
        total: `denominator` of the whole mini-batch, if this is a part (a micro-batch, a data-parallel rank). The
            results of all parts then add up to the loss of the mini-batch, independent of the micro-batch size. None
            divides by this part's own denominator, which MindSpeed-RL averages over micro-batches.
    """
    count = (denominator(mask, how) if total is None else torch.as_tensor(total, device=mask.device)).clamp(min=1)
    if how == "token-mean":
        return masked_sum(loss, mask) / count
    answers = masked_mean(loss, mask, dim=1) if how == "seq-mean-token-mean" else masked_sum(loss, mask, dim=1)
    if how == "seq-mean-token-sum-norm":
        answers = answers / (length or mask.shape[1])
    return answers.sum() / count


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.5
) -> tuple[Tensor, Stats]:
    """PPO's value loss: max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2 of each token, shapes [B, T].

    Returns:
        The losses (`aggregate` computes the mean), and `critic/vf_clipfrac`, the share of tokens with a clipped value.
    """
    plain = (values - returns).square()
    if clip is None:
        return plain / 2, {"critic/vf_clipfrac": torch.zeros((), device=values.device)}
    near = torch.clamp(values, old_values - clip, old_values + clip)
    clipped = (near - returns).square()
    cut = masked_mean((clipped > plain).float(), mask)
    return torch.maximum(plain, clipped) / 2, {"critic/vf_clipfrac": cut.detach()}

"""Advantages: by how much the reward of a response exceeds the expected reward.

| advantage | expectation                                            | source                                     |
|-----------|--------------------------------------------------------|--------------------------------------------|
| group     | mean of the prompt's samples                           | GRPO, arXiv 2402.03300; Dr.GRPO 2503.20783 |
| rloo      | mean of the prompt's other samples                     | RLOO, 2402.14740                           |
| batch     | mean of the prompt's samples; whitened over the batch  | REINFORCE++ with baseline, 2501.03262      |
| returns   | mean of the batch: whitened returns (`gae`, no critic) | REINFORCE++, 2501.03262                    |
| gae       | a critic's value of each prefix                        | PPO, 1707.06347; GAE, 1506.02438           |
| baseline  | a running mean over prompts (`Baseline`)               | MiniMind-Ascend's train_spo.py             |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from minimind_mcore.rl.algorithms.masked import whiten
from minimind_mcore.rl.registry import register

Spread = Literal["unbiased", "biased", "none"]
# Functions (rewards [B], mask [B, T], n_samples, *, spread) -> advantages [B, T].
Advantage = Callable[..., Tensor]
ADVANTAGES: dict[str, Advantage] = {}
# Correction of the degrees of freedom of the standard deviation, and the eps added to it. None: no division.
_SPREADS: dict[Spread, tuple[int, float] | None] = {"unbiased": (1, 1e-6), "biased": (0, 1e-4), "none": None}


@register("group", ADVANTAGES)
def group_norm(rewards: Tensor, mask: Tensor, n_samples: int, *, spread: Spread = "unbiased") -> Tensor:
    """GRPO: A = (r - mean) / (std + eps) within the samples of a prompt, the same for every token.

    If all samples of a prompt have the same reward, their advantages are 0 and the group has no gradient.

    Args:
        rewards: [B], the `n_samples` of one prompt next to each other.
        mask: [B, T].
        n_samples: samples of a prompt. B is a multiple of this number.
        spread: "unbiased" (MindSpeed-RL: sample standard deviation, eps 1e-6), "biased" (MiniMind: population
            standard deviation, eps 1e-4) or "none" (Dr.GRPO: no division, so that easy and hard prompts weigh alike).

    Returns:
        [B, T] in float32, 0 outside the mask. Computed in float64.
    """
    scores = rewards.double().view(-1, n_samples)
    centred = scores - scores.mean(dim=1, keepdim=True)
    division = _SPREADS[spread]
    # The sample standard deviation of one sample is undefined. Its advantage is 0 anyway.
    if division is not None and n_samples > 1:
        correction, eps = division
        centred = centred / (scores.std(dim=1, correction=correction, keepdim=True) + eps)
    return per_token(centred.view(-1), mask)


@register("rloo", ADVANTAGES)
def leave_one_out(rewards: Tensor, mask: Tensor, n_samples: int, *, spread: Spread = "none") -> Tensor:
    """RLOO: A = r - mean of the prompt's other samples. Arguments and result are those of `group_norm`."""
    scores = rewards.double().view(-1, n_samples)
    others = (scores.sum(dim=1, keepdim=True) - scores) / (n_samples - 1)
    return per_token((scores - others).view(-1), mask)


@register("batch", ADVANTAGES)
def batch_norm(rewards: Tensor, mask: Tensor, n_samples: int, *, spread: Spread = "none") -> Tensor:
    """REINFORCE++ with baseline: r - mean of the prompt's samples, then whitened over the tokens of the batch."""
    return whiten(group_norm(rewards, mask, n_samples, spread="none"), mask)


def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Expand one advantage per response [B] to its tokens [B, T], in float32."""
    return advantages.float().unsqueeze(1) * mask


def at_last_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """Place the reward of each response [B] on its last token of the mask, [B, T] with 0 elsewhere."""
    counts = mask.long().cumsum(dim=1)
    last = (counts == counts[:, -1:]) & mask.bool()
    return last * rewards.float().unsqueeze(1)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95, whitened: bool = True
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, from the last token to the first:

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}

    Tokens outside the mask (a tool's result between two turns of the model) are skipped.

    Args:
        rewards: [B, T], the reward of each token: `at_last_token`, minus the KL penalty of `kl.in_reward`.
        values: [B, T], the critic's value of the state before each token.
        mask: [B, T].
        gamma: discount factor.
        lam: lambda of GAE. 0 uses the critic's one-step estimate, 1 the sum of rewards.
        whitened: normalize the advantages of the batch to mean 0 and variance 1, as MindSpeed-RL always does.

    Returns:
        Advantages [B, T] and returns [B, T] (the critic's targets), both 0 outside the mask.
    """
    mask = mask.to(values.dtype)
    advantage = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = torch.where(inside.bool(), delta + gamma * lam * advantage, advantage)
        following = torch.where(inside.bool(), values[:, t], following)
        advantages[:, t] = advantage * inside
    returns = torch.where(mask.bool(), advantages + values, torch.zeros_like(values))
    return (whiten(advantages, mask) if whitened else advantages), returns


@dataclass
class Baseline:
    """SPO: one response per prompt, with a running mean over all responses as the baseline.

    The baseline is the mean of a Beta distribution. Its counts decay with the change of the policy since the last batch
    (MiniMind-Ascend's train_spo.py, after single-stream policy optimization, arXiv 2509.13232).

        rho      = clip(2^(-|change of mean logp| / half_life), low, high)
        alpha    = rho alpha + mean reward, scaled from [-scale, scale] to [0, 1]
        beta     = rho beta + 1 - the scaled mean reward
        baseline = alpha / (alpha + beta), scaled back
        A        = clip(r - baseline, -5, 5)

    Attributes:
        scale: rewards lie in [-scale, scale].
        half_life: change of the mean log-probability that halves the weight of earlier batches.
        low: smallest value of rho.
        high: greatest value of rho.
        first_rho: rho of the first update, which has no earlier log-probability to compare with.
        cap: advantages are clipped to [-cap, cap].
        alpha: decayed count of high rewards. Starts at 1 / (1 - low) / 2.
        beta: decayed count of low rewards. Starts at the same value.
        mean_logp: mean log-probability of the last batch.
    """

    scale: float = 3.0
    half_life: float = 0.06
    low: float = 0.5
    high: float = 0.96
    first_rho: float = 0.9
    cap: float = 5.0
    alpha: float = 1.0
    beta: float = 1.0
    mean_logp: float | None = None

    @property
    def value(self) -> float:
        """Return the expected reward, in [-scale, scale]."""
        return (2 * self.alpha / (self.alpha + self.beta) - 1) * self.scale

    def advantages(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """Return the advantages [B, T] of rewards [B], against the baseline of the earlier batches."""
        return per_token((rewards - self.value).clamp(-self.cap, self.cap), mask)

    def update(self, mean_reward: float, mean_logp: float) -> float:
        """Update the baseline with a batch and return rho.

        Both means are over the whole batch, that is over all data-parallel ranks.
        """
        rho = self.first_rho
        if self.mean_logp is not None:
            rho = min(max(2 ** (-abs(self.mean_logp - mean_logp) / self.half_life), self.low), self.high)
        self.mean_logp = mean_logp
        share = (mean_reward + self.scale) / (2 * self.scale)
        self.alpha = rho * self.alpha + share
        self.beta = rho * self.beta + 1 - share
        return rho

    def state_dict(self) -> dict[str, float | None]:
        """Return the state that a resumed run needs."""
        return {name: asdict(self)[name] for name in ("alpha", "beta", "mean_logp")}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore the state of `state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)

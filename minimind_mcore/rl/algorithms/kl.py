"""KL divergence of the policy from the reference model, and the coefficient of its penalty.

With d = log pi(token) - log pi_ref(token) of a token sampled from pi (Schulman, "Approximating KL divergence", 2020):

| kind       | estimate of the divergence    | aliases        |                                                     |
|------------|-------------------------------|----------------|-----------------------------------------------------|
| k1         | d                             | kl             | unbiased, can be negative; as a loss its gradient   |
|            |                               |                | is 0 on average: use it in the reward               |
| k2         | d^2 / 2                       | mse            | biased, low variance                                |
| k3         | exp(-d) + d - 1               | low_var_kl     | unbiased, never negative; clamped as MindSpeed-RL   |
|            |                               |                | does: -d to +-20, the result to 10, which it        |
|            |                               |                | reaches at d = -2.61 and d = 11.0. Beyond these the |
|            |                               |                | gradient is 0                                       |
| abs        | abs(d)                        |                |                                                     |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind_mcore.errors import UserError, did_you_mean

ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
KINDS = ("k1", "k2", "k3", "abs")


def kind_of(name: str) -> str:
    """Return the kind of a name or alias. A `UserError` suggests the nearest name."""
    kind = ALIASES.get(name, name)
    if kind not in KINDS:
        known = [*KINDS, *ALIASES]
        hint = did_you_mean(name, known, begin=". Did") or f". Expected one of {', '.join(known)}."
        raise UserError(f"kl_penalty: found {name!r}{hint}")
    return kind


def kl(logp: Tensor, ref_logp: Tensor, kind: str = "low_var_kl") -> Tensor:
    """Estimate the KL divergence from the reference model per token, shapes [B, T]. `kind`: see the module's table."""
    match kind_of(kind):
        case "k1":
            return logp - ref_logp
        case "k2":
            return 0.5 * (logp - ref_logp).square()
        case "k3":
            back = (ref_logp - logp).clamp(-20, 20)
            return (back.exp() - back - 1).clamp(-10, 10)
        case _:
            return (logp - ref_logp).abs()


def in_reward(rewards: Tensor, divergence: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Return the reward per token minus the KL penalty: r_t - coefficient KL_t, all [B, T]."""
    return rewards - coefficient * torch.where(mask.bool(), divergence, torch.zeros_like(divergence))


@dataclass
class Controller:
    """The coefficient of the KL penalty: fixed, or adapted to keep the divergence near a target (arXiv 1909.08593).

        coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon

    Attributes:
        value: the current coefficient (`init_kl_coef` at the start).
        target: the target divergence (`kl_target`). None keeps the coefficient fixed (`kl_ctrl_type: fixed`).
        horizon: number of responses in which the coefficient changes by about 20 % at most (`kl_horizon`).
    """

    value: float
    target: float | None = None
    horizon: float = 1000

    def update(self, divergence: float, n: int) -> None:
        """Adapt the coefficient after `n` responses whose mean KL divergence is `divergence`."""
        if self.target is not None:
            error = min(max(divergence / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """Return the state that a resumed run needs."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of `state_dict`."""
        self.value = state["value"]

"""SPO: one answer per prompt, and a running mean of all answers as what is expected.

The baseline is the mean of a Beta distribution whose counts fade: the further the policy has moved since, the
faster (MiniMind-Ascend's train_spo.py; after single-stream policy optimization, arXiv 2509.13232).

    rho      = clip(2^(-|change of mean logp| / half_life), low, high)
    alpha    = rho alpha + mean reward, scaled from [-scale, scale] to [0, 1]
    beta     = rho beta + 1 - the same
    baseline = alpha / (alpha + beta), scaled back
    A        = clip(r - baseline, -5, 5)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from minimind_mcore.rl.algorithms.advantages import per_token


@dataclass
class Baseline:
    """What an answer is expected to score.

    Attributes:
        scale: rewards lie in [-scale, scale].
        half_life: change of the mean log-probability at which the past counts half.
        low: smallest share of the past that is kept; high: greatest.
        first_rho: the share at the first update, when no change is known.
        cap: advantages are cut to +-cap.
        alpha: what spoke for the greatest reward; beta: for the smallest. Both begin at 1 / (1 - low) / 2.
        mean_logp: of the batch before.
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
        """The expected reward, in [-scale, scale]."""
        return (2 * self.alpha / (self.alpha + self.beta) - 1) * self.scale

    def advantages(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """[B, T] from rewards [B] and mask [B, T], against the answers before this batch."""
        return per_token((rewards - self.value).clamp(-self.cap, self.cap), mask)

    def update(self, mean_reward: float, mean_logp: float) -> float:
        """Take in a batch: its mean reward, and the mean log-probability of its tokens. Returns rho.

        The means are those of the whole batch: of all data-parallel ranks.
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
        """What a resumed run needs."""
        return {name: asdict(self)[name] for name in ("alpha", "beta", "mean_logp")}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on where `state_dict` was taken."""
        for name, value in state.items():
            setattr(self, name, value)

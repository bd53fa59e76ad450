"""Groups of responses to one prompt: their statistics, and which groups to train on.

If all responses of a group have the same reward, their advantages are 0 and the group only dilutes the batch. DAPO
(arXiv 2503.14476) keeps sampling until the batch is full of groups with different rewards ("dynamic sampling").
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which groups to train on.

    Attributes:
        keep: [G] bool.
        reasons: number of dropped groups by reason: `all_right`, `all_wrong`, or `all_same` (equal rewards that are
            neither, or the score of a right or wrong answer is not defined).
    """

    keep: Tensor
    reasons: Counter[str]

    def rows(self, n_samples: int) -> Tensor:
        """Return [B] bool: the responses of the groups to train on."""
        return self.keep.repeat_interleave(n_samples)


def select(metric: Tensor, n_samples: int, right: float | None = None, wrong: float | None = None) -> Groups:
    """Keep the groups whose responses differ in the metric. A group of one response is kept, as in MindSpeed-RL.

    Args:
        metric: [B], `filter_groups_metric` of MindSpeed-RL, such as the score of `acc`.
        n_samples: samples of a prompt.
        right: score of a right answer, used for the reasons. None: not defined.
        wrong: greatest score of a wrong answer, used for the reasons. None: not defined.
    """
    groups = metric.double().view(-1, n_samples)
    low, high = groups.amin(dim=1), groups.amax(dim=1)
    keep = (high > low) if n_samples > 1 else torch.ones_like(low, dtype=torch.bool)
    right, wrong = math.inf if right is None else right, -math.inf if wrong is None else wrong
    named = ["all_right" if x >= right else "all_wrong" if x <= wrong else "all_same" for x in low[~keep]]
    return Groups(keep, Counter(named))


def statistics(rewards: Tensor, n_samples: int) -> dict[str, float]:
    """Return means over the groups: standard deviation, share of groups where it is 0, best and worst reward."""
    groups = rewards.double().view(-1, n_samples)
    spread = groups.std(dim=1, correction=0)
    return {
        "group/std": spread.mean().item(),
        "group/zero_std": (spread == 0).double().mean().item(),
        "group/best": groups.amax(dim=1).mean().item(),
        "group/worst": groups.amin(dim=1).mean().item(),
    }

"""Groups of answers to one prompt: what they look like, and which are worth training on.

A group whose answers all score alike has advantages of 0 and only dilutes the batch. DAPO (arXiv 2503.14476) samples
on until the batch is full of groups that differ ("dynamic sampling").
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
        reasons: why each of the others is left out, counted: `all_right`, `all_wrong`, and `all_same` (alike, and
            neither, or it is not known which).
    """

    keep: Tensor
    reasons: Counter[str]

    def rows(self, n_samples: int) -> Tensor:
        """[B] bool: the responses of the groups that are kept."""
        return self.keep.repeat_interleave(n_samples)


def select(metric: Tensor, n_samples: int, right: float | None = None, wrong: float | None = None) -> Groups:
    """Keep the groups whose metric differs (std > 0); a group of one is kept, as MindSpeed-RL does.

    Args:
        metric: [B], `filter_groups_metric` of MindSpeed-RL, such as the score of `acc`.
        n_samples: samples of a prompt.
        right: the score of a right answer, for the reasons; None: no score is.
        wrong: the score of a wrong answer, or more than that of the worst; None: no score is.
    """
    groups = metric.double().view(-1, n_samples)
    low, high = groups.amin(dim=1), groups.amax(dim=1)
    keep = (high > low) if n_samples > 1 else torch.ones_like(low, dtype=torch.bool)
    right, wrong = math.inf if right is None else right, -math.inf if wrong is None else wrong
    named = ["all_right" if x >= right else "all_wrong" if x <= wrong else "all_same" for x in low[~keep]]
    return Groups(keep, Counter(named))


def statistics(rewards: Tensor, n_samples: int) -> dict[str, float]:
    """Metrics of the groups: their spread, the share without any, and the share of prompts with a best answer."""
    groups = rewards.double().view(-1, n_samples)
    spread = groups.std(dim=1, correction=0)
    return {
        "group/std": spread.mean().item(),
        "group/zero_std": (spread == 0).double().mean().item(),
        "group/best": groups.amax(dim=1).mean().item(),
        "group/worst": groups.amin(dim=1).mean().item(),
    }

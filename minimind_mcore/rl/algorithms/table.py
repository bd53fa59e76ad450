"""The parts of every algorithm. A run replaces single fields by its own values (`dataclasses.replace`).

| name    | advantage             | loss      | mean over          | reference        | source                      |
|---------|-----------------------|-----------|--------------------|------------------|-----------------------------|
| grpo    | group, sample std     | clip      | tokens             | k3 in the loss   | 2402.03300; MindSpeed-RL    |
| dr_grpo | group, not divided    | clip      | answers, by length | none             | 2503.20783                  |
| dapo    | group, sample std     | clip      | tokens             | none             | 2503.14476                  |
| gspo    | group, sample std     | gspo      | answers            | none             | 2507.18071                  |
| cispo   | group, population std | cispo     | answers            | k3 in the loss   | 2506.13585; MiniMind        |
| rloo    | rloo                  | clip      | answers, sums      | k1 in the reward | 2402.14740; TRL             |
| ppo     | critic (GAE)          | clip      | tokens             | k1 in the reward | 1707.06347; MindSpeed-RL    |
| spo     | running baseline      | reinforce | answers            | k3 in the loss   | 2509.13232; MiniMind-Ascend |

REINFORCE++ (2501.03262) is `reinforce_plus_plus`: whitened returns, clip, tokens, k1 in the reward. Its variant with a
baseline is `reinforce_plus_plus_baseline`: group mean, whitened over the batch, clip, tokens, k2 in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.rl.algorithms.advantages import Spread
from minimind_mcore.rl.algorithms.losses import Aggregation

Placement = Literal["loss", "reward", "none"]


@dataclass(frozen=True)
class Algorithm:
    """The parts of an algorithm. The defaults are MindSpeed-RL's GRPO.

    Attributes:
        advantage: "gae" (with a critic), "returns", "baseline" (`advantages.Baseline`), a name of
            `advantages.ADVANTAGES`, or the import path of a function with the same signature.
        spread: divisor of a group's advantages (`group_norm`).
        loss: a name of `losses.POLICY_LOSSES`, or the import path of a function with the same signature.
        clip_low: see `policy_loss`.
        clip_high: see `policy_loss`.
        dual_clip: see `policy_loss`.
        aggregation: see `aggregate`.
        kl: where the KL term is added: the loss or the reward. "none" needs no reference model.
        kl_kind: see `kl.kl`.
        kl_coef: coefficient of the KL term.
        dynamic_sampling: train only on groups with different rewards (`groups.select`).
        overlong: penalize responses near the maximum length (`rl/rewards/length.py`).
    """

    advantage: str = "group"
    spread: Spread = "unbiased"
    loss: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregation: Aggregation = "token-mean"
    kl: Placement = "loss"
    kl_kind: str = "low_var_kl"
    kl_coef: float = 0.01
    dynamic_sampling: bool = False
    overlong: bool = False


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(),
    "dr_grpo": Algorithm(spread="none", aggregation="seq-mean-token-sum-norm", kl="none"),
    "dapo": Algorithm(clip_high=0.28, kl="none", dynamic_sampling=True, overlong=True),
    "gspo": Algorithm(
        loss="gspo", clip_low=3e-4, clip_high=4e-4, aggregation="seq-mean-token-mean", kl="none"
    ),
    "cispo": Algorithm(
        spread="biased", loss="cispo", clip_high=5.0, aggregation="seq-mean-token-mean", kl_coef=0.1
    ),
    "rloo": Algorithm(
        advantage="rloo", aggregation="seq-mean-token-sum", kl="reward", kl_kind="kl", kl_coef=0.05
    ),
    "reinforce_plus_plus": Algorithm(advantage="returns", kl="reward", kl_kind="kl"),
    "reinforce_plus_plus_baseline": Algorithm(advantage="batch", kl_kind="mse"),
    "ppo": Algorithm(advantage="gae", kl="reward", kl_kind="kl"),
    "spo": Algorithm(advantage="baseline", loss="reinforce", aggregation="seq-mean-token-mean", kl_coef=0.02),
}  # fmt: skip


def algorithm(name: str) -> Algorithm:
    """Return the algorithm of a name. A `UserError` suggests the nearest name."""
    if name not in ALGORITHMS:
        hint = did_you_mean(name, ALGORITHMS, begin=". Did") or f". Expected one of {', '.join(ALGORITHMS)}."
        raise UserError(f"algorithm: found {name!r}{hint}")
    return ALGORITHMS[name]

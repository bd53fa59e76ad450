"""What a run optimises: an algorithm of the table, with what the YAML changes in it."""

from __future__ import annotations

import dataclasses
from typing import Any

from minimind_mcore.rl.algorithms.table import Algorithm, algorithm
from minimind_mcore.rl.config import Config


def objective(config: Config) -> Algorithm:
    """The algorithm of `minimind.algorithm`; keys that stand in `rl_config` replace what the table says.

    A key that is left out there keeps the algorithm's own value, not MindSpeed-RL's default, which is GRPO's.
    """
    chosen, rl = algorithm(config.minimind.algorithm), config.rl
    given = config.tree["rl_config"]
    changes: dict[str, Any] = {}
    if chosen.loss == "cispo":
        changes["clip_high"] = config.minimind.cispo_clip
    elif rl.clip_higher_enable:
        changes |= {"clip_low": rl.clip_ratio_low, "clip_high": rl.clip_ratio_high}
    elif "clip_ratio" in given:
        changes |= {"clip_low": rl.clip_ratio, "clip_high": rl.clip_ratio}
    if "token_level_loss" in given:
        changes["aggregation"] = "token-mean" if rl.token_level_loss else "seq-mean-token-mean"
    if "kl_penalty" in given:
        changes["kl_kind"] = rl.kl_penalty
    if "init_kl_coef" in given:
        changes["kl_coef"] = rl.init_kl_coef
    if rl.use_kl_in_reward:
        changes["kl"] = "reward"
    if "filter_groups_enable" in given:
        changes["dynamic_sampling"] = rl.filter_groups_enable
    if "overlong_buffer_enable" in given:
        changes["overlong"] = rl.overlong_buffer_enable
    chosen = dataclasses.replace(chosen, **changes)
    return dataclasses.replace(chosen, kl="none") if chosen.kl_coef == 0 else chosen

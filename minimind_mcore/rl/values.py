"""Which values a key can have: names out of a list, numbers within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minimind_mcore.rl.config import Config
from minimind_mcore.rl.settings import nearest

Problem = tuple[str, str]

# MindSpeed-RL's: mindspeed_rl/utils/compute.py, trainer/base.py, trainer/utils/compute_utils.py; its three programs.
NAMES: dict[str, tuple[str, ...]] = {
    "rl_config.kl_penalty": ("kl", "abs", "mse", "low_var_kl"),
    "rl_config.kl_ctrl_type": ("fixed", "adaptive"),
    "rl_config.adv_estimator": ("group_norm", "gae"),
    "megatron_training.stage": ("ray_grpo", "ray_dapo", "ray_ppo"),
}
MORE = {"rl_config.kl_penalty": ("k1", "k2", "k3")}  # of the embedded trainer

# The least of each.
COUNTS: dict[str, int] = {
    "megatron_training.global_batch_size": 1,
    "megatron_training.seq_length": 1,
    "megatron_training.train_iters": 1,
    "actor_config.micro_batch_size": 1,
    "rl_config.actor_resource.num_npus": 1,
    "rl_config.n_samples_per_prompt": 1,
    "rl_config.mini_batch_size": 1,
    "rl_config.epochs": 1,
    "rl_config.max_prompt_length": 1,
    "rl_config.verifier_parallel": 1,
    "rl_config.filter_groups_max_batches": 1,
    "rl_config.overlong_buffer": 0,
    "generate_config.max_num_seqs": 1,
    "generate_config.sampling_config.max_tokens": 1,
    "minimind.eval_prompts": 1,
    "minimind.eval_interval": 0,
    "minimind.sample_interval": 0,
    "minimind.weight_check_interval": 0,
    "minimind.keep_last": 1,
    "minimind.max_restarts": 0,
}
# Smallest and largest; None: any.
BOUNDS: dict[str, tuple[float, float | None]] = {
    "rl_config.clip_ratio": (0, None),
    "rl_config.clip_ratio_low": (0, None),
    "rl_config.clip_ratio_high": (0, None),
    "rl_config.cliprange_value": (0, None),
    "rl_config.init_kl_coef": (0, None),
    "generate_config.sampling_config.top_p": (0, 1),
    "generate_config.sampling_config.min_p": (0, 1),
    "minimind.reward_failure_limit": (0, 1),
}
POSITIVE = (
    "rl_config.verifier_timeout",
    "rl_config.kl_horizon",
    "rl_config.kl_target",
    "generate_config.sampling_config.temperature",
    "minimind.cispo_clip",
    "minimind.spo_half_life",
    "minimind.rollout_correction_cap",
    "minimind.actor_timeout_s",
)
OPTIONAL = ("megatron_training.stage", "minimind.keep_last")


def values(config: Config, target: str) -> Iterator[Problem]:
    """Values that are none of a key's."""
    for key, names in NAMES.items():
        value = value_of(config, key)
        known = (*names, *(MORE.get(key, ()) if target == "embedded" else ()))
        if value not in known and not (value is None and key in OPTIONAL):
            yield key, f"found {value!r}, expected one of {', '.join(known)}{nearest(str(value), known)}"
    for key, least in COUNTS.items():
        value = value_of(config, key)
        if value is None and key in OPTIONAL:
            continue
        if not isinstance(value, int):
            yield key, f"found {value!r}, expected a whole number"
        elif value < least:
            yield key, f"found {value}, expected at least {least}"
    for key, (low, high) in BOUNDS.items():
        value = value_of(config, key)
        if value < low or (high is not None and value > high):
            yield key, f"found {value}, expected {low:g} {'or more' if high is None else f'to {high:g}'}"
    for key in POSITIVE:
        if (value := value_of(config, key)) <= 0:
            why = ": log-probabilities are divided by it" if key.endswith("temperature") else ""
            yield key, f"found {value}, expected more than 0{why}"


def value_of(config: Config, key: str) -> Any:
    """The value of `section.key`; of `mini_batch_size` the YAML's, in prompts."""
    sections = {
        "megatron_training": config.actor,
        "actor_config": config.actor,
        "rl_config": config.rl,
        "generate_config": config.generate,
        "minimind": config.minimind,
    }
    section, *names = key.split(".")
    if key == "rl_config.mini_batch_size":
        return config.tree["rl_config"].get("mini_batch_size", 1)
    found: Any = sections[section]
    for name in names:
        found = getattr(found, name)
    return found

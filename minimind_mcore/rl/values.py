"""Which values a key can have: names out of a list, numbers within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minimind_mcore.ranges import problem
from minimind_mcore.rl.config import Config, Section
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

OPTIONAL = ("megatron_training.stage",)
# Keys without which a run cannot be planned; MindSpeed-RL's default of some is null.
REQUIRED = (
    "megatron_training.global_batch_size",
    "megatron_training.seq_length",
    "megatron_training.train_iters",
    "actor_config.micro_batch_size",
    "rl_config.actor_resource.num_npus",
)


def values(config: Config, target: str) -> Iterator[Problem]:
    """Values that are none of a key's."""
    for key, names in NAMES.items():
        value = value_of(config, key)
        known = (*names, *(MORE.get(key, ()) if target == "embedded" else ()))
        if value not in known and not (value is None and key in OPTIONAL):
            yield key, f"found {value!r}, expected one of {', '.join(known)}{nearest(str(value), known)}"
    for key in REQUIRED:
        if value_of(config, key) is None:
            yield key, "found None, expected a whole number"
    yield from numbers(config)


def numbers(config: Config) -> Iterator[Problem]:
    """Numbers that are out of the ranges of `ranges.py`; those of `minimind` are checked by `settings`."""
    found: dict[str, str] = {}  # a key that several models share is reported once
    sections = {"actor_config": config.actor}
    sections |= {"ref_config": config.ref} if config.ref is not config.actor else {}
    sections |= {"reward_config": config.reward} if config.reward else {}
    sections |= {"critic_config": config.critic} if config.critic else {}
    for section, megatron in sections.items():
        for name, value in vars(megatron).items():
            found |= _wrong(_given_in(config, section, name), name, value)
    prompts = {"mini_batch_size": value_of(config, "rl_config.mini_batch_size")}
    for name, value in (vars(config.rl) | prompts).items():
        found |= _wrong(f"rl_config.{name}", name, value)
    for name, value in vars(config.generate).items():
        found |= _wrong(f"generate_config.{name}", name, value)
    yield from found.items()


def _wrong(key: str, name: str, value: object, section: str = "") -> dict[str, str]:
    """The problem of a value, or of the numbers in a list or a section, by key."""
    if isinstance(value, Section):
        parts = [_wrong(f"{key}.{inner}", inner, item, name) for inner, item in vars(value).items()]
        return {where: text for part in parts for where, text in part.items()}
    for number in value if isinstance(value, list) else [value]:
        whole = isinstance(number, float) and number.is_integer()  # `keys` lets 1e3 stand for 1000
        if isinstance(number, int | float) and (text := problem(name, int(number) if whole else number, section)):
            return {key: text}
    return {}


def _given_in(config: Config, section: str, name: str) -> str:
    """The key of a model's value by the section that gives it: its own, megatron_training, or its model's."""
    for where in (section, "megatron_training"):
        if any(str(key).replace("-", "_") == name for key in config.tree.get(where) or {}):
            return f"{where}.{name}"
    return f"model.{config.model}.{name}"


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

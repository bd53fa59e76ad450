"""MindSpeed-RL's configuration schema: the keys of its three classes with their defaults, for each version.

    >>> from minimind_mcore.rl.schema import defaults
    >>> defaults("RLConfig")["clip_ratio"]
    0.2

`rl_schema.json` was read from the classes themselves (mindspeed_rl/config_cls: MegatronConfig, RLConfig,
GenerateConfig), of release 2.2.0 and of master of 2026-04. A key is of the type of its default; where that is
None the type is that of the flag of MindSpeed-LLM with that name, or is in `UNTOLD`.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import json
from typing import Any

from minimind_mcore.arguments import TYPES, flag_table

VERSIONS = ("master", "2.2.0")
NEWEST = "master"

# Section of the YAML: the class that reads it.
SECTIONS = {
    "megatron_training": "MegatronConfig",
    "actor_config": "MegatronConfig",
    "ref_config": "MegatronConfig",
    "reward_config": "MegatronConfig",
    "critic_config": "MegatronConfig",
    "rl_config": "RLConfig",
    "generate_config": "GenerateConfig",
}
MEGATRON_SECTIONS = tuple(name for name, reader in SECTIONS.items() if reader == "MegatronConfig")
# Sections that MindSpeed-RL has beside those: models by name, profilers, and what it never looks at.
OTHER_SECTIONS = ("defaults", "model", "profiler_config", "msprobe_config", "minimind")

# Types of the keys whose default is None and which are no flags, or differ from them.
UNTOLD: dict[str, type] = {
    "algorithm": str,
    "mm_model": str,
    "data_path": str,  # one prefix, where the flag takes several
    "moe_layer_freq": int,
    "integrated_mode_config": dict,
    "tool_config_path": str,
    "tool_response_truncate_side": str,
    "tool_parser_format": str,
    "expert_map_path": str,
    "seed": int,
}


@functools.cache
def _schema() -> dict[str, dict[str, dict[str, Any]]]:
    text = importlib.resources.files("minimind_mcore.rl").joinpath("rl_schema.json").read_text(encoding="utf-8")
    loaded: dict[str, dict[str, dict[str, Any]]] = json.loads(text)
    return loaded


def defaults(reader: str, version: str = NEWEST) -> dict[str, Any]:
    """Every key of a class of MindSpeed-RL with its default (a copy).

    Args:
        reader: "MegatronConfig", "RLConfig" or "GenerateConfig".
        version: one of `VERSIONS`.
    """
    return copy.deepcopy(_schema()[version][reader])


def value_type(reader: str, key: str, version: str = NEWEST) -> type:
    """The type of a key's value: bool, int, float, str, list or dict. None is always allowed beside it."""
    default = _schema()[version][reader][key]
    if default is not None:
        return type(default)
    if key in UNTOLD:
        return UNTOLD[key]
    if reader != "MegatronConfig":
        return dict if key.endswith("_resource") else int
    record = flag_table().get("--" + key.replace("_", "-"), {})
    if record.get("nargs"):
        return list
    if record.get("action", "").startswith("store_"):
        return bool
    parsed = TYPES.get(record.get("type", "str"), str)
    return parsed if isinstance(parsed, type) else str

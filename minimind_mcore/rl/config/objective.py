"""The objective of a run: an algorithm of `algorithms.table`, changed by keys of the YAML.

A configuration is composed in layers: the YAML files of its defaults list in hydra's order, then the command line.
The last layer that sets `minimind.algorithm` chooses the algorithm. In that layer and in later ones a key of
`rl_config` changes the algorithm. In earlier layers the same key was written for another algorithm, so the value from
`algorithms.table` replaces it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minimind_mcore.rl.algorithms.table import ALGORITHMS, Algorithm, algorithm
from minimind_mcore.rl.config.schema import Config, defaults

ALGORITHM = ("minimind", "algorithm")
CLIP = ("clip_ratio", "clip_higher_enable", "clip_ratio_low", "clip_ratio_high")
SAMPLING_BATCHES = 4  # as in configs/rlxf/dapo_minimind3.yaml
OVERLONG_SHARE = 4  # a quarter of max_tokens, as in configs/rlxf/dapo_minimind3.yaml
CLIPPED = ("clip", "gspo")  # policy losses that the clip keys change
# Keys of `rl_config` whose value is copied to a field of `Algorithm`.
SAME = {
    "kl_penalty": "kl_kind",
    "init_kl_coef": "kl_coef",
    "filter_groups_enable": "dynamic_sampling",
    "overlong_buffer_enable": "overlong",
}
# Keys of a configuration, with the fields of `Algorithm` that they set.
FIELDS: dict[tuple[str, str], tuple[str, ...]] = {
    **{("rl_config", key): ("clip_low", "clip_high") for key in CLIP},
    ("rl_config", "token_level_loss"): ("aggregation",),
    ("rl_config", "init_kl_coef"): ("kl", "kl_coef"),
    ("rl_config", "use_kl_in_reward"): ("kl",),
    **{("rl_config", key): (field,) for key, field in SAME.items() if key != "init_kl_coef"},
    ("minimind", "cispo_clip"): ("clip_high",),
    ("minimind", "dual_clip"): ("dual_clip",),
}


def objective(config: Config) -> Algorithm:
    """Return the algorithm of `minimind.algorithm`, changed by the keys that `rl_config` sets.

    A key that is left out keeps the algorithm's value. MindSpeed-RL's default is not used, because it is GRPO's value.
    """
    chosen, rl = algorithm(config.minimind.algorithm), config.rl
    given = config.tree["rl_config"]
    changes: dict[str, Any] = {field: getattr(rl, key) for key, field in SAME.items() if key in given}
    if chosen.loss == "cispo":
        changes["clip_high"] = config.minimind.cispo_clip
    elif rl.clip_higher_enable:
        changes |= {"clip_low": rl.clip_ratio_low, "clip_high": rl.clip_ratio_high}
    elif "clip_ratio" in given:
        changes |= {"clip_low": rl.clip_ratio, "clip_high": rl.clip_ratio}
    if "token_level_loss" in given:
        changes["aggregation"] = "token-mean" if rl.token_level_loss else "seq-mean-token-mean"
    if config.minimind.dual_clip is not None:
        changes["dual_clip"] = config.minimind.dual_clip
    if rl.use_kl_in_reward:
        changes["kl"] = "reward"
    changes |= {"loss": config.minimind.policy_loss} if config.minimind.policy_loss else {}
    changes |= {"advantage": config.minimind.advantage} if config.minimind.advantage else {}
    chosen = dataclasses.replace(chosen, **changes)
    return dataclasses.replace(chosen, kl="none") if chosen.kl_coef == 0 else chosen


def sampling_batches(config: Config) -> int:
    """Return the number of batches that dynamic sampling may generate for a step (`filter_groups_max_batches`).

    MindSpeed-RL's default of 1 would replace no group. If the key is left out, dynamic sampling uses
    `SAMPLING_BATCHES`.
    """
    if objective(config).dynamic_sampling and "filter_groups_max_batches" not in config.tree["rl_config"]:
        return SAMPLING_BATCHES
    return int(config.rl.filter_groups_max_batches)


def overlong_lengths(config: Config) -> tuple[int, int]:
    """Return `rollout_max_tokens` and `overlong_buffer`: the longest response, and its last tokens with a penalty.

    MindSpeed-RL's defaults of 2048 and 0 would penalize nothing. Here `rollout_max_tokens` defaults to `max_tokens` and
    `overlong_buffer` to a quarter of `max_tokens`. The buffer is 0 if the algorithm has no penalty.
    """
    rl, given, answer = config.rl, config.tree["rl_config"], int(config.generate.sampling_config.max_tokens)
    if not objective(config).overlong:
        return answer, 0
    longest = rl.rollout_max_tokens if "rollout_max_tokens" in given else answer
    return int(longest), int(rl.overlong_buffer if "overlong_buffer" in given else answer // OVERLONG_SHARE)


def steps_ahead(config: Config) -> int:
    """Return the number of steps that the rollout engines may be ahead of the training. Dynamic sampling never is."""
    return 0 if config.rl.blocking or objective(config).dynamic_sampling else int(config.minimind.staleness)


def updates_per_step(config: Config) -> int:
    """Return the number of optimizer steps of a training step."""
    responses = config.actor.global_batch_size * config.rl.n_samples_per_prompt
    return int(responses // config.rl.mini_batch_size * config.rl.epochs)


def trains_on_older(config: Config) -> bool:
    """Return whether responses may come from older weights.

    They do if engines are ahead of the training, or if a response is generated in parts over several steps.
    """
    return steps_ahead(config) > 0 or config.rl.partial_rollout_max_split > 1


@dataclass(frozen=True)
class ConfigLayer:
    """One layer of a composed configuration.

    Attributes:
        name: name of the file, or "the command line".
        keys: the values that the layer sets, by section and key.
    """

    name: str
    keys: Mapping[tuple[str, str], Any]


def layer_of(name: str, tree: Mapping[str, Any]) -> ConfigLayer:
    """Return the layer of a file's content."""
    found = {
        (section, str(key).replace("-", "_")): value
        for section, content in tree.items()
        if isinstance(content, Mapping)
        for key, value in content.items()
    }
    return ConfigLayer(name, found)


def command_line(overrides: Sequence[tuple[str, Any]]) -> ConfigLayer:
    """Return the layer of hydra's overrides, each a dotted key and its value."""
    tree: dict[str, dict[str, Any]] = {}
    for dotted, value in overrides:
        section, _, key = dotted.partition(".")
        if key:
            tree.setdefault(section, {})[key] = value
        elif isinstance(value, Mapping):
            tree.setdefault(section, {}).update({str(name): one for name, one in value.items()})
    return layer_of("the command line", tree)


@dataclass(frozen=True)
class Replaced:
    """A key whose value is replaced by the algorithm's.

    Attributes:
        section: section of the key.
        key: name of the key.
        message: message to print, or None if the algorithm has the same value.
    """

    section: str
    key: str
    message: str | None


def replaced(layers: Sequence[ConfigLayer]) -> Iterator[Replaced]:
    """Yield the keys of earlier layers that the algorithm replaces.

    Args:
        layers: in merge order.
    """
    setting = [number for number, layer in enumerate(layers) if ALGORITHM in layer.keys]
    if not setting:
        return
    chosen, name = setting[-1], str(layers[setting[-1]].keys[ALGORITHM])
    if name not in ALGORITHMS:  # `resolve` refuses it
        return
    kept = {key for layer in layers[chosen:] for key in layer.keys}
    for section, key in [found for found in FIELDS if found not in kept]:
        earlier = [layer for layer in layers[:chosen] if (section, key) in layer.keys]
        if not earlier:
            continue
        value = earlier[-1].keys[section, key]
        row = ALGORITHMS[name]
        own = ", ".join(f"{field} {getattr(row, field)}" for field in FIELDS[section, key])
        same = value == in_keys(row).get((section, key), object())
        message = (
            f"{section}.{key}: {value} of {earlier[-1].name} is replaced by the values of {name} ({own}), because "
            f"{layers[chosen].name} sets minimind.algorithm. Set the key there too to change {name}"
        )
        yield Replaced(section, key, None if same else message)


def in_keys(row: Algorithm) -> dict[tuple[str, str], Any]:
    """Return an algorithm as keys of a configuration, as far as keys exist for its fields."""
    found: dict[str, Any] = {
        "kl_penalty": row.kl_kind,
        "init_kl_coef": row.kl_coef if row.kl != "none" else 0.0,
        "use_kl_in_reward": row.kl == "reward",
        "filter_groups_enable": row.dynamic_sampling,
        "overlong_buffer_enable": row.overlong,
    }
    if row.aggregation in ("token-mean", "seq-mean-token-mean"):
        found["token_level_loss"] = row.aggregation == "token-mean"
    if row.loss in CLIPPED and row.clip_low == row.clip_high:
        found |= {"clip_higher_enable": False, "clip_ratio": row.clip_low}
    elif row.loss in CLIPPED:
        found |= {"clip_higher_enable": True, "clip_ratio_low": row.clip_low, "clip_ratio_high": row.clip_high}
    more = {("minimind", "cispo_clip"): row.clip_high} if row.loss == "cispo" else {}
    return {("rl_config", key): value for key, value in found.items()} | more


def with_table(tree: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Return a tree for MindSpeed-RL, with the algorithm's values filled in for keys that the tree leaves out.

    The embedded trainer reads these values from its table. MindSpeed-RL has no table: its defaults are the values of
    GRPO for every algorithm.
    """
    rl, name = tree.get("rl_config"), (tree.get("minimind") or {}).get("algorithm")
    if not isinstance(rl, Mapping) or name not in ALGORITHMS:
        return dict(tree)
    known = defaults("RLConfig", version)
    more = {
        key: value
        for (section, key), value in in_keys(ALGORITHMS[name]).items()
        if section == "rl_config" and key in known and value != known[key] and key not in rl
    }
    if any(key in rl for key in CLIP):
        more = {key: value for key, value in more.items() if key not in CLIP}
    generate: Any = tree.get("generate_config")
    sampling = generate.get("sampling_config") if isinstance(generate, Mapping) else None
    answer = sampling.get("max_tokens") if isinstance(sampling, Mapping) else None
    if more.get("filter_groups_enable"):  # MindSpeed-RL's default would replace no group
        more |= {"filter_groups_max_batches": SAMPLING_BATCHES}
    if more.get("overlong_buffer_enable") and isinstance(answer, int):  # its defaults would penalize no response
        more |= {"rollout_max_tokens": answer, "overlong_buffer": answer // OVERLONG_SHARE}
    return {**tree, "rl_config": {**rl, **{key: value for key, value in more.items() if key not in rl}}}

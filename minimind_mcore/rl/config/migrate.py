"""Rewrite older keys of MindSpeed-RL's YAML, which guides still show, for a version of MindSpeed-RL.

    tree, changes = migrate(yaml.safe_load(text), "master")      # changes: one line each, what changed and why

| found | becomes |
|---|---|
| rl_config.shuffle_minibatch | shuffle_mini_batch |
| colocate_actor_ref, colocate_all_models | removed: use_integrated_worker, true by default, replaces them |
| ref_config, reward_config, reference_resource without the switch | use_integrated_worker: false, missing keys added |
| mini_batch_size in sequences (global_batch_size times n_samples_per_prompt) | mini_batch_size in prompts |
| model names that differ from a defined name only in - and _ | the defined name |
| keys that have another name in the other version (RENAMED) | the name in this version |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from minimind_mcore.rl.config.schema import MEGATRON_SECTIONS, SECTIONS, defaults, schema

Tree = dict[str, Any]

RENAMED: Mapping[str, str] = schema()["renamed"]  # names in release 2.2.0: names in master
RESOURCES = ("reference_resource", "reward_resource")


def migrate(tree: Mapping[str, Any], version: str) -> tuple[Tree, list[str]]:
    """Return the tree for a version, and the changes. Unknown keys are left for the linter.

    Args:
        tree: the YAML, composed or one of its files.
        version: the version of MindSpeed-RL, "master" or "2.2.0".
    """
    new, changes = copy.deepcopy(dict(tree)), list[str]()
    for step in (_shuffle, _colocate, _separate, _mini_batch, _model_names):
        changes += step(new)
    changes += _renamed(new, version)
    return new, changes


def _section(tree: Tree, name: str) -> Tree:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _shuffle(tree: Tree) -> Iterator[str]:
    rl = _section(tree, "rl_config")
    if "shuffle_minibatch" not in rl:
        return
    value = rl.pop("shuffle_minibatch")
    rl.setdefault("shuffle_mini_batch", value)
    yield "rl_config.shuffle_minibatch is called shuffle_mini_batch"


def _colocate(tree: Tree) -> Iterator[str]:
    rl = _section(tree, "rl_config")
    for key in ("colocate_actor_ref", "colocate_all_models"):
        if key in rl:
            if rl.pop(key):
                rl.setdefault("use_integrated_worker", True)
            yield f"rl_config.{key} is removed: use_integrated_worker decides whether actor and reference share workers"


def _separate(tree: Tree) -> Iterator[str]:
    """Set use_integrated_worker: false for separate workers, and add the sections and the resource that it requires."""
    rl = _section(tree, "rl_config")
    apart: list[str] = [name for name in ("ref_config", "reward_config") if name in tree]
    apart += [f"rl_config.{name}" for name in RESOURCES if rl.get(name) is not None]
    if not apart:
        return
    if rl.get("use_integrated_worker", True):
        rl["use_integrated_worker"] = False
        yield f"{apart[0]} is for separate workers: use_integrated_worker: false, because true is the default now"
    for name, other in (("ref_config", "actor_config"), ("reward_config", "ref_config")):
        if name not in tree and other in tree:
            tree[name] = {key: value for key, value in tree[other].items() if key != "save"}
            yield f"{name} is mandatory with use_integrated_worker: false: copied from {other}"
    if rl.get("reference_resource") is None and rl.get("actor_resource"):
        rl["reference_resource"] = copy.deepcopy(rl["actor_resource"])
        yield "rl_config.reference_resource is mandatory with use_integrated_worker: false: copied from actor_resource"


def _mini_batch(tree: Tree) -> Iterator[str]:
    """Convert a number of sequences, as older versions expected, to a number of prompts."""
    rl, megatron = _section(tree, "rl_config"), _section(tree, "megatron_training")
    found = (rl.get("mini_batch_size"), rl.get("n_samples_per_prompt", 1), megatron.get("global_batch_size"))
    if not all(isinstance(value, int) for value in found):
        return
    size, samples, prompts = (int(value or 0) for value in found)
    if size <= prompts or size % samples:
        return
    rl["mini_batch_size"] = size // samples
    yield (
        f"rl_config.mini_batch_size counts prompts now, and is multiplied by n_samples_per_prompt {samples}: "
        f"{size} sequences are {size // samples} prompts"
    )


def _model_names(tree: Tree) -> Iterator[str]:
    models = _section(tree, "model")
    plain: Callable[[str], str] = lambda name: name.replace("-", "").replace("_", "").lower()  # noqa: E731
    defined = {plain(name): name for name in models}
    for group in [entry for entry in tree.get("defaults") or [] if isinstance(entry, dict) and "model" in entry]:
        names = group["model"] if isinstance(group["model"], list) else [group["model"]]
        defined |= {plain(str(name)): str(name) for name in names}
    for section in MEGATRON_SECTIONS:
        name = _section(tree, section).get("model")
        if isinstance(name, str) and defined.get(plain(name), name) != name:
            tree[section]["model"] = defined[plain(name)]
            yield f"{section}.model: {name} is defined as {defined[plain(name)]}"


def _renamed(tree: Tree, version: str) -> Iterator[str]:
    names = {new: old for old, new in RENAMED.items()} if version == "2.2.0" else RENAMED
    known = defaults("MegatronConfig", version)
    places = [(name, _section(tree, name)) for name in MEGATRON_SECTIONS]
    places += [(f"model.{name}", _section(_section(tree, "model"), name)) for name in _section(tree, "model")]
    for where, section in places:
        for key in list(section):
            if key not in known and names.get(key) in known:
                section[names[key]] = section.pop(key)
                yield f"{where}.{key} is called {names[key]} in MindSpeed-RL {version}"
    yield from _absent(tree, version)


def _absent(tree: Tree, version: str) -> Iterator[str]:
    """Drop keys that only the other version has, if they are at their default."""
    other = "master" if version == "2.2.0" else "2.2.0"
    for name, reader in SECTIONS.items():
        known, others = defaults(reader, version), defaults(reader, other)
        section = _section(tree, name)
        for key in list(section):
            if key not in known and key in others and section[key] == others[key]:
                del section[key]
                yield f"{name}.{key} does not exist in MindSpeed-RL {version}; it was at its default"

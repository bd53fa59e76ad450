"""Whether a composed configuration has only keys that there are, with values of their types.

Each problem is (key, what is wrong); `values` and `rules` look on where there are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.rl.schema import OTHER_SECTIONS, SECTIONS, defaults, value_type
from minimind_mcore.rl.settings import nearest, settings
from minimind_mcore.rl.values import Problem

# Types of what is in a list.
ELEMENTS: dict[str, tuple[type, str]] = {"verifier_function": (str, "names"), "verifier_weight": (float, "numbers")}
# Keys of Megatron that reckoning needs: null, by which Megatron takes its own default, is none of their values.
SIZES = {
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "dataset_additional_keys", "seed"),
}


def keys(tree: Mapping[str, Any], version: str) -> list[Problem]:
    """Unknown sections and keys, and values of the wrong type."""
    found = []
    for name, section in tree.items():
        if name in OTHER_SECTIONS:
            continue
        if name not in SECTIONS:
            found.append((name, f"unknown section{nearest(name, [*SECTIONS, *OTHER_SECTIONS])}"))
        elif not isinstance(section, Mapping):
            found.append((name, f"found {section!r}, expected a mapping of keys"))
        else:
            found += _section_keys(name, section, SECTIONS[name], version)
    for model, section in (tree.get("model") or {}).items():
        found += _section_keys(f"model.{model}", section, "MegatronConfig", version)
    found += [
        (name, "this section is missing")
        for name in ("megatron_training", "actor_config", "rl_config", "generate_config")
        if name not in tree
    ]
    try:
        settings(tree.get("minimind"))
    except UserError as error:
        found.append(of_error(error))
    return found


def _section_keys(where: str, section: Mapping[str, Any], reader: str, version: str) -> Iterator[Problem]:
    known = defaults(reader, version)
    for given, value in section.items():
        key = str(given).replace("-", "_")
        if key == "model" and reader == "MegatronConfig":
            continue
        if key not in known:
            yield (f"{where}.{key}", f"unknown to MindSpeed-RL {version}{nearest(key, known)}")
        elif _misfit(value, value_type(reader, key, version), known[key], reader, key):
            kind = value_type(reader, key, version).__name__
            yield (f"{where}.{key}", f"found {value!r}, expected {kind}")
        elif isinstance(value, Mapping) and (key == "sampling_config" or key.endswith("_resource")):
            yield from _sub_keys(f"{where}.{key}", value, known[key] or {"num_npus": None})
        elif key in ELEMENTS:
            element, what = ELEMENTS[key]
            if not all(item is not None and fits(item, element) for item in value):
                yield (f"{where}.{key}", f"found {value!r}, expected a list of {what}")


def _sub_keys(where: str, section: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[Problem]:
    """Those of a key that is itself a section; None is a number that is not given."""
    for name, value in section.items():
        kind = int if known.get(name) is None else type(known[name])
        if name not in known:
            yield (f"{where}.{name}", f"unknown key{nearest(name, known)}")
        elif not fits(value, kind) or (value is None and known[name] is not None):
            yield (f"{where}.{name}", f"found {value!r}, expected {kind.__name__}")


def _misfit(value: Any, kind: type, default: Any, reader: str, key: str) -> bool:
    """Whether a key cannot have this value; null only where it is the default or makes Megatron take its own."""
    if value is None:
        megatron = reader == "MegatronConfig"
        return key in SIZES if megatron else default is not None and default != "" and kind is not bool
    return not fits(value, kind) or (kind is list and reader != "MegatronConfig" and isinstance(value, str))


def fits(value: Any, kind: type) -> bool:
    """Whether a value can stand for a type: integers for floats, whole floats for integers, words for lists."""
    if value is None:
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return (isinstance(value, int) or (isinstance(value, float) and value.is_integer())) and not isinstance(
            value, bool
        )
    if kind is list:
        return isinstance(value, list | str)
    if kind is str:
        return isinstance(value, str | int | float | list) and not isinstance(value, bool)
    return isinstance(value, kind)


def of_error(error: UserError) -> Problem:
    """An error that begins with a key and a colon."""
    key, _, message = str(error).partition(": ")
    return key, message

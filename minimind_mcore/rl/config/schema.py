"""The schema of a configuration: which keys there are, their defaults, their types, and the resolved `Config`.

    >>> from minimind_mcore.rl.config.schema import defaults
    >>> defaults("RLConfig")["clip_ratio"]
    0.2

`rl_schema.json` has the keys of MindSpeed-RL's three classes with their defaults (mindspeed_rl/config_cls:
MegatronConfig, RLConfig, GenerateConfig), read from release 2.2.0 and from master of 2026-04. A key has the type of its
default. A default of None has no type: "types" names it, or MindSpeed-LLM's flag of the same name has it.
`MiniMindConfig` is the section `minimind`, which MindSpeed-RL's parser ignores.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.inputs.flags import TYPES, flag_table
from minimind_mcore.inputs.ranges import problem
from minimind_mcore.paths import PACKAGE

Problem = tuple[str, str]  # a key, and what is wrong with its value

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


@functools.cache
def schema() -> dict[str, Any]:
    """Return the content of rl_schema.json."""
    loaded: dict[str, Any] = json.loads((PACKAGE / "rl/config/rl_schema.json").read_text(encoding="utf-8"))
    return loaded


def defaults(reader: str, version: str = NEWEST) -> dict[str, Any]:
    """Every key of a class of MindSpeed-RL with its default (a copy).

    Args:
        reader: "MegatronConfig", "RLConfig" or "GenerateConfig".
        version: "master" or "2.2.0".
    """
    return copy.deepcopy(schema()[version][reader])


def value_type(reader: str, key: str, version: str = NEWEST) -> type:
    """The type of a key's value: bool, int, float, str, list or dict. None is always allowed beside it."""
    default = schema()[version][reader][key]
    if default is not None:
        return type(default)
    if name := schema()["types"].get(key):
        return {kind.__name__: kind for kind in (int, str, dict)}[name]
    if reader != "MegatronConfig":
        return dict if key.endswith("_resource") else int
    record = flag_table().get("--" + key.replace("_", "-"), {})
    if record.get("nargs"):
        return list
    if record.get("action", "").startswith("store_"):
        return bool
    parsed = TYPES.get(record.get("type", "str"), str)
    return parsed if isinstance(parsed, type) else str


# The section `minimind`


@dataclass(frozen=True, kw_only=True)
class UserReward:
    """A reward function of the user's.

    Attributes:
        path: "package.module:function", importable from the run's directory or PYTHONPATH.
        weight: it is added to the reward with this weight.
    """

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MiniMindConfig:
    """The section `minimind`; every key may be left out.

    Attributes:
        algorithm: advantages and loss; the settings of each are MindSpeed-RL's own keys of rl_config.
        policy_loss: "package.module:function", a function of the user's in place of the algorithm's policy loss; see
            `losses.POLICY_LOSSES` for its signature.
        advantage: likewise in place of the algorithm's advantage; see `advantages.ADVANTAGES`.
        cispo_clip: CISPO: the importance ratio is cut at this, and no gradient goes through it.
        dual_clip: the clipped loss of a token with a negative advantage is at most this many times its advantage
            (PPO's dual clip, verl's clip_ratio_c); None: no limit.
        spo_half_life: SPO: KL at which the weight of the past of a prompt's baseline halves.
        spo_rho: SPO: smallest and largest weight of the past.
        precision: of weights and arithmetic of the training; bf16 on NPU and GPU, fp32 on a CPU.
        rollout_engine: what writes the responses.
        rollout_correction: "tis": each token's loss is weighted by the ratio of the trainer's probability to the
            rollout engine's; "none": the difference is only measured.
        rollout_correction_cap: the largest such weight.
        weight_check_interval: every so many steps check that the rollout engine holds the trainer's weights,
            and that a perturbed engine is restored by a sync; 0: never.
        rewards: the user's own reward functions, added to the verifiers of rl_config.
        reward_model: directory of a Hugging Face sequence classifier or an InternLM-style reward model (one with
            get_score). It runs in the reward actor, on the CPU in fp32.
        reward_model_trust_remote_code: run the Python in that directory, which InternLM-style models need.
        reward_model_weight: its score is added with this weight.
        reward_model_range: its score is cut to plus or minus this.
        reward_failure_limit: share of a step's verdicts that may fail (exception, timeout) before the run stops.
        eval_data: prefixes of sets of held-out prompts (one may stand without a list), whose accuracy is measured
            before, during and after; None: the prompts at data_path with `_unseen` behind it, if there are any.
        eval_interval: every so many steps; 0: only before and after.
        eval_prompts: of each set, the first so many.
        eval_samples: k responses are also drawn to each of these prompts, for avg@k and pass@k; 1: only the likeliest.
        output_dir: logs, metrics, curves, samples.
        sample_interval: print sample completions every so many steps; 0: never.
        save_rollouts: directory to save every step's rollouts in.
        replay_rollouts: directory to read them from instead of generating.
        keep_last: keep only the newest N checkpoints, and of a critic, which is saved first, one more; None: all.
        resume_schedule: what a run that resumes does where the YAML's learning-rate schedule (lr, min_lr, warmup,
            train_iters, weight_decay) is not the checkpoint's: "same" refuses, "override" follows the YAML,
            "checkpoint" follows the checkpoint.
        actor_timeout_s: an actor that does not answer a call for so long is taken for dead.
        cluster_wait_s: how long to wait for the cluster to have the resources, at the start and after a node is lost.
        max_restarts: of training ranks, rollout and reward actors, each, before the run gives up; they are counted
            from the furthest step that is done, so that a rare fault never ends a run, and one that comes back does.
    """

    algorithm: Literal[
        "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline",
        "ppo", "spo",
    ] = "grpo"  # fmt: skip
    policy_loss: str | None = None
    advantage: str | None = None
    cispo_clip: float = 5.0
    dual_clip: float | None = None
    spo_half_life: float = 0.06
    spo_rho: tuple[float, float] = (0.5, 0.96)
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    rollout_engine: Literal["transformers", "vllm"] = "transformers"
    rollout_correction: Literal["none", "tis"] = "none"
    rollout_correction_cap: float = 2.0
    weight_check_interval: int = 0
    rewards: tuple[UserReward, ...] = ()
    reward_model: str | None = None
    reward_model_trust_remote_code: bool = False
    reward_model_weight: float = 1.0
    reward_model_range: float = 3.0
    reward_failure_limit: float = 0.1
    eval_data: tuple[str, ...] | None = None
    eval_interval: int = 0
    eval_prompts: int = 200
    eval_samples: int = 1
    output_dir: str = "outputs/grpo"
    sample_interval: int = 10
    save_rollouts: str | None = None
    replay_rollouts: str | None = None
    keep_last: int | None = None
    resume_schedule: Literal["same", "override", "checkpoint"] = "same"
    actor_timeout_s: float = 1800.0
    cluster_wait_s: float = 600.0
    max_restarts: int = 3


def minimind_config(section: Mapping[str, Any] | None) -> MiniMindConfig:
    """The section as its dataclass.

    Raises:
        UserError: an unknown key (with the nearest name), or a value of the wrong type.
    """
    return typing.cast(MiniMindConfig, _build(MiniMindConfig, section or {}, "minimind"))


def _build(cls: type, section: Mapping[str, Any], where: str) -> Any:
    """A frozen dataclass from a mapping, every value checked against its annotation."""
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: found {section!r}, expected a mapping of keys")
    kinds = typing.get_type_hints(cls)
    for key in section:
        if key not in kinds:
            raise UserError(f"{where}.{key}: unknown key{did_you_mean(key, kinds)}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    for key in required:
        if key not in section:
            raise UserError(f"{where}.{key} is missing")
    return cls(**{key: _convert(kinds[key], value, f"{where}.{key}") for key, value in section.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    """The value as its annotation wants it; `UserError` if it is something else."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # "X | None", and nothing else here
        return None if value is None else _convert(arguments[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}: found {value!r}, expected one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        value = [value] if isinstance(value, str) and arguments[0] is str else value
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{where}: found {value!r}, expected a list")
        kinds = [arguments[0]] * len(value) if Ellipsis in arguments else list(arguments)
        if len(kinds) != len(value):
            raise UserError(f"{where}: found {len(value)} values, expected {len(kinds)}")
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), {"path": value} if isinstance(value, str) else value, where)
    number = float(value) if kind is float and type(value) is int and abs(value) < 2**63 else value
    if type(number) is not kind:
        raise UserError(f"{where}: found {value!r}, expected {kind.__name__}")
    section, _, name = where.rpartition(".")
    if wrong := problem(name.partition("[")[0], value, section):
        raise UserError(f"{where}: {wrong}")
    return number


# A resolved configuration


class Section(SimpleNamespace):
    """Keys of a section as attributes, not to be changed; a name that there is not suggests the nearest."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"no key {name}{did_you_mean(name, vars(self))}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: a configuration is not changed after it is resolved")


@dataclass(frozen=True)
class Config:
    """A resolved configuration. It can be pickled, and needs neither hydra nor ray.

    Attributes:
        model: name of the actor's model in `model/*.yaml`.
        actor: MegatronConfig's keys of the actor.
        ref: of the reference; the actor's own where one worker is both (`rl.use_integrated_worker`).
        reward: of a reward model that Megatron runs, or None.
        critic: of PPO's critic, or None.
        rl: RLConfig's keys. As in MindSpeed-RL's object `mini_batch_size` counts sequences: the YAML's
            number of prompts times `n_samples_per_prompt`.
        generate: GenerateConfig's keys; `sampling_config` is a section of its own.
        minimind: the section `minimind`.
        tree: the YAML that all this was resolved from, as plain dicts and lists.
    """

    model: str
    actor: Section
    ref: Section
    reward: Section | None
    critic: Section | None
    rl: Section
    generate: Section
    minimind: MiniMindConfig
    tree: Mapping[str, Any]

    @property
    def reward_names(self) -> list[str]:
        """Names of the verifiers, then the paths of the user's own functions."""
        return [*self.rl.verifier_function, *(reward.path for reward in self.minimind.rewards)]

    @property
    def reward_weights(self) -> list[float]:
        """Weights in the order of `reward_names`."""
        return [*self.rl.verifier_weight, *(reward.weight for reward in self.minimind.rewards)]


# Keys and types of a composed tree

# Types of what is in a list.
ELEMENTS: dict[str, tuple[type, str]] = {"verifier_function": (str, "names"), "verifier_weight": (float, "numbers")}
# Megatron keys used in arithmetic. null (Megatron's default) is not allowed.
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
            found.append((name, f"unknown section{did_you_mean(name, [*SECTIONS, *OTHER_SECTIONS])}"))
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
        minimind_config(tree.get("minimind"))
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
            yield (f"{where}.{key}", f"unknown key{did_you_mean(key, known)} (not in MindSpeed-RL {version})")
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
            yield (f"{where}.{name}", f"unknown key{did_you_mean(name, known)}")
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
    if value is None or isinstance(value, bool):
        return value is None or kind is bool
    if kind is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    wider: dict[type, tuple[type, ...]] = {float: (int, float), list: (list, str), str: (str, int, float, list)}
    return isinstance(value, wider.get(kind, kind))


def of_error(error: UserError) -> Problem:
    """An error that begins with a key and a colon."""
    key, _, message = str(error).partition(": ")
    return key, message


def refuse(problems: Sequence[Problem], name: str) -> None:
    """Raise what is wrong with the configuration `name`, if anything is.

    Raises:
        UserError: all problems, one a line.
    """
    errors = [f"{key}: {message}" for key, message in problems]
    older = " (minimind-mcore rl lint --fix knows older names)" if any("unknown" in error for error in errors) else ""
    if len(errors) == 1:
        raise UserError(errors[0] + older)
    if errors:
        raise UserError("\n  ".join([f"{name}: {len(errors)} things are wrong{older}:", *errors]))

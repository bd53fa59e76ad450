"""The schema of a configuration: its keys with defaults and types, and the resolved `Config`.

    >>> from minimind_mcore.rl.config.schema import defaults
    >>> defaults("RLConfig")["clip_ratio"]
    0.2

`rl_schema.json` lists the keys of MindSpeed-RL's three classes with their defaults (mindspeed_rl/config_cls:
MegatronConfig, RLConfig, GenerateConfig), taken from release 2.2.0 and from master of 2026-04. A key has the type of
its default. If the default is None, "types" gives the type, or else MindSpeed-LLM's flag of the same name.
`MiniMindConfig` defines the section `minimind`, which MindSpeed-RL's parser ignores.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.inputs.flags import TYPES, flag_table
from minimind_mcore.inputs.ranges import problem
from minimind_mcore.paths import package_json

Problem = tuple[str, str]  # a key, and what is wrong with its value

NEWEST = "master"

# Sections of the YAML, with the class that reads each.
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
# Further sections of MindSpeed-RL: models by name, profilers, and sections that it ignores.
OTHER_SECTIONS = ("defaults", "model", "profiler_config", "msprobe_config", "minimind")


def schema() -> dict[str, Any]:
    """Return the content of rl_schema.json."""
    return package_json("rl/config/rl_schema.json")


def defaults(reader: str, version: str = NEWEST) -> dict[str, Any]:
    """Return every key of a MindSpeed-RL class with its default (a copy).

    Args:
        reader: "MegatronConfig", "RLConfig" or "GenerateConfig".
        version: "master" or "2.2.0".
    """
    return copy.deepcopy(schema()[version][reader])


def value_type(reader: str, key: str, version: str = NEWEST) -> type:
    """Return the type of a key's value: bool, int, float, str, list or dict. None is always allowed as well."""
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
    """A user's reward function.

    Attributes:
        path: "package.module:function", importable from the run's directory or PYTHONPATH.
        weight: weight of its score in the reward.
    """

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Devices of a kind of worker, written as in `rl_config.actor_resource`.

    Attributes:
        num_npus: number of devices; on a CPU the number of processes.
    """

    num_npus: int


@dataclass(frozen=True, kw_only=True)
class MiniMindConfig:
    """The section `minimind`. Every key may be left out.

    Attributes:
        algorithm: advantage and loss. The settings of each algorithm are MindSpeed-RL's keys of rl_config.
        policy_loss: "package.module:function", a user's function that replaces the algorithm's policy loss.
            `losses.POLICY_LOSSES` defines its signature.
        advantage: "package.module:function", a user's function that replaces the algorithm's advantage.
            `advantages.ADVANTAGES` defines its signature.
        cispo_clip: upper bound of CISPO's importance ratio. No gradient flows through the ratio.
        dual_clip: the clipped loss of a token with a negative advantage is at most this many times its advantage
            (PPO's dual clip, verl's clip_ratio_c). None: no limit.
        spo_half_life: SPO: KL divergence that halves the weight of earlier rewards in the baseline.
        spo_rho: SPO: smallest and largest weight of earlier rewards.
        precision: dtype of weights and arithmetic in training. On a CPU `configs/rlxf/device/cpu.yaml` sets fp32.
        rollout_engine: engine that generates the responses: this kit's decoder, vLLM in the rollout actors, or SGLang
            servers that you have started.
        sglang_base_url: addresses of SGLang servers, such as http://10.0.0.1:30000, one for each rollout engine.
        sglang_shared_path: directory that the run and the SGLang servers see under the same path. Weights are
            transferred through it.
        sglang_timeout_s: how long an SGLang server may take to answer.
        router_replay: the trainer sends each token to the experts that the rollout engine chose.
        rollout_resource: devices of the rollout engines, one engine on each, spread over the hosts. None: the engines
            share the devices of the actor.
        rollout_function: "package.module:function", a user's function that generates the responses. It has the
            arguments of `rollouts.generate`, and needs `rl_config.partial_rollout_max_split: 1`.
        rollout_filter: "package.module:function" (rewards [responses], scores by verifier, n) -> [groups] bool: the
            groups to train on. Prompts are taken until a step is full, as with filter_groups_enable. The run ends with
            an error if `rl_config.filter_groups_max_batches` batches (2 or more) are too few.
        staleness: with `rl_config.blocking: false`, the number of steps that the engines may be ahead of the training.
            Set rollout_resource too, or engines and training compete for the same devices.
        rollout_correction: "tis": each token's loss is weighted by the ratio of the trainer's probability to the
            rollout engine's. "none": no weight. If responses may come from older weights (`rl_config.blocking: false`,
            `partial_rollout_max_split`), "none" takes the ratio of the loss to the rollout engine's log-probabilities.
        rollout_correction_cap: upper bound of that weight.
        weight_check_interval: every N steps overwrite the weights of every rollout engine, send them again, and
            compare. 0: only when the run starts.
        rewards: the user's own reward functions, in addition to the verifiers of rl_config. Each is written as
            `{path: package.module:function, weight: 1.0}`.
        reward_model: directory of a Hugging Face sequence classifier or an InternLM-style reward model (one with
            get_score). It runs in the reward actor, on the CPU in fp32.
        reward_model_trust_remote_code: run the Python in that directory, which InternLM-style models need.
        reward_model_weight: weight of the reward model's score in the reward.
        reward_model_range: the reward model's score is clipped to plus or minus this value.
        reward_workers: number of reward actors. They are spread over the hosts, and each loads the reward model.
        reward_failure_limit: share of recent responses that a verifier may fail to score (exception, timeout) before
            the run stops.
        eval_data: prefixes of held-out prompt sets (a single prefix needs no list). Accuracy is measured before,
            during and after training. None: the prompts at data_path plus `_unseen`, if they exist.
        eval_interval: evaluate every N steps. 0: only before and after training.
        eval_prompts: number of prompts of each set, from its start.
        eval_samples: also sample k responses to each of these prompts, for avg@k and pass@k. 1: greedy decoding only.
        output_dir: directory of logs, metrics, curves and samples.
        sample_interval: print sample completions every N steps. 0: never.
        save_rollouts: directory for the rollouts of every step.
        replay_rollouts: directory to read rollouts from instead of generating.
        keep_last: keep only the newest N checkpoints, and N + 1 of a critic, which is saved first. None: all.
        resume_schedule: what a resumed run does if the YAML's learning-rate schedule (lr, min_lr, warmup,
            train_iters, weight_decay) differs from the checkpoint's: "same" refuses, "override" uses the YAML,
            "checkpoint" uses the checkpoint.
        actor_timeout_s: a training rank, a rollout actor or a reward actor that does not answer a call within this time
            counts as dead. A `rollout_function` that neither returns nor calls the engines within this time ends the
            run with an error, and so does a `rollout_filter` that does not return.
        cluster_wait_s: how long to wait for the cluster to have the resources, at the start and after a node is lost.
        max_restarts: restarts of training ranks, of rollout actors, of reward actors and of the rollout manager before
            the run gives up. The count restarts with every new step, so rare faults never end a run, and a fault that
            recurs does.
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
    rollout_engine: Literal["transformers", "vllm", "sglang"] = "transformers"
    sglang_base_url: tuple[str, ...] = ()
    sglang_shared_path: str = "outputs/sglang_weights"
    sglang_timeout_s: float = 120.0
    router_replay: bool = False
    rollout_resource: Resource | None = None
    rollout_function: str | None = None
    rollout_filter: str | None = None
    staleness: int = 1
    rollout_correction: Literal["none", "tis"] = "none"
    rollout_correction_cap: float = 2.0
    weight_check_interval: int = 0
    rewards: tuple[UserReward, ...] = ()
    reward_model: str | None = None
    reward_model_trust_remote_code: bool = False
    reward_model_weight: float = 1.0
    reward_model_range: float = 3.0
    reward_workers: int = 1
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
    """Return the section as its dataclass.

    Raises:
        UserError: an unknown key (with the nearest name), or a value of the wrong type.
    """
    return typing.cast(MiniMindConfig, _build(MiniMindConfig, section or {}, "minimind"))


def _build(cls: type, section: Mapping[str, Any], where: str) -> Any:
    """Build a frozen dataclass from a mapping, with every value checked against its annotation."""
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
    """Convert a value to its annotated type. A `UserError` if it has another type."""
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
    """The keys of a section as read-only attributes. The error for an unknown name suggests the nearest."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"no key {name}{did_you_mean(name, vars(self))}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: a resolved configuration cannot be changed")


@dataclass(frozen=True)
class Config:
    """A resolved configuration. It can be pickled, and needs neither hydra nor ray.

    Attributes:
        model: name of the actor's model in `model/*.yaml`.
        actor: MegatronConfig's keys of the actor.
        ref: keys of the reference model. The same as `actor` if one worker is both (`rl.use_integrated_worker`).
        reward: keys of a reward model that Megatron runs, or None.
        critic: keys of PPO's critic, or None.
        rl: RLConfig's keys. As in MindSpeed-RL's object `mini_batch_size` counts sequences: the YAML's
            number of prompts times `n_samples_per_prompt`.
        generate: GenerateConfig's keys. `sampling_config` is a section of its own.
        minimind: the section `minimind`.
        tree: the YAML that this configuration was resolved from, as plain dicts and lists.
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
    def rollout_engines(self) -> int:
        """Return the number of rollout engines: one on each device of their own, or on the actor's devices."""
        if self.minimind.rollout_resource:
            return self.minimind.rollout_resource.num_npus
        return int(self.generate.data_parallel_size or self.rl.actor_resource.num_npus)

    @property
    def reward_names(self) -> list[str]:
        """Return the names of the verifiers, then the paths of the user's own functions."""
        return [*self.rl.verifier_function, *(reward.path for reward in self.minimind.rewards)]

    @property
    def reward_weights(self) -> list[float]:
        """Return the weights in the order of `reward_names`."""
        return [*self.rl.verifier_weight, *(reward.weight for reward in self.minimind.rewards)]


# Keys and types of a composed tree

# Element types of lists.
ELEMENTS: dict[str, tuple[type, str]] = {"verifier_function": (str, "names"), "verifier_weight": (float, "numbers")}
# Megatron keys used in arithmetic. null (Megatron's default) is not allowed.
SIZES = {
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "dataset_additional_keys", "seed"),
}


def keys(tree: Mapping[str, Any], version: str) -> list[Problem]:
    """Return unknown sections and keys, and values of the wrong type."""
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
    """Yield the problems of a key that is itself a section. A default of None stands for a number that is not set."""
    for name, value in section.items():
        kind = int if known.get(name) is None else type(known[name])
        if name not in known:
            yield (f"{where}.{name}", f"unknown key{did_you_mean(name, known)}")
        elif not fits(value, kind) or (value is None and known[name] is not None):
            yield (f"{where}.{name}", f"found {value!r}, expected {kind.__name__}")


def _misfit(value: Any, kind: type, default: Any, reader: str, key: str) -> bool:
    """Return whether a value is invalid. null is valid if it is the default or selects Megatron's own default."""
    if value is None:
        megatron = reader == "MegatronConfig"
        return key in SIZES if megatron else default is not None and default != "" and kind is not bool
    return not fits(value, kind) or (kind is list and reader != "MegatronConfig" and isinstance(value, str))


def fits(value: Any, kind: type) -> bool:
    """Return whether a value has a type: integers count as floats, whole floats as integers, strings as lists."""
    if value is None or isinstance(value, bool):
        return value is None or kind is bool
    if kind is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    wider: dict[type, tuple[type, ...]] = {float: (int, float), list: (list, str), str: (str, int, float, list)}
    return isinstance(value, wider.get(kind, kind))


def of_error(error: UserError) -> Problem:
    """Split an error whose message is `key: problem`."""
    key, _, message = str(error).partition(": ")
    return key, message


def refuse(problems: Sequence[Problem], name: str) -> None:
    """Raise one error with all problems of the configuration `name`, if there are any.

    Raises:
        UserError: all problems, one per line.
    """
    errors = [f"{key}: {message}" for key, message in problems]
    older = " (minimind-mcore rl lint --fix knows older names)" if any("unknown" in error for error in errors) else ""
    if len(errors) == 1:
        raise UserError(errors[0] + older)
    if errors:
        raise UserError("\n  ".join([f"{name}: {len(errors)} things are wrong{older}:", *errors]))

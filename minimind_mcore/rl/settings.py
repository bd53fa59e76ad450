"""What MindSpeed-RL's schema has no word for: the section `minimind:` of the YAML, which its parser ignores.

Every field may be left out. On BACKEND=mindspeed-rl a field that differs from its default and cannot be
honoured there is an error of the linter (`HONOURED` has those that can).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minimind_mcore.errors import UserError
from minimind_mcore.ranges import problem

Algorithm = Literal["grpo", "dr_grpo", "dapo", "cispo", "ppo", "spo"]


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
class Settings:
    """The section `minimind:`.

    Attributes:
        algorithm: advantages and loss; the settings of each are MindSpeed-RL's own keys of rl_config.
        cispo_clip: CISPO: the importance ratio is cut at this, and no gradient goes through it.
        spo_half_life: SPO: KL at which the weight of the past of a prompt's baseline halves.
        spo_rho: SPO: smallest and largest weight of the past.
        precision: of weights and arithmetic of the training; bf16 on NPU and GPU, fp32 on a CPU.
        rollout_engine: what writes the responses.
        rollout_correction: "tis": each token's loss is weighted by the ratio of the trainer's probability to the
            rollout engine's, cut at `rollout_correction_cap`; "none": the difference is only measured.
        weight_check_interval: every so many steps check that the rollout engine holds the trainer's weights,
            and that a perturbed engine is restored by a sync; 0: never.
        rewards: the user's own reward functions, added to the verifiers of rl_config.
        reward_model: directory of a Hugging Face sequence classifier or an InternLM-style reward model (one with
            get_score). It runs in the reward actor, on the CPU in fp32.
        reward_model_trust_remote_code: run the Python in that directory, which InternLM-style models need.
        reward_model_weight: its score is added with this weight.
        reward_model_range: its score is cut to plus or minus this.
        reward_failure_limit: share of a step's verdicts that may fail (exception, timeout) before the run stops.
        eval_data: prefix of held-out prompts, whose accuracy is measured before, during and after; None: the
            prompts at data_path with `_unseen` behind it, if there are any.
        eval_interval: every so many steps; 0: only before and after.
        eval_prompts: of them, the first so many.
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

    algorithm: Algorithm = "grpo"
    cispo_clip: float = 5.0
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
    eval_data: str | None = None
    eval_interval: int = 0
    eval_prompts: int = 200
    output_dir: str = "outputs/grpo"
    sample_interval: int = 10
    save_rollouts: str | None = None
    replay_rollouts: str | None = None
    keep_last: int | None = None
    resume_schedule: Literal["same", "override", "checkpoint"] = "same"
    actor_timeout_s: float = 1800.0
    cluster_wait_s: float = 600.0
    max_restarts: int = 3


def nearest(key: str, known: typing.Iterable[str]) -> str:
    """A hint for an error about an unknown key: "; did you mean X?", or nothing."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def settings(section: Mapping[str, Any] | None) -> Settings:
    """The section as its dataclass.

    Raises:
        UserError: an unknown key (with the nearest name), or a value of the wrong type.
    """
    return typing.cast(Settings, _build(Settings, section or {}, "minimind"))


def _build(cls: type, section: Mapping[str, Any], where: str) -> Any:
    """A frozen dataclass from a mapping, every value checked against its annotation."""
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: found {section!r}, expected a mapping of keys")
    kinds = typing.get_type_hints(cls)
    for key in section:
        if key not in kinds:
            raise UserError(f"{where}.{key}: unknown key{nearest(key, kinds)}")
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
        if isinstance(value, str) or not isinstance(value, typing.Sequence):
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

"""Keys of MindSpeed-RL's schema that the embedded trainer does not heed.

A key by which a run would be another one is an error; what is only not needed is said in a line. Keys of how
MindSpeed-RL moves its data about (queues, packing, offloading) are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minimind_mcore.rl.config import Config, Section, lacking
from minimind_mcore.rl.objective import objective
from minimind_mcore.rl.rules import workers
from minimind_mcore.rl.schema import MEGATRON_SECTIONS, defaults
from minimind_mcore.rl.values import Problem

# What a key asks for when it is not at its default.
ABSENT = {
    "multi_turn_enable": "there are no conversations of several turns",
    "is_multimodal": "there are no images",
    "partial_rollout_max_split": "responses are written in one go",
    "reward_resource": "reward_config is not run; minimind.reward_model is the reward model",
    "rule_reward": "the verifiers of verifier_function always score; leave them out (minimind.reward_model scores "
    "without)",
}
STAGES = {"ray_dapo": "dapo", "ray_ppo": "ppo"}  # ray_grpo is the others'


def unheeded(config: Config) -> Iterator[Problem]:
    """Keys that ask for what there is not, so that a run would silently be another one."""
    rl, name, chosen = config.rl, config.minimind.algorithm, objective(config)
    given, known = config.tree["rl_config"], defaults("RLConfig")
    where = "the embedded trainer does not heed it"
    for key, why in ABSENT.items():
        value = getattr(rl, key)
        if value is not None and value != known[key]:
            yield f"rl_config.{key}", f"{given[key]}: {where}: {why}"
    if config.generate.sampling_config.seed is not None:
        yield (
            "generate_config.sampling_config.seed",
            f"{where}: the responses are drawn by megatron_training.seed",
        )
    if (rl.integrated_mode_config or {}).get("ref_model_load_path") not in (None, config.actor.load):
        yield (
            "rl_config.integrated_mode_config",
            f"{where}: the reference is what the run began with; for another one use_integrated_worker: false",
        )
    wanted, kept = config.actor.global_batch_size, rl.filter_groups_train_batch_size
    if chosen.dynamic_sampling and kept not in (known["filter_groups_train_batch_size"], wanted):
        yield (
            "rl_config.filter_groups_train_batch_size",
            f"{kept}: {where}: it fills a step of global_batch_size {wanted} groups; give both the same number",
        )
    if (other := STAGES.get(config.actor.stage or "", name)) != name:
        yield (
            "megatron_training.stage",
            f"{config.actor.stage}: {where}, but minimind.algorithm, which is {name}; set that to {other}",
        )
    if not rl.blocking and config.minimind.rollout_correction == "tis":
        yield (
            "minimind.rollout_correction",
            "tis: with rl_config.blocking: false every weight would be exactly 1. The ratio is then taken to the "
            "engine's own log-probabilities, so none are left to compare these with. Set rl_config.blocking: true, or "
            "minimind.rollout_correction: none",
        )
    if config.minimind.precision == "bf16" and not all(section.bf16 for section in _trained(config)):
        yield (
            "megatron_training.bf16",
            "false, and minimind.precision is bf16: the training would run in fp32 and the engine in bf16. Set "
            "minimind.precision: fp32, and leave bf16 out",
        )
    if rl.adv_estimator == "gae" and chosen.advantage != "gae":
        yield "rl_config.adv_estimator", f"gae: {where}, but minimind.algorithm: gae is ppo's, and this is {name}"


def _trained(config: Config) -> Iterator[Section]:
    """The sections of the models that Megatron runs."""
    yield from (section for section in (config.actor, config.ref, config.critic) if section is not None)


def idle(config: Config) -> list[str]:
    """Keys that stand there for MindSpeed-RL or another algorithm, and change nothing here."""
    rl, name, chosen = config.rl, config.minimind.algorithm, objective(config)
    given: dict[str, Any] = config.tree["rl_config"]
    found = []
    if given.get("init_kl_coef") and chosen.kl == "none":
        found.append(
            f"rl_config.init_kl_coef {rl.init_kl_coef} ({name} has no reference; use_kl_in_reward gives it one)"
        )
    if "adv_estimator" in given and rl.adv_estimator == "group_norm" and chosen.advantage != "group":
        found.append(f"rl_config.adv_estimator {rl.adv_estimator} ({name} has its own)")
    if not rl.blocking and chosen.dynamic_sampling:
        found.append(
            "rl_config.blocking false (dynamic sampling does not know its prompts ahead: steps are synchronous)"
        )
    if rl.use_dynamic_bsz:
        found.append("rl_config.use_dynamic_bsz (rows of a similar length are put together anyway)")
    if rl.kl_ctrl_type == "adaptive" and chosen.kl != "reward":
        why = "is in the loss" if chosen.kl == "loss" else "is not used"
        found.append(
            f"rl_config.kl_ctrl_type adaptive ({name}'s KL term {why}, where its coefficient stays fixed, as in "
            "MindSpeed-RL; use_kl_in_reward: true adapts it)"
        )
    return [*found, *_idle_models(config), *_idle_sections(config)]


def _idle_models(config: Config) -> Iterator[str]:
    """Sections and resources of models that do not run, or run elsewhere."""
    rl, name, chosen, tree = config.rl, config.minimind.algorithm, objective(config), config.tree
    given = {worker.name: worker.devices for worker in workers(config)}
    if chosen.advantage != "gae":
        found = ["critic_config"] if tree.get("critic_config") else []
        found += ["rl_config.critic_resource"] if rl.critic_resource is not None else []
        yield from (f"{key} ({name} has no critic)" for key in found)
    elif given.get("critic_config", given["actor_config"]) != given["actor_config"]:
        yield (
            f"rl_config.critic_resource {given['critic_config']} (the critic's ranks share the "
            f"{given['actor_config']} devices of actor_resource)"
        )
    if chosen.kl == "none" and not rl.use_integrated_worker:
        yield f"ref_config and rl_config.reference_resource ({name} has no reference)"


def _idle_sections(config: Config) -> Iterator[str]:
    """Sections that are not read, and keys of Megatron's sections at a default that the native engine lacks."""
    for name in ("profiler_config", "msprobe_config"):
        if config.tree.get(name):
            yield f"{name} (the embedded trainer has no profiler; BACKEND=mindspeed-rl has)"
    for section in MEGATRON_SECTIONS:
        for key in sorted(lacking(config.tree.get(section) or {})):
            yield f"{section}.{key} (the native engine does not have it)"

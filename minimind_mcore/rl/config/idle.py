"""Settings without effect on a run of the embedded trainer, which a run lists when it starts.

    >>> idle(config)
    ["rl_config.lam (only ppo, which has a critic, uses it)"]

`UNUSED` is a table of keys with the condition under which a run uses each. The functions below it yield keys whose
reason depends on the value, and whole sections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from minimind_mcore.rl.algorithms.table import Algorithm
from minimind_mcore.rl.config.check import workers
from minimind_mcore.rl.config.load import lacking
from minimind_mcore.rl.config.objective import CLIP, objective, overlong_lengths, sampling_batches
from minimind_mcore.rl.config.schema import MEGATRON_SECTIONS, Config, MiniMindConfig, Problem, defaults

Condition = Callable[[Config, Algorithm], bool]


def _never(config: Config, chosen: Algorithm) -> bool:
    return False


# (section, keys, condition under which a run uses them, reason otherwise). Only values that differ from the default of
# MindSpeed-RL, or of the section minimind, are listed.
UNUSED: tuple[tuple[str, tuple[str, ...], Condition, str], ...] = (
    ("rl_config", ("use_dp_batch_balance", "use_remove_padding"), _never, "responses of similar length always share a "
     "micro-batch; use_dynamic_bsz gives micro-batches a number of tokens"),
    ("rl_config", ("require_max_age_all_finished",), _never, "a step takes only groups whose responses are complete"),
    ("rl_config", ("dynamic_max_batch_size",), _never, "ref_, actor_ and update_dynamic_max_batch_size are read"),
    ("rl_config", tuple(f"{name}_dispatch_size" for name in ("actor_rollout", "actor_logprob", "ref", "reward",
     "dynamic_sampling", "adv", "actor_update", "critic_update", "critic_value", "kl")), _never, "each rank gets its "
     "share of the responses at once"),
    ("rl_config", ("max_tool_calls",), _never, "minimind.rollout_function decides when a response calls tools"),
    ("rl_config", ("share_backbone",), _never, "the reference model is a separate copy of LoRA's base"),
    ("generate_config", ("infer_expert_parallel_size", "enable_expert_parallel"), _never, "each engine holds all "
     "experts"),
    ("rl_config", tuple(f"{phase}_{name}" for phase in ("ref", "actor", "update") for name in
     ("max_packing_token_size", "dynamic_max_batch_size")), lambda config, _: bool(config.rl.use_dynamic_bsz), "only "
     "with use_dynamic_bsz: true"),
    ("rl_config", ("lam", "cliprange_value"), lambda _, chosen: chosen.advantage == "gae", "only ppo, which has a "
     "critic, uses it"),
    ("rl_config", ("gamma", "advantage_whiten"), lambda _, chosen: chosen.advantage in ("gae", "returns"), "only ppo "
     "and reinforce_plus_plus use it"),
    ("rl_config", ("kl_target", "kl_horizon"), lambda config, _: config.rl.kl_ctrl_type == "adaptive", "only with "
     "kl_ctrl_type: adaptive"),
    ("rl_config", ("filter_groups_metric", "filter_groups_train_batch_size"), lambda _, chosen:
     chosen.dynamic_sampling, "only with dynamic sampling (dapo, filter_groups_enable)"),
    ("rl_config", ("filter_groups_max_batches",), lambda config, chosen: chosen.dynamic_sampling or
     bool(config.minimind.rollout_filter), "only with dynamic sampling (dapo, filter_groups_enable) or "
     "minimind.rollout_filter"),
    ("rl_config", ("overlong_buffer", "overlong_buffer_penalty_factor", "rollout_max_tokens"), lambda _, chosen:
     chosen.overlong, "only with the overlong penalty (dapo, overlong_buffer_enable)"),
    ("minimind", ("spo_half_life", "spo_rho"), lambda _, chosen: chosen.advantage == "baseline", "only spo uses it"),
    ("minimind", ("rollout_correction_cap",), lambda config, _: config.minimind.rollout_correction == "tis", "only "
     "with rollout_correction: tis"),
    ("minimind", ("sglang_base_url", "sglang_shared_path", "sglang_timeout_s"), lambda config, _:
     config.minimind.rollout_engine == "sglang", "only with rollout_engine: sglang"),
    ("minimind", ("reward_model_weight", "reward_model_range", "reward_model_trust_remote_code"), lambda config, _:
     bool(config.minimind.reward_model), "only with minimind.reward_model"),
    ("minimind", ("eval_interval", "eval_prompts", "eval_samples"), lambda config, _: bool(config.minimind.eval_data),
     "only with minimind.eval_data, or a dataset DATA_PATH_unseen"),
)  # fmt: skip


def idle(config: Config) -> list[str]:
    """Return the keys that have no effect on this run, such as keys for MindSpeed-RL or for another algorithm."""
    found = [*_unused(config), *_idle_keys(config), *_idle_models(config), *_idle_sections(config)]
    return [f"{key} ({why})" for key, why in found]


def _unused(config: Config) -> Iterator[Problem]:
    """Yield the keys of `UNUSED` that this run does not use, if the YAML sets another value than the default."""
    chosen = objective(config)
    known = {
        "rl_config": defaults("RLConfig"),
        "generate_config": defaults("GenerateConfig"),
        "minimind": {one.name: one.default for one in dataclasses.fields(MiniMindConfig)},
    }
    values = {"rl_config": config.rl, "generate_config": config.generate, "minimind": config.minimind}
    for section, keys, used, why in UNUSED:
        given: dict[str, Any] = config.tree.get(section) or {}
        for key in keys:
            if key in given and getattr(values[section], key) != known[section][key] and not used(config, chosen):
                yield f"{section}.{key}", why


def _idle_keys(config: Config) -> Iterator[Problem]:
    """Yield keys without effect that belong to the algorithm and to the schedule of a step."""
    rl, name, chosen = config.rl, config.minimind.algorithm, objective(config)
    given: dict[str, Any] = config.tree["rl_config"]
    if given.get("init_kl_coef") and chosen.kl == "none":
        why = f"{name} has no KL term; use_kl_in_reward: true adds one"
        yield f"rl_config.init_kl_coef {rl.init_kl_coef}", why
    if "adv_estimator" in given and rl.adv_estimator == "group_norm" and chosen.advantage != "group":
        yield f"rl_config.adv_estimator {rl.adv_estimator}", f"{name} has its own advantage"
    if not rl.blocking and chosen.dynamic_sampling:
        why = "dynamic sampling does not know in advance how many prompts it needs, so steps are synchronous"
        yield "rl_config.blocking false", why
    if chosen.dynamic_sampling and sampling_batches(config) == 1:
        why = "1 batch has global_batch_size groups, so dynamic sampling replaces no group; set 2 or more"
        yield "rl_config.filter_groups_max_batches 1", why
    if chosen.overlong and overlong_lengths(config)[1] == 0:
        yield "rl_config.overlong_buffer 0", "no token has a penalty; set a number below max_tokens"
    if chosen.loss in ("cispo", "reinforce"):
        own = "minimind.cispo_clip is its limit" if chosen.loss == "cispo" else "its loss is not clipped"
        yield from ((f"rl_config.{key}", f"{name}: {own}") for key in CLIP if key in given)
    elif "cispo_clip" in (config.tree.get("minimind") or {}):
        yield "minimind.cispo_clip", f"the policy loss of {name} is {chosen.loss}"
    if "max_packing_token_size" in given:
        read = "ref_, actor_ and update_max_packing_token_size are read, as in MindSpeed-RL"
        yield "rl_config.max_packing_token_size", read
    if rl.kl_ctrl_type == "adaptive" and chosen.kl != "reward":
        why = f"{name}'s KL term {'is in the loss' if chosen.kl == 'loss' else 'is not used'}"
        fixed = "where its coefficient stays fixed, as in MindSpeed-RL; use_kl_in_reward: true adapts it"
        yield "rl_config.kl_ctrl_type adaptive", f"{why}, {fixed}"


def _idle_models(config: Config) -> Iterator[Problem]:
    """Yield sections and resources of models that this run does not use."""
    rl, name, chosen = config.rl, config.minimind.algorithm, objective(config)
    given = {worker.name: worker.devices for worker in workers(config)}
    actors, critics = given["actor_config"], given.get("critic_config", given["actor_config"])
    if chosen.advantage != "gae":
        stated = {"critic_config": config.tree.get("critic_config"), "rl_config.critic_resource": rl.critic_resource}
        yield from ((key, f"{name} has no critic") for key, value in stated.items() if value)
    elif critics != actors:
        why = f"the critic's ranks share the {actors} devices of actor_resource"
        yield f"rl_config.critic_resource {critics}", why
    if chosen.kl == "none" and not rl.use_integrated_worker:
        yield "ref_config and rl_config.reference_resource", f"{name} has no reference model"


def _idle_sections(config: Config) -> Iterator[Problem]:
    """Yield sections that are not read, and Megatron keys for features that the native engine lacks."""
    for name in ("profiler_config", "msprobe_config"):
        if config.tree.get(name):
            yield name, "the embedded trainer has no profiler; BACKEND=mindspeed-rl has"
    for section in MEGATRON_SECTIONS:
        for key in sorted(lacking(config.tree.get(section) or {})):
            yield f"{section}.{key}", "the native engine does not have it"

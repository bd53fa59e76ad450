"""The rules for a resolved configuration.

    for key, message in problems(config, "embedded"):
        print(f"{key}: {message}")

`schema.keys` has checked names and types before. This module checks the values of single keys first, then the rules
that combine values: sizes that must divide each other, modes that exclude each other, and the number of responses that
MindSpeed-RL dispatches at once. The rules are those of MindSpeed-RL's mindspeed_rl/config_cls/validate_config.py and of
its programs. The embedded trainer applies them too, except for features that it does not need, and adds a few.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.inputs.ranges import problem
from minimind_mcore.rl.algorithms.advantages import ADVANTAGES
from minimind_mcore.rl.algorithms.batches import uneven
from minimind_mcore.rl.algorithms.losses import POLICY_LOSSES
from minimind_mcore.rl.config.objective import (
    objective,
    overlong_lengths,
    sampling_batches,
    trains_on_older,
    updates_per_step,
)
from minimind_mcore.rl.config.schema import Config, Problem, Section, defaults, of_error
from minimind_mcore.rl.registry import imported

# Sources in MindSpeed-RL: utils/compute.py, trainer/base.py, trainer/utils/compute_utils.py, and its three programs.
STAGES = {"grpo": "ray_grpo", "dapo": "ray_dapo", "ppo": "ray_ppo"}
NAMES: dict[str, tuple[str, ...]] = {
    "rl_config.kl_penalty": ("kl", "abs", "mse", "low_var_kl"),
    "rl_config.kl_ctrl_type": ("fixed", "adaptive"),
    "rl_config.adv_estimator": ("group_norm", "gae"),
    "megatron_training.stage": tuple(STAGES.values()),
}
MORE = {"rl_config.kl_penalty": ("k1", "k2", "k3")}  # further values of the embedded trainer

COMPARING = ("group", "rloo", "batch")  # advantages that are 0 for a single response to a prompt

OPTIONAL = ("megatron_training.stage",)
# Keys that a run cannot do without. MindSpeed-RL's default of some of these keys is null.
REQUIRED = (
    "megatron_training.global_batch_size",
    "megatron_training.seq_length",
    "megatron_training.train_iters",
    "actor_config.micro_batch_size",
    "rl_config.actor_resource.num_npus",
)


def problems(config: Config, target: str, nodes: int = 1) -> list[Problem]:
    """Return all problems of a configuration, as pairs of a key and a message.

    Args:
        config: the resolved configuration.
        target: one of `lint.TARGETS`.
        nodes: number of hosts of the Ray cluster.
    """
    if found := [*values(config, target), *numbers(config)]:
        return found
    found = [wrong for rule in RULES for wrong in rule(config, target)]
    found += dispatch(config, target, nodes)
    if target == "embedded":
        return [*found, *ignored_keys(config), *contradictions(config)]
    return [*found, *one_process(config), *router(config)]


def values(config: Config, target: str) -> Iterator[Problem]:
    """Yield keys whose value is not one of the allowed names, and required keys without a value."""
    for key, names in NAMES.items():
        value = _value(config, key)
        known = (*names, *(MORE.get(key, ()) if target == "embedded" else ()))
        if value not in known and not (value is None and key in OPTIONAL):
            yield key, f"found {value!r}, expected one of {', '.join(known)}{did_you_mean(str(value), known)}"
    yield from ((key, "found None, expected a whole number") for key in REQUIRED if _value(config, key) is None)


def _value(config: Config, key: str) -> Any:
    section, *names = key.split(".")
    found: Any = config.rl if section == "rl_config" else config.actor
    for name in names:
        found = getattr(found, name, None)
    return found


def numbers(config: Config) -> Iterator[Problem]:
    """Yield numbers outside the ranges of `ranges.py`. `schema.keys` has checked the section `minimind`."""
    found: dict[str, str] = {}  # a key that several models share is reported once
    sections = {"actor_config": config.actor}
    sections |= {"ref_config": config.ref} if config.ref is not config.actor else {}
    sections |= {"reward_config": config.reward} if config.reward else {}
    sections |= {"critic_config": config.critic} if config.critic else {}
    for section, megatron in sections.items():
        for name, value in vars(megatron).items():
            found |= _wrong(_given_in(config, section, name), name, value)
    prompts = {"mini_batch_size": config.tree["rl_config"].get("mini_batch_size", 1)}
    for name, value in (vars(config.rl) | prompts).items():
        found |= _wrong(f"rl_config.{name}", name, value)
    for name, value in vars(config.generate).items():
        found |= _wrong(f"generate_config.{name}", name, value)
    yield from found.items()


def _wrong(key: str, name: str, value: object, section: str = "") -> dict[str, str]:
    """Return the problems of a value, or of the numbers in a list or a mapping, by key."""
    if isinstance(value, Section):
        parts = [_wrong(f"{key}.{inner}", inner, item, name) for inner, item in vars(value).items()]
        return {where: text for part in parts for where, text in part.items()}
    for number in value if isinstance(value, list) else [value]:
        whole = isinstance(number, float) and number.is_integer()  # `keys` lets 1e3 stand for 1000
        if isinstance(number, int | float) and (text := problem(name, int(number) if whole else number, section)):
            return {key: text}
    return {}


def _given_in(config: Config, section: str, name: str) -> str:
    """Return the full key of a model's value: of its own section, of megatron_training, or of its model file."""
    for where in (section, "megatron_training"):
        if any(str(key).replace("-", "_") == name for key in config.tree.get(where) or {}):
            return f"{where}.{name}"
    return f"model.{config.model}.{name}"


# Sizes and modes


def multiple(key: str, count: int, what: str, of: int, unit: str = "") -> Iterator[Problem]:
    """Yield a problem of `key` if `count` is not a multiple of `of`. `unit` is printed after the number."""
    if count % of:
        yield key, f"{count} {what} are not a multiple of {of}{unit}"


def first(*rules: Iterator[Problem]) -> Iterator[Problem]:
    """Yield only the first problem, of rules that each assume the one before."""
    return itertools.islice(itertools.chain(*rules), 1)


@dataclass(frozen=True)
class Worker:
    """A model that Megatron runs: its section, the section's keys, and the devices of its resource in `rl_config`."""

    name: str
    resource: str
    keys: Section
    devices: int

    @property
    def model_parallel(self) -> int:
        """Return the number of devices of one replica."""
        keys = self.keys
        return int(keys.tensor_model_parallel_size * keys.pipeline_model_parallel_size * keys.context_parallel_size)

    @property
    def data_parallel(self) -> int:
        """Return the number of replicas, at least 1 so that later rules do not divide by 0."""
        return max(1, self.devices // self.model_parallel)


def workers(config: Config) -> list[Worker]:
    """Return the actor and, if they have devices of their own, the reference, reward model and critic."""
    rl, apart = config.rl, not config.rl.use_integrated_worker
    found = [("actor", config.actor), *([("reference", config.ref), ("reward", config.reward)] if apart else [])]
    pairs = [(role, keys, getattr(rl, f"{role}_resource")) for role, keys in [*found, ("critic", config.critic)]]
    return [
        Worker("ref_config" if role == "reference" else f"{role}_config", f"{role}_resource", keys, given.num_npus or 0)
        for role, keys, given in pairs
        if keys is not None and given is not None
    ]


def sections(config: Config, target: str) -> Iterator[Problem]:
    """Check which sections and resources belong together."""
    tree, rl = config.tree, config.rl
    if rl.use_integrated_worker:
        for name in ("ref_config", "reward_config"):
            if name in tree:
                yield name, "use_integrated_worker is true: the actor's worker is the reference too; set it to false"
        for name in ("reference_resource", "reward_resource"):
            if getattr(rl, name) is not None:
                yield f"rl_config.{name}", "only with use_integrated_worker: false"
    else:
        for name in ("ref_config",) if target == "embedded" else ("ref_config", "reward_config"):
            if name not in tree:
                yield name, "missing: mandatory with use_integrated_worker: false"
        if rl.reference_resource is None:
            yield "rl_config.reference_resource", "missing: mandatory with use_integrated_worker: false"
        if rl.integrated_mode_config is not None:
            yield "rl_config.integrated_mode_config", "only with use_integrated_worker: true"
    if config.actor.stage == "ray_ppo" and (config.critic is None or rl.critic_resource is None):
        yield "critic_config", "stage ray_ppo needs critic_config and rl_config.critic_resource"


def devices(config: Config, target: str) -> Iterator[Problem]:
    """Check that devices divide into replicas, prompts into replicas, and responses into micro-batches."""
    samples, mini = config.rl.n_samples_per_prompt, config.rl.mini_batch_size
    for worker in workers(config):
        name, keys, ranks = worker.name, worker.keys, worker.data_parallel
        prompts, micro = keys.global_batch_size, keys.micro_batch_size
        if not worker.devices:
            yield f"rl_config.{worker.resource}.num_npus", "found no devices, expected 1 or more"
        yield from multiple(name, worker.devices, "devices", worker.model_parallel, " = TP x PP x CP")
        if not prompts or not micro:
            yield name, f"global_batch_size {prompts} and micro_batch_size {micro}: both are needed"
            continue
        if target != "embedded":
            yield from first(
                multiple("megatron_training.global_batch_size", prompts, "prompts", ranks, f" replicas of {name}"),
                multiple(f"{name}.micro_batch_size", prompts // ranks * samples, "responses of a replica", micro),
            )
        elif name != "ref_config":
            unit = f" = {micro} x {ranks} data-parallel ranks"
            yield from multiple(f"{name}.micro_batch_size", mini, "responses of a mini-batch", micro * ranks, unit)
        heads, tp, pp = keys.num_query_groups or 0, keys.tensor_model_parallel_size, keys.pipeline_model_parallel_size
        yield from multiple(f"{name}.pipeline_model_parallel_size", keys.num_layers or 0, "layers", pp)
        yield from multiple(f"{name}.tensor_model_parallel_size", heads, "key-value heads", tp)


def batches(config: Config, target: str) -> Iterator[Problem]:
    """Check mini-batches, and the groups that dynamic sampling keeps. `dispatch` checks the dispatch sizes."""
    rl, prompts, samples = config.rl, config.actor.global_batch_size, config.rl.n_samples_per_prompt
    if message := uneven(prompts, rl.mini_batch_size // samples):
        yield "rl_config.mini_batch_size", message
    if target == "embedded":  # without a metric it compares the total reward
        names = config.reward_names
        metric = config.tree["rl_config"].get("filter_groups_metric")
        if metric is not None and objective(config).dynamic_sampling and metric not in names:
            yield "rl_config.filter_groups_metric", f"{metric} is none of the run's verifiers: {', '.join(names)}"
    elif rl.filter_groups_enable:
        if rl.filter_groups_metric not in rl.verifier_function:
            yield "rl_config.filter_groups_metric", f"{rl.filter_groups_metric} is not in verifier_function"
        key, kept = "rl_config.filter_groups_train_batch_size", rl.filter_groups_train_batch_size
        micro, replicas = config.actor.micro_batch_size, workers(config)[0].data_parallel
        yield from first(
            multiple(key, kept, "groups", replicas, " replicas"),
            multiple(key, kept // replicas * samples, "responses of a replica", micro, " = micro_batch_size"),
        )


def lengths(config: Config, target: str) -> Iterator[Problem]:
    """Check the lengths of prompts and responses against the sequence length."""
    rl, generate, actor = config.rl, config.generate, config.actor
    answer = generate.sampling_config.max_tokens
    if generate.max_model_len < actor.seq_length:
        yield "generate_config.max_model_len", f"{generate.max_model_len} is less than seq_length {actor.seq_length}"
    if target == "embedded" and "max_prompt_length" not in config.tree["rl_config"]:
        if answer >= actor.seq_length:
            key = "generate_config.sampling_config.max_tokens"
            yield key, f"{answer} leave no room in seq_length {actor.seq_length}"
    elif rl.max_prompt_length + answer > actor.seq_length:
        wanted = f"max_prompt_length {rl.max_prompt_length} and max_tokens {answer}"
        yield "megatron_training.seq_length", f"{wanted} do not fit in {actor.seq_length}"
    longest, buffer, penalized = rl.rollout_max_tokens, rl.overlong_buffer, rl.overlong_buffer_enable
    if target == "embedded":
        (longest, buffer), penalized = overlong_lengths(config), objective(config).overlong
    if penalized and buffer >= answer:
        yield "rl_config.overlong_buffer", f"{buffer} is not less than max_tokens {answer}"
    if penalized and longest != answer:
        yield "rl_config.rollout_max_tokens", f"{longest} differs from max_tokens {answer}"


def rewards(config: Config, target: str) -> Iterator[Problem]:
    """Check the verifiers and the data columns that they need."""
    rl = config.rl
    functions, weights = len(rl.verifier_function), len(rl.verifier_weight)
    if functions != weights:
        yield "rl_config.verifier_weight", f"{weights} weights for {functions} functions of verifier_function"
    labelled = "labels" in config.actor.dataset_additional_keys  # the embedded trainer looks at the data
    if target != "embedded" and rl.rule_reward and rl.verifier_function and not labelled:
        yield "megatron_training.dataset_additional_keys", "verifiers need the right answers: add labels"
    if rl.clip_higher_enable and rl.clip_ratio_low > rl.clip_ratio_high:
        yield "rl_config.clip_ratio_low", f"{rl.clip_ratio_low} is above clip_ratio_high {rl.clip_ratio_high}"


def modes(config: Config, target: str) -> Iterator[Problem]:
    """Check switches that exclude or require each other."""
    rl, generate, actor = config.rl, config.generate, config.actor
    if generate.infer_pipeline_parallel_size > 1:
        yield "generate_config.infer_pipeline_parallel_size", "only 1 is supported"
    infer, heads, count = generate.infer_tensor_parallel_size, actor.num_query_groups or 0, rl.actor_resource.num_npus
    tensor_parallel = "generate_config.infer_tensor_parallel_size"
    if target == "embedded":
        if infer != 1:
            yield (
                tensor_parallel,
                f"found {infer}, expected 1: a MiniMind fits on one device, and more engines are faster",
            )
        own = config.minimind.rollout_resource
        if own and generate.data_parallel_size not in (None, own.num_npus):
            key = "generate_config.data_parallel_size"
            yield key, f"found {generate.data_parallel_size}, minimind.rollout_resource has {own.num_npus} devices"
        elif (generate.data_parallel_size or 1) > (own.num_npus if own else count):
            key = "generate_config.data_parallel_size"
            yield key, f"found {generate.data_parallel_size}, the actor has {count} devices"
    else:
        engines, batch = max(1, count // infer), "megatron_training.global_batch_size"
        yield from first(
            multiple(tensor_parallel, count, "devices", infer, " (MindSpeed-RL's default is 8)"),
            multiple(batch, actor.global_batch_size, "prompts", engines, " rollout engines"),
            multiple(tensor_parallel, heads, "key-value heads", infer),
        )
    algorithms = ("ulysses_cp_algo", "megatron_cp_algo")
    if actor.context_parallel_size > 1 and actor.context_parallel_algo not in algorithms:
        yield "megatron_training.context_parallel_algo", f"expected {' or '.join(algorithms)}"
    if rl.partial_rollout_max_split > 1 and rl.guarantee_order:
        yield "rl_config.guarantee_order", "must be false with partial_rollout_max_split above 1"
    if rl.multi_turn_enable and not rl.async_engine:
        yield "rl_config.async_engine", "multi_turn_enable needs it"
    if rl.share_backbone and (not actor.lora_target_modules or actor.stage == "ray_dapo"):
        yield "rl_config.share_backbone", "only for LoRA, and not for DAPO"


def one_process(config: Config) -> Iterator[Problem]:
    """With one process MindSpeed-RL has no rollout groups (vllm_parallel_state.py, initialize_parallel_state)."""
    rl = config.rl
    for key in ("zmq_communication", "guarantee_order"):
        if rl.actor_resource.num_npus == 1 and getattr(rl, key):
            why = "with actor_resource.num_npus 1 MindSpeed-RL would stop with 'vllm dp groups is None'"
            yield f"rl_config.{key}", f"true: {why}. Set rl_config.{key}: false"


def router(config: Config) -> Iterator[Problem]:
    """Refuse a router weight that MindSpeed-RL does not implement."""
    if config.actor.num_experts and not config.actor.norm_topk_prob:
        yield (
            "megatron_training.norm_topk_prob",
            "false is the router weight softmax. It needs moe_router_pre_softmax, for which MindSpeed-RL has no key: "
            "MindSpeed-LLM's router would normalize the weights. Use the embedded trainer (BACKEND=embedded)",
        )


def padding(config: Config, target: str) -> Iterator[Problem]:
    """Check the keys that use_remove_padding needs. The two versions of MindSpeed-RL differ here."""
    actor, older = config.actor, target == "mindspeed-rl-2.2.0"
    ring = actor.context_parallel_size > 1 and actor.context_parallel_algo == "megatron_cp_algo"
    if config.rl.use_remove_padding:
        needed = ["reset_position_ids" if older else "reset_attention_mask"]
        needed += ["reset_attention_mask"] if older and ring else []
        if actor.pipeline_model_parallel_size > 1:
            needed.append("variable_seq_lengths" if older else "no_pad_to_seq_lengths")
        for key in [key for key in needed if not getattr(actor, key)]:
            yield "rl_config.use_remove_padding", f"needs megatron_training.{key}: true"
    if older and actor.reset_attention_mask and not (ring and config.rl.use_remove_padding):
        why = "true is only for use_remove_padding with context_parallel_algo megatron_cp_algo above 1"
        yield "megatron_training.reset_attention_mask", why


RULES = (sections, devices, batches, lengths, rewards, modes, padding)


# Dispatch sizes of MindSpeed-RL


@dataclass(frozen=True)
class Queue:
    """The responses of a step that one kind of worker processes.

    Attributes:
        name: the key is `rl_config.{name}_dispatch_size`.
        responses: number of responses in a step.
        takers: number of replicas, engines or hosts that share the responses.
        what: word for the takers in messages.
        even: the dispatch size must divide each taker's share, not only the total.
        most: maximum of the dispatch size. None: no maximum.
    """

    name: str
    responses: int
    takers: int = 1
    what: str = "replicas"
    even: bool = False
    most: int | None = None


def queues(config: Config, nodes: int) -> Iterator[Queue]:
    """Yield the queues of a run.

    Args:
        config: the resolved configuration.
        nodes: number of hosts of the Ray cluster.
    """
    rl, samples = config.rl, config.rl.n_samples_per_prompt
    found = {worker.name: worker for worker in workers(config)}
    actor = found["actor_config"]
    whole = (actor.keys.global_batch_size or 0) * samples
    step = rl.filter_groups_train_batch_size * samples if rl.filter_groups_enable else whole
    share = whole // actor.data_parallel
    engines = max(1, actor.devices // config.generate.infer_tensor_parallel_size)
    yield Queue("actor_rollout", whole, engines, "engines", even=True)
    yield Queue("actor_logprob", step, actor.data_parallel, most=share)
    yield Queue("actor_update", step, actor.data_parallel, most=share)
    yield Queue("adv", step)
    reference = found.get("ref_config", actor)
    asked = (reference.keys.global_batch_size or 0) * samples
    yield Queue("ref", asked, reference.data_parallel, most=asked // reference.data_parallel)
    scored = _scored(config) * samples
    if "reward_config" in found:
        model = found["reward_config"]
        yield Queue("reward", scored, model.data_parallel, most=scored // model.data_parallel)
    else:
        yield Queue("reward", scored, nodes, "hosts")
    if rl.filter_groups_enable:
        yield Queue("dynamic_sampling", scored, nodes, "hosts", most=scored // nodes)
    if critic := found.get("critic_config"):
        valued = (critic.keys.global_batch_size or 0) * samples
        for name in ("critic_update", "critic_value"):
            yield Queue(name, valued, critic.data_parallel, most=valued // critic.data_parallel)
        yield Queue("kl", valued)


def _scored(config: Config) -> int:
    """Return the number of prompts of a step, as the reward workers count them."""
    keys = config.actor if config.rl.use_integrated_worker or config.reward is None else config.reward
    return keys.global_batch_size or 0


def dispatch(config: Config, target: str, nodes: int) -> Iterator[Problem]:
    """Check that dispatch sizes divide the responses and fit into a share, and that prompts divide among the hosts.

    Args:
        config: the resolved configuration.
        target: one of `lint.TARGETS`. Master refuses sizes above a share, which no replica could process.
        nodes: number of hosts of the Ray cluster.
    """
    rl = config.rl
    ruled = rl.filter_groups_enable or rl.reward_resource is None
    if target != "embedded" and ruled and _scored(config) % nodes:
        hosts = f"the {nodes} hosts of the Ray cluster, which all score"
        yield "megatron_training.global_batch_size", f"{_scored(config)} prompts are not a multiple of {hosts}"
    for queue in queues(config, nodes):
        key = f"rl_config.{queue.name}_dispatch_size"
        size, each = getattr(rl, key.removeprefix("rl_config.")), f"responses of each of {queue.takers} {queue.what}"
        if not size:
            continue
        counted, what = (queue.responses // queue.takers, each) if queue.even else (queue.responses, "responses")
        yield from multiple(key, counted, what, size)
        if not counted % size and target == "mindspeed-rl-master" and queue.most is not None and size > queue.most:
            yield key, f"{size} is more than the {queue.most} {each}"
        if queue.name == "dynamic_sampling":
            yield from multiple(key, size, "responses", rl.n_samples_per_prompt, " = n_samples_per_prompt")
    replicas, update = workers(config)[0].data_parallel, rl.actor_update_dispatch_size
    if target != "embedded" and update and update < rl.mini_batch_size / replicas:
        part = f"a replica's part of a mini-batch, {rl.mini_batch_size} responses / {replicas}"
        yield "rl_config.actor_update_dispatch_size", f"{update} is less than {part}"


# Features that the embedded trainer does not have

# By key of rl_config: the message for a value that is not the default.
ABSENT = {
    "multi_turn_enable": "conversations of several turns are not supported",
    "is_multimodal": "images are not supported",
    "reward_resource": "reward_config is not used. Set minimind.reward_model to the reward model's directory",
    "rule_reward": "the verifiers of verifier_function always score. Leave out verifier_function to score with "
    "minimind.reward_model alone",
}


def _rollout_function(trajectories: Any, engines: Any, sampling: Any) -> None:
    """Show the arguments of a function of `minimind.rollout_function`; see `rl.runtime.rollouts.generate`."""


def _rollout_filter(rewards: Any, scores: Any, n: int) -> None:
    """Show the arguments of a function of `minimind.rollout_filter`."""


def signature_problems(path: str, key: str, example: Callable[..., Any]) -> Iterator[Problem]:
    """Check that a user's function can be imported and called with the arguments of `example`."""
    parameters = inspect.signature(example).parameters.values()
    positional = [one.name for one in parameters if one.kind is not one.KEYWORD_ONLY]
    named = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    try:
        inspect.signature(imported(path, key)).bind(*positional, **dict.fromkeys(named))
    except UserError as error:
        yield of_error(error)
    except TypeError as error:
        yield key, f"{path}: {error}. Expected a function ({', '.join(positional)}, *, {', '.join(named)})"


def contradictions(config: Config) -> Iterator[Problem]:
    """Yield settings that contradict the algorithm, or that it would ignore."""
    chosen, name, dual = objective(config), config.minimind.algorithm, config.minimind.dual_clip
    if chosen.advantage in COMPARING and config.rl.n_samples_per_prompt < 2:
        why = f"{name} compares the responses to one prompt, so that every advantage of a single response is 0"
        advice = "Set 2 or more, or minimind.algorithm: reinforce_plus_plus, ppo or spo"
        yield "rl_config.n_samples_per_prompt", f"found {config.rl.n_samples_per_prompt}: {why}. {advice}"
    if chosen.loss == "gspo" and chosen.aggregation == "token-mean":
        why = "gspo's ratio and clip are those of whole responses, so its loss is the mean over responses"
        yield "rl_config.token_level_loss", f"true: {why}. Set false, or leave the key out"
    if chosen.loss == "reinforce" and trains_on_older(config) and config.minimind.rollout_correction == "none":
        why = f"the loss of {name} has no ratio to the older weights that generate responses with blocking: false or"
        why += " partial_rollout_max_split"
        yield "minimind.rollout_correction", f"none: {why}. Set minimind.rollout_correction: tis"
    if chosen.loss == "reinforce" and (updates := updates_per_step(config)) > 1:
        key, prompts = "epochs" if config.rl.epochs > 1 else "mini_batch_size", config.actor.global_batch_size
        why = f"{updates} updates per step: the loss of {name} has no ratio, so it is correct for one update only"
        advice = f"Set rl_config.epochs: 1 and rl_config.mini_batch_size: {prompts} (global_batch_size)"
        yield f"rl_config.{key}", f"{why}. {advice}"
    if config.minimind.router_replay:
        yield from first(_replay(config))
    if config.minimind.rollout_filter and sampling_batches(config) == 1:
        why = "1 batch has global_batch_size groups, so that minimind.rollout_filter could reject none"
        yield "rl_config.filter_groups_max_batches", f"found 1: {why}. Set 2 or more"
    if config.minimind.rollout_function and (split := config.rl.partial_rollout_max_split) > 1:
        why = f"partial_rollout_max_split {split} would call the function in the middle of a turn"
        yield "minimind.rollout_function", f"{why}. Set rl_config.partial_rollout_max_split: 1"
    servers, engines = config.minimind.sglang_base_url, config.rollout_engines
    if config.minimind.rollout_engine == "sglang" and len(servers) != engines:
        keys = "minimind.rollout_resource, else generate_config.data_parallel_size, else rl_config.actor_resource"
        why = f"expected {engines}, one for each rollout engine. Their number is that of {keys}"
        yield "minimind.sglang_base_url", f"found {len(servers)} servers, {why}"
    names = Counter(Path(prefix).name for prefix in config.minimind.eval_data or ())
    for same in [one for one, count in names.items() if count > 1]:
        why = "metrics are named by the last part of the path. Give each set another name"
        yield "minimind.eval_data", f"found {names[same]} sets called {same}: {why}"
    for key in [f"{phase}_max_packing_token_size" for phase in ("actor", "ref", "update")]:
        if config.rl.use_dynamic_bsz and getattr(config.rl, key) < config.actor.seq_length:
            why = f"expected at least seq_length {config.actor.seq_length}, the longest prompt and response"
            yield f"rl_config.{key}", f"found {getattr(config.rl, key)}, {why}"
    if dual is not None and chosen.loss != "clip":
        why = f"it limits the loss of clipped token ratios, and the policy loss of {name} is {chosen.loss}"
        yield "minimind.dual_clip", f"{dual}: {why}. Leave the key out"
    elif dual is not None and dual <= 1 + chosen.clip_high:
        most = f"1 + the upper clip range = {1 + chosen.clip_high:g}"
        yield "minimind.dual_clip", f"found {dual}, expected more than {most}, which clips first"


def _replay(config: Config) -> Iterator[Problem]:
    """Yield what `minimind.router_replay` cannot be combined with."""
    key, actor, used = "minimind.router_replay", config.actor, config.minimind.rollout_engine
    if not actor.num_experts:
        yield key, "true: the model has no experts. Leave the key out"
    if used != "transformers":
        yield key, f"true: {used} gives no routes. Set minimind.rollout_engine: transformers"
    if actor.recompute_granularity and actor.pipeline_model_parallel_size > 1:
        why = "with pipeline stages a layer would be computed again with the routes of another micro-batch"
        yield key, f"true: {why}. Leave recompute_granularity out"


def ignored_keys(config: Config) -> Iterator[Problem]:
    """Yield keys that ask for a feature the embedded trainer lacks: the run would silently differ from the YAML."""
    rl, name, chosen = config.rl, config.minimind.algorithm, objective(config)
    given, known = config.tree["rl_config"], defaults("RLConfig")
    where = "the embedded trainer ignores this key"
    functions = {"policy_loss": POLICY_LOSSES["clip"], "advantage": ADVANTAGES["group"]}
    functions |= {"rollout_function": _rollout_function, "rollout_filter": _rollout_filter}
    for key, example in functions.items():
        if path := getattr(config.minimind, key):
            yield from signature_problems(path, f"minimind.{key}", example)
    for key, why in ABSENT.items():
        value = getattr(rl, key)
        if value is not None and value != known[key]:
            yield f"rl_config.{key}", f"{given[key]}: {where}: {why}"
    if config.generate.sampling_config.seed is not None:
        why = "the sampling of responses uses megatron_training.seed"
        yield "generate_config.sampling_config.seed", f"{where}: {why}"
    if (rl.integrated_mode_config or {}).get("ref_model_load_path") not in (None, config.actor.load):
        why = "the reference is the model at the start of the run. To use another one set use_integrated_worker: false"
        yield "rl_config.integrated_mode_config", f"{where}: {why}"
    wanted, kept = config.actor.global_batch_size, rl.filter_groups_train_batch_size
    if chosen.dynamic_sampling and kept not in (known["filter_groups_train_batch_size"], wanted):
        why = f"it fills a step of global_batch_size {wanted} groups; give both the same number"
        yield "rl_config.filter_groups_train_batch_size", f"{kept}: {where}: {why}"
    for other in ("dapo", "ppo"):  # the stage ray_grpo serves all others
        if config.actor.stage == STAGES[other] and name != other:
            why = f"but minimind.algorithm, which is {name}; set that to {other}"
            yield "megatron_training.stage", f"{config.actor.stage}: {where}, {why}"
    if rl.blocking and config.minimind.staleness != 1:
        why = "with rl_config.blocking: true the engines are never ahead. Set rl_config.blocking: false"
        yield "minimind.staleness", f"{config.minimind.staleness}: {where}: {why}"
    trained = filter(None, (config.actor, config.ref, config.critic))
    if config.minimind.precision == "bf16" and not all(section.bf16 for section in trained):
        yield (
            "megatron_training.bf16",
            "false, but minimind.precision is bf16: the trainer would use fp32 and the engine bf16. Set "
            "minimind.precision: fp32, and leave out bf16",
        )
    if rl.adv_estimator == "gae" and chosen.advantage != "gae":
        yield "rl_config.adv_estimator", f"gae: {where}, but minimind.algorithm: gae is ppo's, and this is {name}"

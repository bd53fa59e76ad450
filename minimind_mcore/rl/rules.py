"""What a configuration must fulfil: sizes that divide each other, modes that exclude each other.

Each rule looks at a resolved configuration and yields (key, what is wrong). They are those of MindSpeed-RL's
mindspeed_rl/config_cls/validate_config.py, and of its programs. The embedded trainer keeps to them too, but for what it
does not need (`target` says who is to run it), and has a few of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minimind_mcore.rl.config import Config, Section
from minimind_mcore.rl.objective import objective
from minimind_mcore.rl.values import Problem


@dataclass(frozen=True)
class Worker:
    """A model that Megatron runs: its keys, and the devices it has."""

    name: str
    keys: Section
    devices: int

    @property
    def model_parallel(self) -> int:
        """Devices of one replica."""
        keys = self.keys
        return int(keys.tensor_model_parallel_size * keys.pipeline_model_parallel_size * keys.context_parallel_size)

    @property
    def data_parallel(self) -> int:
        """Replicas; at least 1, so that the other rules can go on."""
        return max(1, self.devices // self.model_parallel)


def workers(config: Config) -> list[Worker]:
    """Actor, and where they are apart or used reference, reward model and critic."""
    rl = config.rl
    found = [("actor_config", config.actor, rl.actor_resource)]
    if not rl.use_integrated_worker:
        found.append(("ref_config", config.ref, rl.reference_resource))
        found += [("reward_config", config.reward, rl.reward_resource)] if rl.reward_resource and config.reward else []
    found += [("critic_config", config.critic, rl.critic_resource)] if config.critic and rl.critic_resource else []
    return [Worker(name, keys, int(resource.num_npus or 0)) for name, keys, resource in found if resource is not None]


def sections(config: Config, target: str) -> Iterator[Problem]:
    """Which sections and resources go together."""
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
    """Devices divide into replicas, prompts among replicas, responses into micro-batches."""
    samples = config.rl.n_samples_per_prompt
    for worker in workers(config):
        keys, prompts, micro = worker.keys, worker.keys.global_batch_size, worker.keys.micro_batch_size
        if worker.devices % worker.model_parallel:
            yield worker.name, f"{worker.devices} devices are not a multiple of TP x PP x CP = {worker.model_parallel}"
        if not prompts or not micro:
            yield worker.name, f"global_batch_size {prompts} and micro_batch_size {micro}: both are needed"
            continue
        if target == "embedded":
            mini, ranks = config.rl.mini_batch_size, worker.data_parallel
            if worker.name != "ref_config" and mini % (micro * ranks):
                yield (
                    f"{worker.name}.micro_batch_size",
                    f"{mini} responses of a mini-batch are not a multiple of {micro} x {ranks} data-parallel ranks",
                )
        elif prompts % worker.data_parallel:
            yield (
                "megatron_training.global_batch_size",
                f"{prompts} prompts are not a multiple of the {worker.data_parallel} replicas of {worker.name}",
            )
        elif prompts // worker.data_parallel * samples % micro:
            yield (
                f"{worker.name}.micro_batch_size",
                f"{prompts // worker.data_parallel} x {samples} responses of a replica are not a multiple of {micro}",
            )
        layers = keys.num_layers
        if layers and layers % keys.pipeline_model_parallel_size:
            yield f"{worker.name}.pipeline_model_parallel_size", f"{layers} layers are not a multiple of it"
        if keys.num_query_groups and keys.num_query_groups % keys.tensor_model_parallel_size:
            yield (
                f"{worker.name}.tensor_model_parallel_size",
                f"{keys.num_query_groups} key-value heads are not a multiple of {keys.tensor_model_parallel_size}",
            )


def batches(config: Config, target: str) -> Iterator[Problem]:
    """Mini-batches, and the groups that dynamic sampling keeps (`dispatch` has what is handed out at once)."""
    rl, prompts, samples = config.rl, config.actor.global_batch_size or 0, config.rl.n_samples_per_prompt
    if rl.mini_batch_size > prompts * samples or (prompts * samples) % rl.mini_batch_size:
        yield (
            "rl_config.mini_batch_size",
            f"{rl.mini_batch_size // samples} prompts do not divide global_batch_size {prompts} (it counts prompts, "
            "not responses: MindSpeed-RL multiplies it by n_samples_per_prompt)",
        )
    if target == "embedded":  # without a metric it goes by the whole reward
        names = config.reward_names
        metric = config.tree["rl_config"].get("filter_groups_metric")
        if metric is not None and objective(config).dynamic_sampling and metric not in names:
            yield "rl_config.filter_groups_metric", f"{metric} is none of the run's verifiers: {', '.join(names)}"
    elif rl.filter_groups_enable:
        if rl.filter_groups_metric not in rl.verifier_function:
            yield "rl_config.filter_groups_metric", f"{rl.filter_groups_metric} is not in verifier_function"
        kept, replicas, micro = (
            rl.filter_groups_train_batch_size,
            workers(config)[0].data_parallel,
            config.actor.micro_batch_size,
        )
        if kept % replicas:
            yield "rl_config.filter_groups_train_batch_size", f"{kept} is not a multiple of the {replicas} replicas"
        elif micro and kept // replicas * samples % micro:
            yield (
                "rl_config.filter_groups_train_batch_size",
                f"{kept // replicas} x {samples} responses of a replica are not a multiple of micro_batch_size {micro}",
            )


def lengths(config: Config, target: str) -> Iterator[Problem]:
    """Prompt, response and what fits."""
    rl, generate, actor = config.rl, config.generate, config.actor
    answer = generate.sampling_config.max_tokens
    if generate.max_model_len < actor.seq_length:
        yield "generate_config.max_model_len", f"{generate.max_model_len} is less than seq_length {actor.seq_length}"
    if target == "embedded" and "max_prompt_length" not in config.tree["rl_config"]:
        if answer >= actor.seq_length:
            yield (
                "generate_config.sampling_config.max_tokens",
                f"{answer} leave no room in seq_length {actor.seq_length}",
            )
    elif rl.max_prompt_length + answer > actor.seq_length:
        yield (
            "megatron_training.seq_length",
            f"max_prompt_length {rl.max_prompt_length} and max_tokens {answer} do not fit in {actor.seq_length}",
        )
    if rl.overlong_buffer_enable:
        if rl.overlong_buffer >= answer:
            yield "rl_config.overlong_buffer", f"{rl.overlong_buffer} is not less than max_tokens {answer}"
        if rl.rollout_max_tokens != answer:
            yield "rl_config.rollout_max_tokens", f"{rl.rollout_max_tokens} differs from max_tokens {answer}"


def rewards(config: Config, target: str) -> Iterator[Problem]:
    """Verifiers and what they need."""
    rl = config.rl
    if len(rl.verifier_function) != len(rl.verifier_weight):
        yield (
            "rl_config.verifier_weight",
            f"{len(rl.verifier_weight)} weights for {len(rl.verifier_function)} functions of verifier_function",
        )
    labelled = "labels" in config.actor.dataset_additional_keys  # the embedded trainer looks at the data
    if target != "embedded" and rl.rule_reward and rl.verifier_function and not labelled:
        yield "megatron_training.dataset_additional_keys", "verifiers need the right answers: add labels"
    if rl.clip_higher_enable and rl.clip_ratio_low > rl.clip_ratio_high:
        yield "rl_config.clip_ratio_low", f"{rl.clip_ratio_low} is above clip_ratio_high {rl.clip_ratio_high}"


def modes(config: Config, target: str) -> Iterator[Problem]:
    """Switches that exclude or need each other."""
    rl, generate, actor = config.rl, config.generate, config.actor
    if generate.infer_pipeline_parallel_size > 1:
        yield "generate_config.infer_pipeline_parallel_size", "only 1 is supported"
    infer, heads = generate.infer_tensor_parallel_size, actor.num_query_groups or 0
    if target == "embedded":
        if infer != 1:
            yield (
                "generate_config.infer_tensor_parallel_size",
                f"found {infer}, expected 1: a MiniMind fits on a device",
            )
        if (generate.data_parallel_size or 1) > rl.actor_resource.num_npus:
            yield (
                "generate_config.data_parallel_size",
                f"found {generate.data_parallel_size}, the actor has {rl.actor_resource.num_npus} devices",
            )
    elif rl.actor_resource.num_npus and rl.actor_resource.num_npus % infer:
        yield (
            "generate_config.infer_tensor_parallel_size",
            f"{rl.actor_resource.num_npus} devices are not a multiple of {infer} (MindSpeed-RL's default is 8)",
        )
    elif rl.actor_resource.num_npus and (actor.global_batch_size or 0) % (rl.actor_resource.num_npus // infer):
        yield (
            "megatron_training.global_batch_size",
            f"{actor.global_batch_size} is not a multiple of the {rl.actor_resource.num_npus // infer} rollout engines",
        )
    elif heads % infer:
        yield "generate_config.infer_tensor_parallel_size", f"{heads} key-value heads are not a multiple of {infer}"
    algorithms = ("ulysses_cp_algo", "megatron_cp_algo")
    if actor.context_parallel_size > 1 and actor.context_parallel_algo not in algorithms:
        yield "megatron_training.context_parallel_algo", f"expected {' or '.join(algorithms)}"
    if rl.partial_rollout_max_split > 1 and rl.guarantee_order:
        yield "rl_config.guarantee_order", "must be false with partial_rollout_max_split above 1"
    if rl.multi_turn_enable and not rl.async_engine:
        yield "rl_config.async_engine", "multi_turn_enable needs it"
    if rl.share_backbone and (not actor.lora_target_modules or actor.stage == "ray_dapo"):
        yield "rl_config.share_backbone", "only for LoRA, and not for DAPO"


def one_process(config: Config, target: str) -> Iterator[Problem]:
    """One process has no rollout groups in MindSpeed-RL (vllm_parallel_state.py, initialize_parallel_state)."""
    rl = config.rl
    if target == "embedded" or rl.actor_resource.num_npus != 1:
        return
    for key in ("zmq_communication", "guarantee_order"):
        if getattr(rl, key):
            yield (
                f"rl_config.{key}",
                "true with actor_resource.num_npus 1: MindSpeed-RL would stop with 'vllm dp groups is None'. "
                f"Set rl_config.{key}: false",
            )


RULES: tuple[Callable[[Config, str], Iterator[Problem]], ...] = (
    sections,
    devices,
    batches,
    lengths,
    rewards,
    modes,
    one_process,
)

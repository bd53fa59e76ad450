"""What MindSpeed-RL hands out at once: the rules of its `*_dispatch_size` keys, and of the hosts of its Ray cluster.

Each worker takes the responses of a step from a queue, so many at a time; a size that is not given is the whole share
of a replica (or of a host: rules score on each). The rules are those of mindspeed_rl/config_cls/validate_config.py; the
native trainer has no queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minimind_mcore.rl.config import Config
from minimind_mcore.rl.rules import workers
from minimind_mcore.rl.values import Problem

# num_cpus of GRPOTransferDock and TransferQueueManager (trainer/utils/transfer_dock.py, utils/transfer_queue/tq_mgr.py)
TRANSFER_DOCK_CORES = 10


@dataclass(frozen=True)
class Queue:
    """Responses of a step that a kind of worker takes.

    Attributes:
        name: of its key, `rl_config.{name}_dispatch_size`.
        responses: of a step.
        takers: replicas, engines or hosts that share them.
        what: these are, for messages.
        even: sizes divide each taker's share, not only the whole.
        most: responses that a size may have at most; None: no such rule.
    """

    name: str
    responses: int
    takers: int = 1
    what: str = "replicas"
    even: bool = False
    most: int | None = None


def queues(config: Config, nodes: int) -> Iterator[Queue]:
    """The queues of a run.

    Args:
        config: of the run.
        nodes: hosts of the Ray cluster.
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
    """Prompts of a step, as what scores them counts them."""
    keys = config.actor if config.rl.use_integrated_worker or config.reward is None else config.reward
    return keys.global_batch_size or 0


def dispatch(config: Config, target: str, nodes: int) -> Iterator[Problem]:
    """Sizes divide what there is, and are no larger than a share; prompts divide among the hosts.

    Args:
        config: of the run.
        target: of `lint.TARGETS`. Master refuses sizes above a share, which no replica could take.
        nodes: hosts of the Ray cluster.
    """
    rl = config.rl
    ruled = rl.filter_groups_enable or rl.reward_resource is None
    if target != "embedded" and ruled and _scored(config) % nodes:
        yield (
            "megatron_training.global_batch_size",
            f"{_scored(config)} prompts are not a multiple of the {nodes} hosts of the Ray cluster, which all score",
        )
    for queue in queues(config, nodes):
        key = f"{queue.name}_dispatch_size"
        size = getattr(rl, key)
        if not size:
            continue
        counted = queue.responses // queue.takers if queue.even else queue.responses
        if counted % size:
            yield f"rl_config.{key}", f"{_responses(queue, queue.even)} are not a multiple of {size}"
        elif target == "mindspeed-rl-master" and queue.most is not None and size > queue.most:
            yield f"rl_config.{key}", f"{size} is more than the {_responses(queue, True, queue.most)}"
        if queue.name == "dynamic_sampling" and size % rl.n_samples_per_prompt:
            yield f"rl_config.{key}", f"{size} is not a multiple of n_samples_per_prompt {rl.n_samples_per_prompt}"
    replicas, update = workers(config)[0].data_parallel, rl.actor_update_dispatch_size
    if target != "embedded" and update and update < rl.mini_batch_size / replicas:
        yield (
            "rl_config.actor_update_dispatch_size",
            f"{update} is less than a replica's part of a mini-batch, {rl.mini_batch_size} responses / {replicas}",
        )


def _responses(queue: Queue, each: bool, share: int | None = None) -> str:
    count = queue.responses // queue.takers if share is None else share
    return f"{count} responses of each of {queue.takers} {queue.what}" if each else f"{queue.responses} responses"


def cpu_cores(config: Config, nodes: int) -> dict[str, int | float]:
    """Return the CPU cores that Ray must have for a run of MindSpeed-RL, by what reserves them.

    MindSpeed-RL waits without a time limit for placement groups and actors whose cores are not free.

    Args:
        config: the configuration.
        nodes: hosts of the Ray cluster.
    """
    rl = config.rl
    shared = rl.use_integrated_worker  # PPO's critic then has the actor's placement groups
    count = sum(worker.devices for worker in workers(config) if not (shared and worker.name == "critic_config"))
    filters = bool(rl.filter_groups_enable and config.actor.stage == "ray_dapo")
    docks = 1 + (filters and rl.data_strategy not in ("tq", "queue", "transfer_queue"))
    local = rl.num_cpus_for_local_task * nodes
    found = {
        f"the NPUs ({count} x num_cpus_for_placement_group)": count * rl.num_cpus_for_placement_group,
        f"{docks} transfer dock{'s' if docks > 1 else ''}": docks * TRANSFER_DOCK_CORES,
        "the train task": 1,
    }
    if rl.rule_reward:
        found["the rule rewards"] = local
    if filters:
        found["the sample filters"] = local
    return found

"""`--dry-run`: check a configuration without Ray and without reading weights, and print the plan of the run."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

from minimind_mcore.checkpoint.files import iterations_in
from minimind_mcore.errors import UserError
from minimind_mcore.forecast import machines, memory, speed
from minimind_mcore.forecast.memory import GIB, Workload
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import device
from minimind_mcore.rl.config.load import require_weights
from minimind_mcore.rl.config.objective import objective, steps_ahead
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime.data import prompt_dataset
from minimind_mcore.rl.runtime.placement import devices
from minimind_mcore.rl.runtime.rank import command_line
from minimind_mcore.rl.runtime.workers.reward import build
from minimind_mcore.training.checkpoint_weights import open_model
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.data import open_tokenizer
from minimind_mcore.validation import validate

logger = logging.getLogger(__name__)


def print_plan(config: Config, pending: bool) -> None:
    """Print the plan.

    Args:
        config: configuration of the run.
        pending: data, tokenizer and weights do not exist yet.

    Raises:
        UserError: any error that a run would raise before its first step.
    """
    check_before_start(config)
    world, algorithm = devices(config.rl, "actor"), objective(config)
    args = command_line(config, "actor")
    layout = validate(args, world)
    model = ModelConfig.from_args(args)
    rows = config.actor.global_batch_size * config.rl.n_samples_per_prompt
    print(f"model       {config.model}: {model.num_parameters() / 1e6:.1f}M parameters, {config.minimind.precision}")
    print(f"device      {device.current().kind}: {layout}")
    work = Workload.from_flags(vars(args), layout, model)
    for name, text in _forecast(config, work, args.updates_per_iteration).items():
        print(f"{name:<12}{text}")
    print(f"algorithm   {config.minimind.algorithm}: {algorithm}")
    print(f"step        {rows} responses to {config.actor.global_batch_size} prompts, {config.actor.train_iters} steps")
    print(f"rewards     {', '.join([*config.reward_names, *filter(None, [config.minimind.reward_model])])}")
    if pending:
        print("data        yet to be made")
    else:
        training = TrainConfig.from_args(args, layout)
        open_tokenizer(training)
        print(f"data        {len(prompt_dataset(config, config.actor.data_path))} prompts of {config.actor.data_path}")
        for prefix in config.minimind.eval_data or ():
            prompt_dataset(config, prefix)
        print(f"begins      {_begins(config, training)}")
    print(f"cluster     {os.environ.get('RAY_ADDRESS') or 'the one of this host, else its own'}")
    print("everything is valid; nothing was trained")


def check_before_start(config: Config) -> None:
    """Check for missing packages and files before any actor is started.

    Raises:
        UserError: something is missing. The message names the key.
    """
    for name in ("wandb", "swanlab"):
        if getattr(config.rl, f"use_{name}") and importlib.util.find_spec(name) is None:
            raise UserError(
                f"rl_config.use_{name} needs the package {name}, which is not installed: pip install {name}"
            )
    build(config).close()
    replay = config.minimind.replay_rollouts
    if replay and not any(Path(replay).glob("rollouts-*.pt")):
        raise UserError(
            f"minimind.replay_rollouts: {replay} has no rollouts-*.pt; expected what minimind.save_rollouts wrote"
        )


def _forecast(config: Config, work: Workload, updates: int) -> dict[str, str]:
    """Return memory and time of a device that trains, as lines of text; of engines with devices of their own too.

    Raises:
        UserError: weights, gradients and the optimizer alone exceed the memory.
    """
    found, generate, world = device.current(), config.generate, work.layout.world_size
    ahead, apart = steps_ahead(config), config.minimind.rollout_resource is not None
    rows = config.actor.global_batch_size * config.rl.n_samples_per_prompt
    algorithm = objective(config)
    rollouts = memory.Rollouts(
        responses=math.ceil(rows / config.rollout_engines),
        prompt_length=config.rl.max_prompt_length,
        response_length=generate.sampling_config.max_tokens,
        at_once=generate.max_num_seqs,
        reference=algorithm.kl != "none" and config.rl.use_integrated_worker,
        updates=updates,
        apart=apart,
        # `Rank._same_weights` keeps those of `ahead` steps, and the present ones while it measures.
        copies=ahead + 1 if ahead and config.rl.partial_rollout_max_split == 1 else 0,
    )
    engine = memory.of_engine(work, rollouts)
    parts = memory.of_rl(work, machines.like(found.kind), rollouts)
    critic = algorithm.advantage == "gae"
    states = ["weights", "gradients", "master weights", "moments", "reference", "copies of weights", "rollout engine"]
    if critic:
        parts["critic"] = sum(parts[name] for name in states[:4])
    processes = world + (config.rollout_engines if apart else 0)
    sharing = min(processes, found.count) if found.kind == "cpu" else 1
    share, total = found.memory / sharing, sum(parts.values())
    certain = sum(parts.get(name, 0.0) for name in [*states, "critic"])
    if found.memory and certain > share:
        raise UserError(
            f"weights, gradients and optimizer states need {certain / GIB:.1f} GiB per process, but it has "
            f"{share / GIB:.1f} GiB; spread the model (tensor_model_parallel_size) over more devices "
            "(rl_config.actor_resource)"
        )
    most = max(total, sum(engine.values()))
    if found.memory and most > share:
        logger.warning(
            f"responses of full length need about {most / GIB:.1f} GiB per process, but it has {share / GIB:.1f} GiB; "
            "lower generate_config.max_num_seqs, sampling_config.max_tokens or actor_config.micro_batch_size"
        )
    lines = {"memory": f"at most about {_gib(parts)}, without the memory of Python and its libraries"}
    if apart:
        lines["engines"] = f"{config.rollout_engines} on devices of their own, at most about {_gib(engine)}"
    cores = found.count / min(processes, found.count)
    if machine := machines.recognize(found.kind, found.name, cores):
        seconds = speed.of_rl(work, machine, rollouts)
        step = sum(seconds.values())
        shown = ", ".join(f"{name} {part / step:.0%}" for name, part in seconds.items() if part / step >= 0.005)
        lines["time"] = f"at most about {step:.3g} s per step ({shown}); docs/plan.md has the sources"
    return lines


def _gib(parts: Mapping[str, float]) -> str:
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"{sum(parts.values()) / GIB:.2f} GiB per device ({shown})"


def _begins(config: Config, training: TrainConfig) -> str:
    """Return the weights of the first step.

    Raises:
        UserError: they do not exist, or are those of another model or tokenizer.
    """
    save, load = config.actor.save, config.actor.load
    if save and iterations_in(Path(save)):
        return f"from the last checkpoint of {save}"
    if not load:
        return "with random weights"
    require_weights(load)
    if not training.model.lora_target_modules:  # else `load` holds adapters
        open_model(training, Path(load))
    return f"with the weights of {load}"

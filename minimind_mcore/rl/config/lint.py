"""The linter: `minimind-mcore rl lint CONFIG --target embedded|mindspeed-rl-2.2.0|mindspeed-rl-master`.

    findings, tree, changes = lint("configs/rlxf/grpo_minimind3.yaml", "mindspeed-rl-master")

The linter migrates older files (`migrate`), then checks keys, types, sizes and modes (`check`). For MindSpeed-RL it
also lists settings that fail there without an error (`traps`), and keys of `minimind` that MindSpeed-RL lacks.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.inputs.documents import checked_yaml, parse_object, read_yaml
from minimind_mcore.preprocess.meta import prompts_path
from minimind_mcore.rl.config.check import STAGES, problems, workers
from minimind_mcore.rl.config.idle import idle
from minimind_mcore.rl.config.load import CONFIGS, compose, plain, resolve
from minimind_mcore.rl.config.migrate import migrate
from minimind_mcore.rl.config.objective import steps_ahead, with_table
from minimind_mcore.rl.config.schema import NEWEST, Config, Problem, keys, of_error, refuse
from minimind_mcore.rl.rewards import verifiers

logger = logging.getLogger(__name__)

TARGETS = {"embedded": "master", "mindspeed-rl-2.2.0": "2.2.0", "mindspeed-rl-master": "master"}
LEVELS = ("error", "warning", "note")

# Keys of the section `minimind` that BACKEND=mindspeed-rl supports, with the allowed values (None: any).
HONOURED: dict[str, tuple[Any, ...] | None] = {
    "algorithm": ("grpo", "ppo", "dapo"),
    "precision": ("bf16",),
    "rollout_engine": ("vllm",),
    "rollout_correction": ("none",),
    "weight_check_interval": (0,),
    "rewards": None,
    "output_dir": None,
}
VERIFIERS = {  # verifiers of MindSpeed-RL
    *("acc", "format", "step", "strict_format", "base_acc", "math_17k_acc"),
    *("acc_for_dapo", "acc_for_ppo", "math_verify_reward"),
}
NEW_VERIFIERS = {"retool_reward"}  # verifiers that only master has
THINKERS = {"base_acc", "format", "strict_format", "math_verify_reward"}  # need a response that begins with <think>
# num_cpus of GRPOTransferDock and TransferQueueManager (trainer/utils/transfer_dock.py, utils/transfer_queue/tq_mgr.py)
TRANSFER_DOCK_CORES = 10
LEAST_PPO_CORES = 2
HOOK = "minimind_mcore.mindspeed.rl_hook.setup"


@dataclass(frozen=True)
class LintFinding:
    """A finding about a key: an error, a warning or a note."""

    level: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.level:8}{self.key}: {self.message}"


def lint(
    path: str, target: str, overrides: Sequence[str] = (), device: str | None = None, nodes: int = 1
) -> tuple[list[LintFinding], dict[str, Any], list[str]]:
    """Check a YAML file, or one of the kit's configurations by name.

    Args:
        path: a YAML file, or a name in configs/rlxf.
        target: the program to check for.
        overrides: hydra overrides.
        device: device of the embedded trainer (default: the one found).
        nodes: number of hosts of the Ray cluster.

    Returns:
        The findings, the composed configuration after migration, and the changes that the migration made to the file.

    Raises:
        UserError: the file does not exist, or cannot be composed.
    """
    if target not in TARGETS:
        raise UserError(f"--target {target}: expected {', '.join(TARGETS)}")
    file, version = find(path), TARGETS[target]
    raw, changes = migrate(read(file), version)
    tree = _composed(raw, file, overrides, device if target == "embedded" else "none")
    tree, more = migrate(tree, version)  # the files of its defaults list may have older keys too
    if target != "embedded":
        tree = with_table(tree, version)
    changed = (change.split(" ", 1) for change in [*changes, *more])
    findings = [LintFinding("warning", key.rstrip(":"), message) for key, message in changed]
    return sorted([*findings, *check(tree, target, nodes)], key=_rank), tree, changes


def check(tree: dict[str, Any], target: str, nodes: int = 1) -> list[LintFinding]:
    """Return the findings of a composed configuration, errors first. See `lint`."""
    if found := keys(tree, TARGETS[target]):
        return [LintFinding("error", *problem) for problem in found]
    try:
        config = resolve(tree if TARGETS[target] == NEWEST else migrate(tree, NEWEST)[0])
    except UserError as error:
        return [LintFinding("error", *of_error(error))]
    findings = [LintFinding("error", *wrong) for wrong in problems(config, target, nodes)]
    return sorted([*findings, *traps(config, tree, target, nodes)], key=_rank)


def fit(tree: dict[str, Any], name: str) -> Config:
    """Return the resolved configuration for the embedded trainer, and print warnings and notes.

    Raises:
        UserError: the configuration has errors. The message lists all of them.
    """
    findings = check(tree, "embedded")
    refuse([(finding.key, finding.message) for finding in findings if finding.level == "error"], name)
    for finding in findings:
        logger.info(finding)
    return resolve(tree)


def _rank(finding: LintFinding) -> int:
    return LEVELS.index(finding.level)


def find(path: str) -> Path:
    """Return the file of a path, or of a name in configs/rlxf."""
    for file in (Path(path).expanduser(), CONFIGS / f"{path.removesuffix('.yaml')}.yaml"):
        if file.is_file():
            return file.resolve()
    raise UserError(
        f"{path}: no such file, and configs/rlxf has {', '.join(sorted(f.stem for f in CONFIGS.glob('*.yaml')))}"
    )


def read(file: Path) -> dict[str, Any]:
    """Read a YAML file without composing it. Numbers such as 1e-6 become floats, as in hydra."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        checked_yaml(file)
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: found {type(loaded).__name__}, expected sections such as megatron_training:")
    return {str(key): value for key, value in loaded.items()}


def _composed(raw: Mapping[str, Any], file: Path, overrides: Sequence[str], device: str | None) -> dict[str, Any]:
    """Compose the migrated file with its groups, from its own directory and from configs/rlxf."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).with_suffix(".yaml").write_text(dump(raw), encoding="utf-8")
        tree = compose(file.stem, overrides, folder, device, beside=file.parent)
    return plain(tree)


def dump(tree: Mapping[str, Any]) -> str:
    """Return a tree as YAML, with the sections in their usual order."""
    text: str = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=110)
    return text


def traps(config: Config, tree: Mapping[str, Any], target: str, nodes: int = 1) -> Iterator[LintFinding]:
    """Yield settings that run without an error but train wrongly or wait for ever."""
    yield from _rewards(config, target)
    if target == "embedded":
        if nothing := idle(config):
            yield LintFinding("note", "no effect on the embedded trainer", ", ".join(nothing))
        if not config.rl.blocking and not config.minimind.rollout_resource and steps_ahead(config):
            why = "false: the engines generate on the devices that train at the same time, which saves no time"
            yield LintFinding(
                "note", "rl_config.blocking", f"{why}; give them their own with minimind.rollout_resource"
            )
        return
    hooked = _hooked(config)
    level, after = ("note", "; the setup hook repairs it") if hooked else ("warning", "")
    rl, actor = config.rl, config.actor
    if target == "mindspeed-rl-master" and not rl.async_engine:
        why = "vLLM gets prompts that were decoded without <|im_start|> and <|im_end|>; training uses the original ones"
        yield LintFinding(level, "rl_config.async_engine", f"false: {why}; set it to true{after}")
    why = "MiniMind's pad id is 0, which MindSpeed-RL treats as unset: rows without an EOS keep their padding as tokens"
    yield LintFinding(level, "tokenizer", f"{why}{after}")
    if rl.shuffle_mini_batch:
        why = "also shuffles the passes for old and reference log-probabilities, and their original order is lost"
        yield LintFinding(level, "rl_config.shuffle_mini_batch", f"true {why}{after}")
    if not hooked:
        why = f"is not {HOOK}, which adds MiniMind's weights to MindSpeed-RL and repairs the faults named here"
        yield LintFinding("warning", "rl_config.runtime_env_path", f"its worker_process_setup_hook {why}")
    cores = cpu_cores(config, nodes)
    parts = ", ".join(f"{count:g} for {what}" for what, count in cores.items())
    wanted = f"{'hosts have' if nodes > 1 else 'host has'} {sum(cores.values()):g} CPU cores: {parts}"
    yield LintFinding("note", "rl_config.num_cpus_for_placement_group", f"Ray waits for ever unless its {wanted}")
    yield from _heads(config)
    if actor.padded_vocab_size != 6400 or actor.make_vocab_size_divisible_by != 1:
        yield LintFinding("note", f"model.{config.model}", "MiniMind's vocabulary has 6400 rows; vLLM's must be equal")
    yield from (LintFinding("error", *problem) for problem in [*_ours(tree, config), *_models(config)])


def _heads(config: Config) -> Iterator[LintFinding]:
    """Warn about head sizes that vllm-ascend's attention may not support. Padded heads are for inference only."""
    from minimind_mcore.inference.vllm_engine import has_ascend_kernel  # imports torch

    heads, groups = config.actor.num_attention_heads, config.actor.num_query_groups
    size = config.actor.kv_channels or config.actor.hidden_size // heads
    if not has_ascend_kernel(size, groups in (None, heads)):
        why = "vllm-ascend's attention documents heads of 128 and 192, and of 64 where each has its own key-value head"
        advice = "let vLLM generate with this model first (minimind-mcore serve), or train with BACKEND=embedded"
        yield LintFinding("warning", f"model.{config.model}.kv_channels", f"{size}: {why}; {advice}")


def _hooked(config: Config) -> bool:
    """Return whether the workers start with this kit's setup hook."""
    for folder in (Path(), CONFIGS.parents[1], Path(os.environ.get("MINDSPEED_RL_HOME", ""))):
        file = folder / config.rl.runtime_env_path
        if file.is_file():
            environment = read_yaml(file)
            return isinstance(environment, dict) and environment.get("worker_process_setup_hook") == HOOK
    return False


def _own_reward(path: str, config: Config) -> Iterator[LintFinding]:
    """Yield the error of a reward `package.module:function` that cannot be imported, or called with a record."""
    from minimind_mcore.rl.rewards.rewards import verifier  # imports torch

    try:
        verifier(path, [name for name in config.actor.dataset_additional_keys if name != "labels"])
    except UserError as error:
        yield LintFinding("error", *of_error(error))


def _rewards(config: Config, target: str) -> Iterator[LintFinding]:
    known = VERIFIERS | (NEW_VERIFIERS if target == "mindspeed-rl-master" else set())
    if target == "embedded":
        known = set(verifiers.VERIFIERS)
    names, key = config.rl.verifier_function, "rl_config.verifier_function"
    own = [name for name in config.reward_names if ":" in name]  # package.module:function
    if target == "embedded":
        yield from (finding for path in own for finding in _own_reward(path, config))
    for name in names:
        if name in own and (target == "embedded" or _hooked(config)):
            continue
        if name not in known:
            why = f"is unknown{did_you_mean(name, known)} (known: {', '.join(sorted(known))})"
            yield LintFinding("error", key, f"{name} {why}")
    beside = prompts_path(config.actor.data_path)
    thinkers = THINKERS.intersection(names)
    if beside.is_file() and (thinkers or "acc_for_dapo" in names):
        with open(beside, "rb") as lines:
            first = parse_object(next(lines, b"{}"), f"{beside}, line 1", "convert the data again")
        prompt, given = str(first.get("prompt", "")), f"the prompts of {config.actor.data_path}"
        if "acc_for_dapo" in names and "Answer:" not in prompt:
            why = f'rewards responses that end in "Answer: ...", and {given} do not ask for that'
            end = "no response earns a reward, unless the model was tuned to that format"
            yield LintFinding("warning", key, f"acc_for_dapo {why}: {end}")
        if thinkers and prompt.rstrip().endswith(("<think>", "</think>")):
            why = f"want a response that begins with <think>, and {given} write it already: no response can pass"
            advice = "Use math_17k_acc, or prompts of --prompt-type minimind_r1"
            yield LintFinding("error", key, f"{', '.join(sorted(thinkers))} {why}. {advice}")


def _ours(tree: Mapping[str, Any], config: Config) -> Iterator[Problem]:
    """Yield keys of the section `minimind` that MindSpeed-RL does not support."""
    for key, value in (tree.get("minimind") or {}).items():
        allowed = HONOURED.get(key, ())
        if allowed is not None and value not in allowed:
            why = f"can have {', '.join(map(str, allowed))}" if allowed else "has no such thing"
            yield f"minimind.{key}", f"{value!r} cannot be honoured: MindSpeed-RL {why}"
    stage, name = STAGES.get(config.minimind.algorithm), config.minimind.algorithm
    if stage and stage != config.actor.stage:
        yield "megatron_training.stage", f"{config.actor.stage} does not fit algorithm {name}: {stage}"


def _models(config: Config) -> Iterator[Problem]:
    """Yield features of a model that MindSpeed-RL lacks, with and without the setup hook."""
    actor, generate, rl_cores = config.actor, config.generate, config.rl.num_cpus_for_placement_group
    if not config.tree["megatron_training"].get("bf16", True):
        yield "megatron_training.bf16", "MindSpeed-RL trains in bf16 only"
    if generate.dtype != "bfloat16":
        yield "generate_config.dtype", f"found {generate.dtype}: only bfloat16 on MindSpeed-RL"
    if actor.num_experts and actor.n_shared_experts:
        why = "a mixture with a shared expert has no class in vLLM and no weight adaptor in MindSpeed-RL"
        yield "actor_config.model", f"{why}; train it with the embedded trainer"
    if actor.num_experts and actor.expert_model_parallel_size > 1 and not actor.moe_tp_extend_ep:
        yield "actor_config.expert_model_parallel_size", "above 1 needs moe_tp_extend_ep: true"
    yield from _unsaved_mixture(config)
    if config.minimind.algorithm == "ppo" and config.rl.use_integrated_worker and rl_cores < LEAST_PPO_CORES:
        why = "actor and critic share each NPU's placement group, and Ray reserves a core for each of them"
        yield "rl_config.num_cpus_for_placement_group", f"{rl_cores}: {why}; set it to {LEAST_PPO_CORES} or more"
    folder = Path(actor.tokenizer_name_or_path or "")
    if folder.is_dir() and not (folder / "config.json").is_file():
        why = f"{folder} is a tokenizer alone: vLLM builds its model from this directory"
        advice = "convert the weights with ckpt_convert_minimind_mcore2hf.sh"
        yield "megatron_training.tokenizer_name_or_path", f"{why}; {advice}"


def _unsaved_mixture(config: Config) -> Iterator[Problem]:
    """Refuse a checkpoint that Megatron-LM 0.12.1 cannot write.

    For grouped experts `GroupedMLP.sharded_state_dict` computes the offset of a rank's part of the distributed
    optimizer (`w_start_range`) from the row where the part begins, not from the first row of the expert.
    """
    actor = config.actor
    ranks = actor.pipeline_model_parallel_size * max(actor.tensor_model_parallel_size, actor.expert_model_parallel_size)
    devices = next(worker.devices for worker in workers(config) if worker.name == "actor_config")
    if actor.num_experts and actor.use_distributed_optimizer and devices > ranks:
        why = "Megatron-LM 0.12.1 cannot save the optimizer of grouped experts that data-parallel ranks share"
        yield "megatron_training.use_distributed_optimizer", f"true: {why}; set it to false"


def cpu_cores(config: Config, nodes: int) -> dict[str, int | float]:
    """Return the CPU cores that a run of MindSpeed-RL reserves in Ray, by consumer.

    MindSpeed-RL waits without a time limit for placement groups and actors whose cores are not free.

    Args:
        config: the resolved configuration.
        nodes: number of hosts of the Ray cluster.
    """
    rl = config.rl
    shared = rl.use_integrated_worker  # PPO's critic then shares the actor's placement groups
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

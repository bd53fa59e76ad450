"""The linter: `minimind-mcore rl lint CONFIG --target embedded|mindspeed-rl-2.2.0|mindspeed-rl-master`.

    findings, tree, changes = lint("configs/rlxf/grpo_minimind3.yaml", "mindspeed-rl-master")

It migrates older files (`migrate`), then checks keys, types, sizes and modes (`check`). For MindSpeed-RL it also lists
what fails there without an error (TRAPS), and the keys of the `minimind` section that MindSpeed-RL cannot honour.
"""

from __future__ import annotations

import os
import sys
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
from minimind_mcore.rl.config.load import CONFIGS, compose, lacking, plain, resolve
from minimind_mcore.rl.config.migrate import migrate
from minimind_mcore.rl.config.objective import objective, with_table
from minimind_mcore.rl.config.schema import MEGATRON_SECTIONS, NEWEST, Config, keys, of_error, refuse
from minimind_mcore.rl.rewards import verifiers

TARGETS = {"embedded": "master", "mindspeed-rl-2.2.0": "2.2.0", "mindspeed-rl-master": "master"}
LEVELS = ("error", "warning", "note")

# Keys of our own section that BACKEND=mindspeed-rl honours, and the values that it can have there (None: any).
HONOURED: dict[str, tuple[Any, ...] | None] = {
    "algorithm": ("grpo", "ppo", "dapo"),
    "precision": ("bf16",),
    "rollout_engine": ("vllm",),
    "rollout_correction": ("none",),
    "weight_check_interval": (0,),
    "rewards": None,
    "output_dir": None,
}
VERIFIERS = {  # of MindSpeed-RL
    *("acc", "format", "step", "strict_format", "base_acc", "math_17k_acc"),
    *("acc_for_dapo", "acc_for_ppo", "math_verify_reward"),
}
NEW_VERIFIERS = {"retool_reward"}  # of master
THINKERS = {"base_acc", "format", "strict_format", "math_verify_reward"}  # the response must begin with <think>
# num_cpus of GRPOTransferDock and TransferQueueManager (trainer/utils/transfer_dock.py, utils/transfer_queue/tq_mgr.py)
TRANSFER_DOCK_CORES = 10
HOOK = "minimind_mcore.mindspeed.rl_hook.setup"


@dataclass(frozen=True)
class Finding:
    """Something about a key: an error, a warning, or a note."""

    level: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.level:8}{self.key}: {self.message}"


def lint(
    path: str, target: str, overrides: Sequence[str] = (), device: str | None = None, nodes: int = 1
) -> tuple[list[Finding], dict[str, Any], list[str]]:
    """Check a YAML file, or one of the kit's by name.

    Args:
        path: of the file, or a name in configs/rlxf.
        target: what is to read it.
        overrides: hydra's.
        device: of the embedded trainer (default: the one found).
        nodes: hosts of the Ray cluster.

    Returns:
        What was found, the composed configuration after migration, and what the migration changed in the file.

    Raises:
        UserError: no such file, or it cannot be composed.
    """
    if target not in TARGETS:
        raise UserError(f"--target {target}: expected {', '.join(TARGETS)}")
    file, version = find(path), TARGETS[target]
    raw, changes = migrate(read(file), version)
    tree = _composed(raw, file, overrides, device if target == "embedded" else "none")
    tree, more = migrate(tree, version)  # what comes from the files that it is made of
    if target != "embedded":
        tree = with_table(tree, version)
    changed = (change.split(" ", 1) for change in [*changes, *more])
    findings = [Finding("warning", key.rstrip(":"), message) for key, message in changed]
    return sorted([*findings, *check(tree, target, nodes)], key=_rank), tree, changes


def check(tree: dict[str, Any], target: str, nodes: int = 1) -> list[Finding]:
    """What is found in a composed configuration that has the target's keys, the worst first; see `lint`."""
    if found := keys(tree, TARGETS[target]):
        return [Finding("error", *problem) for problem in found]
    try:
        config = resolve(tree if TARGETS[target] == NEWEST else migrate(tree, NEWEST)[0])
    except UserError as error:
        return [Finding("error", *of_error(error))]
    findings = [Finding("error", *wrong) for wrong in problems(config, target, nodes)]
    return sorted([*findings, *traps(config, tree, target, nodes)], key=_rank)


def fit(tree: dict[str, Any], name: str) -> Config:
    """The configuration of a composed tree, for the embedded trainer; what is not wrong but noteworthy is printed.

    Raises:
        UserError: with everything that is wrong with it.
    """
    findings = check(tree, "embedded")
    refuse([(finding.key, finding.message) for finding in findings if finding.level == "error"], name)
    for finding in findings:
        print(finding, file=sys.stderr)
    return resolve(tree)


def _rank(finding: Finding) -> int:
    return LEVELS.index(finding.level)


def find(path: str) -> Path:
    """The file that a path or a name of configs/rlxf means."""
    for file in (Path(path).expanduser(), CONFIGS / f"{path.removesuffix('.yaml')}.yaml"):
        if file.is_file():
            return file.resolve()
    raise UserError(
        f"{path}: no such file, and configs/rlxf has {', '.join(sorted(f.stem for f in CONFIGS.glob('*.yaml')))}"
    )


def read(file: Path) -> dict[str, Any]:
    """A YAML file as it stands; numbers such as 1e-6 are numbers, as hydra reads them."""
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
    """The migrated file with its groups, which are looked for beside it and in configs/rlxf."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).with_suffix(".yaml").write_text(dump(raw), encoding="utf-8")
        tree = compose(file.stem, overrides, folder, device, beside=file.parent)
    return plain(tree)


def dump(tree: Mapping[str, Any]) -> str:
    """A tree as YAML, sections in their order."""
    text: str = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=110)
    return text


def traps(config: Config, tree: Mapping[str, Any], target: str, nodes: int = 1) -> Iterator[Finding]:
    """What runs and is wrong, or waits for ever."""
    yield from _rewards(config, target)
    if target == "embedded":
        if nothing := idle(config):
            yield Finding("note", "no effect on the embedded trainer", ", ".join(nothing))
        return
    hooked = _hooked(config)
    repaired = ("note", "; the setup hook repairs it") if hooked else ("warning", "")
    rl = config.rl
    if target == "mindspeed-rl-master" and not rl.async_engine:
        yield Finding(
            repaired[0],
            "rl_config.async_engine",
            "false: vLLM gets prompts that were decoded without <|im_start|> and <|im_end|>, training the original "
            f"ones; set it to true{repaired[1]}",
        )
    yield Finding(
        repaired[0],
        "tokenizer",
        "MiniMind's pad id is 0, which MindSpeed-RL takes for none: rows without an end keep their padding as "
        f"tokens{repaired[1]}",
    )
    if rl.shuffle_mini_batch:
        yield Finding(
            repaired[0],
            "rl_config.shuffle_mini_batch",
            f"true also shuffles the passes for old and reference log-probabilities, whose order is lost{repaired[1]}",
        )
    if not hooked:
        yield Finding(
            "warning",
            "rl_config.runtime_env_path",
            f"its worker_process_setup_hook is not {HOOK}, which teaches MindSpeed-RL MiniMind's weights and repairs "
            "what is named here",
        )
    cores = cpu_cores(config, nodes)
    parts = ", ".join(f"{count:g} for {what}" for what, count in cores.items())
    yield Finding(
        "note",
        "rl_config.num_cpus_for_placement_group",
        f"Ray waits for ever unless its {'hosts have' if nodes > 1 else 'host has'} {sum(cores.values()):g} CPU cores: "
        f"{parts}",
    )
    yield from _ours(tree, config)
    yield from _models(config, target)


def _hooked(config: Config) -> bool:
    """Whether the workers begin with our setup hook."""
    for folder in (Path(), CONFIGS.parents[1], Path(os.environ.get("MINDSPEED_RL_HOME", ""))):
        file = folder / config.rl.runtime_env_path
        if file.is_file():
            environment = read_yaml(file)
            return isinstance(environment, dict) and environment.get("worker_process_setup_hook") == HOOK
    return False


def _rewards(config: Config, target: str) -> Iterator[Finding]:
    known = VERIFIERS | (NEW_VERIFIERS if target == "mindspeed-rl-master" else set())
    if target == "embedded":
        known = set(verifiers.VERIFIERS)
    names = config.rl.verifier_function
    for name in names:
        if ":" in name and (target == "embedded" or _hooked(config)):  # package.module:function
            continue
        if name not in known:
            yield Finding(
                "error",
                "rl_config.verifier_function",
                f"{name} is unknown{did_you_mean(name, known)} (known: {', '.join(sorted(known))})",
            )
    beside = prompts_path(config.actor.data_path)
    thinkers = THINKERS.intersection(names)
    if beside.is_file() and (thinkers or "acc_for_dapo" in names):
        with open(beside, "rb") as lines:
            first = parse_object(next(lines, b"{}"), f"{beside}, line 1", "convert the data again")
        prompt = str(first.get("prompt", ""))
        if "acc_for_dapo" in names and "Answer:" not in prompt:
            yield Finding(
                "warning",
                "rl_config.verifier_function",
                'acc_for_dapo rewards responses that end in "Answer: ...", and the prompts of '
                f"{config.actor.data_path} do not ask for that: no response earns a reward, unless the model was "
                "tuned on that form",
            )
        if thinkers and prompt.rstrip().endswith(("<think>", "</think>")):
            yield Finding(
                "error",
                "rl_config.verifier_function",
                f"{', '.join(sorted(thinkers))} want a response that begins with <think>, and the prompts of "
                f"{config.actor.data_path} write it already: no response can pass. Use math_17k_acc, or prompts of "
                "--prompt-type minimind_r1",
            )


def _ours(tree: Mapping[str, Any], config: Config) -> Iterator[Finding]:
    for key, value in (tree.get("minimind") or {}).items():
        allowed = HONOURED.get(key, ())
        if allowed is not None and value not in allowed:
            why = (
                f"MindSpeed-RL can have {', '.join(map(str, allowed))}" if allowed else "MindSpeed-RL has no such thing"
            )
            yield Finding("error", f"minimind.{key}", f"{value!r} cannot be honoured: {why}")
    stage = STAGES.get(config.minimind.algorithm)
    if stage and stage != config.actor.stage:
        yield Finding(
            "error",
            "megatron_training.stage",
            f"{config.actor.stage} does not fit algorithm {config.minimind.algorithm}: {stage}",
        )


def _models(config: Config, target: str) -> Iterator[Finding]:
    """What MindSpeed-RL does not have for a model, with the hook and without."""
    actor = config.actor
    if not config.tree["megatron_training"].get("bf16", True):
        yield Finding("error", "megatron_training.bf16", "MindSpeed-RL trains in bf16 only")
    if config.generate.dtype != "bfloat16":
        yield Finding("error", "generate_config.dtype", f"found {config.generate.dtype}: only bfloat16 on MindSpeed-RL")
    if actor.num_experts and actor.n_shared_experts:
        yield Finding(
            "error",
            "actor_config.model",
            "a mixture with a shared expert has no class in vLLM and no weight adaptor in MindSpeed-RL; train it with "
            "the embedded trainer",
        )
    if actor.num_experts and actor.expert_model_parallel_size > 1 and not actor.moe_tp_extend_ep:
        yield Finding("error", "actor_config.expert_model_parallel_size", "above 1 needs moe_tp_extend_ep: true")
    if actor.padded_vocab_size != 6400 or actor.make_vocab_size_divisible_by != 1:
        yield Finding("note", f"model.{config.model}", "MiniMind's vocabulary has 6400 rows; vLLM's must be equal")
    folder = Path(actor.tokenizer_name_or_path or "")
    if folder.is_dir() and not (folder / "config.json").is_file():
        yield Finding(
            "error",
            "megatron_training.tokenizer_name_or_path",
            f"{folder} is a tokenizer alone: vLLM builds its model from this directory; convert the weights with "
            "ckpt_convert_minimind_mcore2hf.sh",
        )


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

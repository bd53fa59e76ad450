"""BACKEND=mindspeed-rl: run MindSpeed-RL's unmodified programs with this kit's YAML.

    MINDSPEED_RL_HOME=/workspace/MindSpeed-RL BACKEND=mindspeed-rl python train_grpo.py --config-name grpo_minimind3

The YAML is checked (`rl.config.lint`) and written without hydra's config groups, with absolute paths and with the keys
of the installed version. A runtime environment is written next to it. Its setup hook patches every worker (`rl_hook`).
The command is printed; `--dry-run` stops there.
"""

from __future__ import annotations

import copy
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minimind_mcore.errors import UserError
from minimind_mcore.mindspeed.checkpoints import check_pickles, saved_layout, saved_router_weight
from minimind_mcore.mindspeed.launch import sources
from minimind_mcore.paths import CHECKOUT
from minimind_mcore.platform.processor import usable_cores
from minimind_mcore.rl.config.check import STAGES
from minimind_mcore.rl.config.lint import LEAST_PPO_CORES, TARGETS, LintFinding, cpu_cores, dump, lint
from minimind_mcore.rl.config.load import CONFIGS, command_parser
from minimind_mcore.rl.config.load import resolve as resolve_config
from minimind_mcore.rl.config.migrate import migrate
from minimind_mcore.rl.config.schema import MEGATRON_SECTIONS, NEWEST, defaults, minimind_config
from minimind_mcore.rl.rewards.verifier_pool import resolve
from minimind_mcore.storage import atomic_write_text

logger = logging.getLogger(__name__)

RUNTIME_ENV = CONFIGS / "envs" / "runtime_env.yaml"
PROGRAMS = {"ray_grpo": "train_grpo.py", "ray_dapo": "train_dapo.py", "ray_ppo": "train_ppo.py"}
PATHS = ("data_path", "tokenizer_name_or_path", "load", "save", "prompt_type_path", "pretrained_checkpoint")
# Folders of the packages that MindSpeed-RL imports, if they are not installed.
HOMES = ("MINDSPEED_LLM_HOME", "MINDSPEED_HOME", "MEGATRON_HOME")
# VLLM_VERSION in each release's configs/envs/runtime_env.yaml. vLLM-Ascend selects its patches by this value.
VLLM_VERSIONS = {"mindspeed-rl-2.2.0": "0.9.1", "mindspeed-rl-master": "0.11.0"}


@dataclass(frozen=True)
class Launch:
    """A command to run.

    Attributes:
        command: words of the command.
        folder: working directory, MindSpeed-RL's folder.
        config: path of the written YAML.
        environment: variables to set in addition to the current ones.
    """

    command: Sequence[str]
    folder: Path
    config: Path
    environment: Mapping[str, str]

    def __str__(self) -> str:
        words = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return f"cd {shlex.quote(str(self.folder))} && {' '.join([*words, shlex.join(self.command)])}"


def home() -> Path:
    """Return MindSpeed-RL's folder; see `launch.sources`."""
    return sources("MindSpeed-RL", "cli/train_grpo.py", "BACKEND=embedded to train on this kit's own trainer").resolve()


def version(folder: Path) -> str:
    """Return the target of `lint.TARGETS`, inferred from a key that differs between the versions."""
    text = (folder / "mindspeed_rl" / "config_cls" / "megatron_config.py").read_text(encoding="utf-8")
    return "mindspeed-rl-2.2.0" if "self.moe_intermediate_size" in text else "mindspeed-rl-master"


def prepare(program: str, name: str, overrides: Sequence[str], directory: str | None = None) -> Launch:
    """Check the configuration, and write the files that MindSpeed-RL reads.

    Args:
        program: this kit's "train_grpo.py" or "train_ppo.py".
        name: name of the configuration.
        overrides: hydra overrides.
        directory: directory of the YAML files (default: the kit's).

    Raises:
        UserError: MindSpeed-RL is not found, NNODES is not a number, the configuration has errors for MindSpeed-RL
            (all are printed), or a reward cannot be imported.
    """
    folder = home()
    target = version(folder)
    file = Path(directory or CONFIGS) / f"{name.removesuffix('.yaml')}.yaml"
    findings, tree, _ = lint(str(file), target, overrides, nodes=_hosts())
    for finding in [*findings, *_cores(tree, target)]:
        logger.info(finding)
    if any(finding.level == "error" for finding in findings):
        raise UserError(f"{file}: not valid for {target} in {folder}; see the errors above")
    _check_checkpoints(tree)
    stage = tree["megatron_training"].get("stage") or STAGES["ppo" if program == "train_ppo.py" else "grpo"]
    if (stage == "ray_ppo") != (program == "train_ppo.py"):
        raise UserError(f"megatron_training.stage: {stage} is run by {PROGRAMS[stage]}, not by {program}")
    for path in [name for name in _rewards(tree)[0] if ":" in name]:
        resolve(path)  # raises here rather than in a worker
    output = Path((tree.get("minimind") or {}).get("output_dir", "outputs/rl")).expanduser().resolve()
    written = output / "mindspeed_rl"
    atomic_write_text(written / "runtime_env.yaml", dump(runtime_environment(target)))
    config = written / f"{file.stem}.yaml"
    atomic_write_text(config, dump(_for_mindspeed_rl(tree, written / "runtime_env.yaml")))
    command = [sys.executable, f"cli/{PROGRAMS[stage]}", "--config-dir", str(written), "--config-name", file.stem]
    return Launch([*command, f"hydra.run.dir={output / 'hydra'}"], folder, config, {"PYTHONPATH": _python_path(folder)})


def _check_checkpoints(tree: Mapping[str, Any]) -> None:
    """Refuse checkpoints that could run code, or whose router weight MindSpeed-RL cannot train."""
    for section in [tree[name] for name in MEGATRON_SECTIONS if name in tree]:
        for key in ("load", "pretrained_checkpoint"):
            if section.get(key):
                check_pickles(Path(section[key]).expanduser())
        require_normalized(section.get("load"))
        require_grouped(section.get("load"))


def require_normalized(load: str | None) -> None:
    """Refuse weights whose router weight MindSpeed-RL cannot train.

    Raises:
        UserError: the checkpoint names `softmax` or `straight_through`.
    """
    rule = saved_router_weight(Path(load).expanduser()) if load else None
    if rule not in (None, "normalized"):
        raise UserError(
            f"load {load}: its router weight is {rule}. MindSpeed-RL trains normalized only: it has no key for "
            "--moe-router-pre-softmax, which the other two rules need. Train on the embedded trainer (BACKEND=embedded)"
        )


def require_grouped(load: str | None) -> None:
    """Refuse a mixture with ungrouped experts, which MindSpeed-RL's weight adaptor cannot send to vLLM.

    Raises:
        UserError: each expert of the checkpoint has its own weights.
    """
    layout = saved_layout(Path(load).expanduser()) if load else None
    if layout and not layout.grouped_experts:
        raise UserError(
            f"load {load}: each expert has weights of its own, and MindSpeed-RL sends only grouped experts to vLLM. "
            f"Convert it:\n    LOAD_DIR={shlex.quote(str(load))} bash "
            "examples/mcore/minimind/ckpt_convert_minimind_mcore2mcore.sh --moe-grouped-gemm"
        )


def _hosts() -> int:
    """Return the number of hosts of the Ray cluster: NNODES, which the scripts for several hosts set."""
    found = os.environ.get("NNODES") or "1"
    if not found.isdigit() or int(found) < 1:
        raise UserError(f"NNODES={found}: expected the number of hosts")
    return int(found)


def _cores(tree: dict[str, Any], target: str) -> list[LintFinding]:
    """Warn if this is the only host and has fewer CPU cores than Ray needs."""
    config, found = resolve_config(tree if TARGETS[target] == NEWEST else migrate(tree, NEWEST)[0]), usable_cores()
    wanted, npus = sum(cpu_cores(config, _hosts()).values()), config.rl.actor_resource.num_npus
    if _hosts() > 1 or found >= wanted:
        return []
    fits = (found - wanted) // npus + config.rl.num_cpus_for_placement_group
    least = LEAST_PPO_CORES if config.minimind.algorithm == "ppo" else 1
    lower = f"set rl_config.num_cpus_for_placement_group={fits:g}, or " if fits >= least else ""
    text = f"this host has {found} CPU cores and Ray needs {wanted:g}; {lower}start Ray with --num-cpus={wanted:g}"
    return [LintFinding("warning", "rl_config.num_cpus_for_placement_group", text)]


def _python_path(folder: Path) -> str:
    paths = [str(CHECKOUT), str(folder), *(os.environ[name] for name in HOMES if os.environ.get(name))]
    return os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def runtime_environment(target: str) -> dict[str, Any]:
    """Return the kit's runtime environment with PYTHONPATH and the vLLM version of a target of `lint.TARGETS`."""
    environment: dict[str, Any] = yaml.safe_load(RUNTIME_ENV.read_text(encoding="utf-8"))
    variables = environment["env_vars"]
    variables["PYTHONPATH"] = _python_path(home())
    if variables.get("VLLM_VERSION") in VLLM_VERSIONS.values():  # the user chose any other value
        variables["VLLM_VERSION"] = VLLM_VERSIONS[target]
    return environment


def _for_mindspeed_rl(tree: Mapping[str, Any], environment: Path) -> dict[str, Any]:
    """Return the composed tree with absolute paths, with user rewards among the verifiers, without the section
    `minimind`."""
    new = copy.deepcopy({key: value for key, value in tree.items() if key != "minimind"})
    for section in [new[name] for name in MEGATRON_SECTIONS if name in new]:
        for key in PATHS:
            if section.get(key):
                section[key] = str(Path(section[key]).expanduser().resolve())
    rl, training = new["rl_config"], new["megatron_training"]
    if (new.get("model") or {}).get(training.get("model"), {}).get("num_experts"):
        training["moe_grouped_gemm"] = True  # see require_grouped
    rl["runtime_env_path"] = str(environment)
    rl["verifier_function"], rl["verifier_weight"] = _rewards(tree)
    return new


def _rewards(tree: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    """Return names and weights of the verifiers, including the user's own functions."""
    rl, ours, known = tree["rl_config"], minimind_config(tree.get("minimind")), defaults("RLConfig")
    names = [*rl.get("verifier_function", known["verifier_function"]), *(reward.path for reward in ours.rewards)]
    weights = [*rl.get("verifier_weight", known["verifier_weight"]), *(reward.weight for reward in ours.rewards)]
    return names, weights


def run(program: str, argv: Sequence[str]) -> None:
    """Replace this process by MindSpeed-RL's program, or with `--dry-run` print the command.

    Raises:
        UserError: see `prepare`.
    """
    parser = command_parser(program, "Train on MindSpeed-RL.")
    parser.add_argument("--dry-run", action="store_true", help="check and write, print the command, run nothing")
    args = parser.parse_intermixed_args(list(argv))
    job = prepare(program, args.config_name, args.overrides, args.config_dir)
    logger.info(f"+ {job}")
    if args.dry_run:
        return
    os.environ.update(job.environment)
    os.chdir(job.folder)
    os.execv(job.command[0], list(job.command))

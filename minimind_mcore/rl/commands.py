"""`minimind-mcore rl ...`: print, check and export a configuration of reinforcement learning.

minimind-mcore rl show --config-name grpo_minimind3 rl_config.epochs=2      # after groups and overrides
minimind-mcore rl lint my.yaml --target mindspeed-rl-master --output new.yaml
minimind-mcore rl export-verl grpo_minimind3 --output verl/
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import documented_parser
from minimind_mcore.inputs.ranges import flag_type
from minimind_mcore.rl.config.lint import TARGETS, dump, find, lint, read
from minimind_mcore.rl.config.load import command_parser, compose, resolve
from minimind_mcore.rl.config.migrate import migrate
from minimind_mcore.storage import atomic_write_text

logger = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = documented_parser("minimind-mcore rl", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shown = command_parser("minimind-mcore rl show", "")
    commands.add_parser("show", parents=[shown], add_help=False, help="print a configuration after overrides")
    checked = commands.add_parser("lint", help="check a configuration and rewrite keys of older guides")
    checked.add_argument("config", help="a YAML file, or a name in configs/rlxf")
    checked.add_argument("overrides", nargs="*", help="such as actor_config.lr=1e-6")
    checked.add_argument("--target", choices=TARGETS, default="embedded", help="program to check (default: embedded)")
    checked.add_argument("--device", help="device of the embedded trainer (default: the one found)")
    hosts = flag_type("nodes")
    checked.add_argument(
        "--nodes", type=hosts, default=1, help="hosts of the Ray cluster, for MindSpeed-RL (default: 1)"
    )
    where = checked.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help="write the rewritten file there")
    where.add_argument("--fix", action="store_true", help="rewrite the file itself (the old file becomes FILE.orig)")
    exported = commands.add_parser("export-verl", help="write model, data, rewards and script for verl")
    exported.add_argument("config", help="a YAML file, or a name in configs/rlxf")
    exported.add_argument("overrides", nargs="*", help="such as actor_config.load=my/checkpoints")
    exported.add_argument("--output", type=Path, required=True, help="the directory to write")
    exported.add_argument(
        "--device", default="none", help="file of device/ to merge (default: none, the values of the YAML)"
    )
    exported.add_argument("--engine", choices=("fsdp", "megatron"), default="fsdp", help="engine (default: fsdp)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Dispatch to a subcommand."""
    parser = _parser()
    args, words = parser.parse_known_args(argv)
    if flags := [word for word in words if word.startswith("-")]:
        parser.error(f"unknown flag {flags[0]}")
    args.overrides += words  # overrides that follow a flag
    {"show": _show, "lint": _lint, "export-verl": _export_verl}[args.command](args)


def _show(args: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    tree = compose(args.config_name, args.overrides, args.config_dir, args.device)
    resolve(tree)
    print(OmegaConf.to_yaml(tree), end="")


def _lint(args: argparse.Namespace) -> None:
    """Print the findings.

    Raises:
        UserError: at least one finding is an error. Raised after all findings are printed.
    """
    findings, _, changes = lint(args.config, args.target, args.overrides, args.device, args.nodes)
    file = find(args.config)
    if args.fix or args.output:
        _rewrite(file, args.output or file, TARGETS[args.target], changes)
    for finding in findings:
        print(finding)
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        raise UserError(f"{file}: {errors} error{'s' if errors > 1 else ''} for {args.target}")
    print(f"{file}: fit for {args.target}")


def _export_verl(args: argparse.Namespace) -> None:
    from minimind_mcore.rl.verl.export import export

    file = find(args.config)
    config = resolve(compose(file.stem, args.overrides, file.parent, args.device))
    export(config, file.stem, args.output, args.engine)
    print(f"{args.output}: written; `bash {args.output}/run.sh` where verl is installed")


def _rewrite(file: Path, output: Path, version: str, changes: Sequence[str]) -> None:
    if not changes and output == file:
        return
    if output == file:
        file.with_suffix(f"{file.suffix}.orig").write_bytes(file.read_bytes())
    atomic_write_text(output, dump(migrate(read(file), version)[0]))
    logger.info(f"{output}: written, {len(changes)} changes (comments are lost)")

"""`minimind-mcore rl ...`: what goes with the YAML of a run of reinforcement learning."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from minimind_mcore.rl.config import command_parser, compose, resolve


def main(argv: Sequence[str] | None = None) -> None:
    """Dispatch to a subcommand."""
    parser = argparse.ArgumentParser(prog="minimind-mcore rl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = command_parser("minimind-mcore rl show", "Print a configuration with its groups and overrides.")
    commands.add_parser("show", parents=[show], add_help=False, help="print a configuration as it is after overrides")
    args = parser.parse_args(argv)
    _show(args)


def _show(args: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    tree = compose(args.config_name, args.overrides, args.config_dir, args.device)
    resolve(tree)
    print(OmegaConf.to_yaml(tree), end="")

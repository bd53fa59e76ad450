"""The programs train_grpo.py and train_ppo.py: read a configuration and start its backend.

`python -m minimind_mcore.rl.main --config-name NAME` prints which of the two programs runs the configuration.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from minimind_mcore import errors
from minimind_mcore.errors import UserError
from minimind_mcore.platform import device
from minimind_mcore.rl.config.load import command_parser, compose, plain
from minimind_mcore.rl.config.schema import Config

BACKENDS = ("embedded", "mindspeed-rl")


def grpo(argv: Sequence[str] | None = None) -> None:
    """Train without a critic: every algorithm but ppo."""
    _run("train_grpo.py", sys.argv[1:] if argv is None else argv)


def ppo(argv: Sequence[str] | None = None) -> None:
    """Train with a critic: ppo."""
    _run("train_ppo.py", sys.argv[1:] if argv is None else argv)


def program(argv: Sequence[str]) -> str:
    """Return the program that runs the configuration of a command line.

    Raises:
        UserError: the configuration does not exist.
    """
    args, _ = command_parser("train_grpo.py", "").parse_known_intermixed_args(list(argv))
    tree = plain(compose(args.config_name, args.overrides, args.config_dir, args.device, quiet=True))
    ours, megatron = (tree.get(name) or {} for name in ("minimind", "megatron_training"))
    critic = ours["algorithm"] == "ppo" if "algorithm" in ours else megatron.get("stage") == "ray_ppo"
    return "train_ppo.py" if critic else "train_grpo.py"


def _run(name: str, argv: Sequence[str]) -> None:
    if backend() == "mindspeed-rl":
        from minimind_mcore.mindspeed import rl_launch

        rl_launch.run(name, argv)
        return
    from minimind_mcore.rl.config.lint import fit
    from minimind_mcore.rl.runtime import dry_run

    flags = [word for word in argv if word in ("--dry-run", "--data-pending")]
    args = command_parser(name, "").parse_intermixed_args([word for word in argv if word not in flags])
    tree = compose(args.config_name, args.overrides, args.config_dir, args.device)
    config = fit(plain(tree), args.config_name)
    _check(name, config)
    if "--dry-run" in flags:
        dry_run.print_plan(config, "--data-pending" in flags)
        return
    dry_run.check_before_start(config)
    from minimind_mcore.rl.runtime import trainer

    trainer.run(config)


def backend() -> str:
    """Return the backend: the setting BACKEND, or by default MindSpeed-RL on an NPU and the embedded trainer elsewhere.

    Raises:
            UserError: BACKEND has another value.
    """
    name = os.environ.get("BACKEND") or ("mindspeed-rl" if device.current().is_ascend else "embedded")
    if name not in BACKENDS:
        raise UserError(f"BACKEND={name}: expected one of {', '.join(BACKENDS)}")
    return name


def _check(program: str, config: Config) -> None:
    """Raise a `UserError` if the other program runs the algorithm."""
    name = config.minimind.algorithm
    if (name == "ppo") != (program == "train_ppo.py"):
        other = "train_ppo.py" if name == "ppo" else "train_grpo.py"
        raise UserError(f"minimind.algorithm: {name} is run by {other}")


if __name__ == "__main__":
    errors.run(lambda: print(program(sys.argv[1:])))

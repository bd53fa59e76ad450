"""minimind-mcore COMMAND ...: the tools that come with the kit, under one name.

    minimind-mcore --help
    minimind-mcore doctor
    minimind-mcore rl lint my.yaml
    python -m minimind_mcore.cli rl lint my.yaml      # from a checkout that is not installed

Each command is a module with `main(argv)`; it is imported only when it is asked for, so that none of them
waits for another's libraries.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from minimind_mcore import errors
from minimind_mcore.errors import UserError

# command: (its module, what it is for)
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("minimind_mcore.doctor.main", "what is installed here, what is wrong, and the command that fixes it"),
    "rl": ("minimind_mcore.rl.cli", "check a configuration of reinforcement learning, or write it for another trainer"),
    "serve": ("minimind_mcore.serve.main", "answer OpenAI's HTTP requests with a model in any form"),
}


def usage() -> str:
    """What `--help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(["usage: minimind-mcore COMMAND ...", "", *lines, "", "`COMMAND --help` says more."])


def dispatch(argv: Sequence[str]) -> int:
    """Run one command; returns the status to exit with.

    Raises:
        UserError: there is no such command, or what the command itself raises.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 1
    if argv[0] not in COMMANDS:
        hint = errors.did_you_mean(argv[0], COMMANDS) or f"; it has {', '.join(COMMANDS)}"
        raise UserError(f"minimind-mcore has no command {argv[0]!r}{hint}")
    module = importlib.import_module(COMMANDS[argv[0]][0])
    return int(module.main(list(argv[1:])) or 0)


def main() -> None:
    """The program: an error is one message, and exit status 1."""
    errors.run(lambda: sys.exit(dispatch(sys.argv[1:])))


if __name__ == "__main__":
    main()

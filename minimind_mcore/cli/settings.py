"""Settings: what users of the commands give through the environment. An empty setting counts as one not given."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from minimind_mcore.errors import UserError
from minimind_mcore.paths import default_outputs

CLI = [sys.executable, "-m", "minimind_mcore.cli"]


def env(name: str, default: str = "") -> str:
    """Return a setting."""
    return os.environ.get(name) or default


def count(name: str, default: int) -> int:
    """Return a setting that is a number of something.

    Raises:
        UserError: the setting is not a whole number of 1 or more.
    """
    if not re.fullmatch("[1-9][0-9]*", text := env(name, str(default))):
        raise UserError(f"{name}={text}: expected a whole number of 1 or more")
    return int(text)


def path(name: str, default: str | Path = "") -> str:
    """Return a setting that is a path, as an absolute path: MindSpeed-LLM's programs run in a folder of their own."""
    found = env(name, str(default))
    return os.path.abspath(os.path.expanduser(found)) if found else ""


def flags(*names: str) -> list[str]:
    """Return the flags of the settings that are given: "NAME" is the setting of --name, "NAME --other" of --other."""
    words = []
    for name, _, flag in (row.partition(" ") for row in names):
        if value := env(name):
            words += [flag or f"--{name.lower().replace('_', '-')}", value]
    return words


def path_flags(*names: str) -> list[str]:
    """Return the flags of settings that are paths, as absolute paths; see `flags`."""
    return [word for row in names for word in (*flags(row)[:1], path(row.split()[0])) if word]


def given(argv: Sequence[str], *names: str) -> bool:
    """Whether one of these flags is among the words of a command line."""
    return any(word.partition("=")[0] in names for word in argv)


def choice(name: str, default: str, *expected: str) -> str:
    """Return a setting that is one of a few words.

    Raises:
        UserError: the setting is another word.
    """
    if (found := env(name, default)) not in expected:
        listed = f"{', '.join(expected[:-1])} or {expected[-1]}"
        raise UserError(f"{name}={found}: expected {listed}")
    return found


def data_dir() -> Path:
    """Return the directory of the data that the kit makes."""
    return Path(path("DATA_DIR", default_outputs() / "data"))


def show(command: Sequence[str]) -> None:
    """Print a command as one could type it."""
    print("+", shlex.join(command), flush=True)


def help_of(argv: Sequence[str], text: str | None) -> None:
    """Print a command's documentation and end the program, if its arguments ask for help."""
    if given(argv, "-h", "--help"):
        print(text)
        sys.exit()


def wait_for(command: Sequence[str], changes: Mapping[str, str | None] | None = None) -> int:
    """Run a command. Return its exit status, or 128 + the number of the signal that ended it.

    A request to stop goes to the command, which may save; this program ends after it.

    Args:
        command: the words.
        changes: of the environment; None removes a setting.
    """
    changed = os.environ | (changes or {})
    environ = {name: value for name, value in changed.items() if value is not None}
    process = subprocess.Popen(command, env=environ)

    def stop(*_: int | FrameType | None) -> None:
        process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status

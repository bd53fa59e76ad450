"""Settings: options of the commands that users set as environment variables. An empty setting counts as not set."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from minimind_mcore.errors import UserError, stops_handled
from minimind_mcore.paths import default_outputs

CLI = [sys.executable, "-m", "minimind_mcore.cli"]


def env(name: str, default: str = "") -> str:
    """Return the value of a setting, or the default if the setting is empty."""
    return os.environ.get(name) or default


def count(name: str, default: int) -> int:
    """Return a setting that is a positive integer.

    Raises:
        UserError: the setting is not a whole number of 1 or more.
    """
    if not re.fullmatch("[1-9][0-9]*", text := env(name, str(default))):
        raise UserError(f"{name}={text}: expected a whole number of 1 or more")
    return int(text)


def path(name: str, default: str | Path = "") -> str:
    """Return a path setting as an absolute path, because MindSpeed-LLM's programs change the working directory."""
    found = env(name, str(default))
    return os.path.abspath(os.path.expanduser(found)) if found else ""


def flags(*names: str) -> list[str]:
    """Return the flags for the settings that are set. "NAME" becomes --name, "NAME --other" becomes --other."""
    words = []
    for name, _, flag in (row.partition(" ") for row in names):
        if value := env(name):
            words += [flag or f"--{name.lower().replace('_', '-')}", value]
    return words


def path_flags(*names: str) -> list[str]:
    """Return the flags for path settings, like `flags`, with absolute paths."""
    return [word for row in names for word in (*flags(row)[:1], path(row.split()[0])) if word]


def given(argv: Sequence[str], *names: str) -> bool:
    """Return whether the command line contains one of these flags."""
    return any(word.partition("=")[0] in names for word in argv)


def value_of(argv: Sequence[str], name: str) -> str:
    """Return the last value of a flag, written as --flag VALUE or --flag=VALUE. Return "" if the flag is not given."""
    found = ""
    for word, after in zip(argv, [*argv[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if flag == name:
            found = value if equals else after
    return found


def choice(name: str, default: str, *expected: str) -> str:
    """Return a setting that is one of the expected words.

    Raises:
        UserError: the setting has another value.
    """
    if (found := env(name, default)) not in expected:
        listed = f"{', '.join(expected[:-1])} or {expected[-1]}"
        raise UserError(f"{name}={found}: expected {listed}")
    return found


def data_dir() -> Path:
    """Return the directory for data that the kit makes."""
    return Path(path("DATA_DIR", default_outputs() / "data"))


def show(command: Sequence[str]) -> None:
    """Print a command in shell syntax."""
    print("+", shlex.join(command), flush=True)


def help_of(argv: Sequence[str], text: str | None) -> None:
    """If the arguments contain -h or --help, print the text and exit."""
    if given(argv, "-h", "--help"):
        print(text)
        sys.exit()


def wait_for(command: Sequence[str], changes: Mapping[str, str | None] | None = None) -> int:
    """Run a command. Return its exit status, or 128 + N if signal N ended the command.

    SIGINT and SIGTERM are passed to the command, which may save a checkpoint first.

    Args:
        command: program and arguments.
        changes: changes of the environment. None removes a variable.
    """
    changed = os.environ | (changes or {})
    environ = {name: value for name, value in changed.items() if value is not None}
    process = subprocess.Popen(command, env=environ)
    with stops_handled(lambda *_: process.terminate()):
        status = process.wait()
    return status if status >= 0 else 128 - status

"""The names that users type: settings of the scripts, flags of the commands. names.json is the recorded list.

    python tests/contract/record_names.py CHECKOUT > tests/contract/names.json    # record the names of a checkout

names.json was recorded before the code was restructured. A new flag or setting is added to it by hand; a name that
disappears breaks somebody's command.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

PROGRAMS = ("convert_ckpt.py", "convert_ckpt_v2.py", "evaluation.py", "inference.py", "posttrain_gpt.py",
            "preprocess_data.py", "pretrain_gpt.py", "train_grpo.py", "train_ppo.py",
            "examples/fusionone/training_task.py")  # fmt: skip
MODULES = ("minimind_mcore.models.presets", "minimind_mcore.models.recipes", "minimind_mcore.preprocess.corpus",
           "minimind_mcore.preprocess.train_tokenizer", "minimind_mcore.rl.models")  # fmt: skip
COMMANDS = ("doctor", "manager", "plan", "rl")  # of minimind-mcore

# Runs programs with --help, one after another, and prints the flags of the parsers that they call.
LIST_FLAGS = """
import argparse, contextlib, io, json, runpy, sys

found = {}
parse = argparse.ArgumentParser.parse_known_args

def flags(parser, command):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                flags(inner, f"{command} {name}")
        else:
            found.setdefault(command, set()).update(action.option_strings or [action.dest])

def listing(parser, *rest, **named):
    flags(parser, command)
    return parse(parser, *rest, **named)

argparse.ArgumentParser.parse_known_args = listing
for command in sys.argv[1:]:
    sys.argv = [command.split()[0], *command.split()[1:], "--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
        run(sys.argv[0], run_name="__main__")
print(json.dumps({command: sorted(names) for command, names in sorted(found.items())}))
"""


def flags(checkout: Path) -> dict[str, list[str]]:
    """Return the flags of every program, module and command of a checkout."""
    commands = [*PROGRAMS, *MODULES, *(f"minimind_mcore.cli {name}" for name in COMMANDS)]
    done = subprocess.run(
        [sys.executable, "-c", LIST_FLAGS, *commands], cwd=checkout, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(checkout), "DEVICE": "cpu"},
    )  # fmt: skip
    return dict(json.loads(done.stdout.splitlines()[-1]))


def documented(script: Path) -> set[str]:
    """Return the settings that the comment at the top of a script lists, as in "#   NAME NAME   meaning"."""
    names: set[str] = set()
    for line in script.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            break
        if found := re.match(r"# {1,3}([A-Z][A-Z0-9_]*(?: [A-Z][A-Z0-9_]*)*)(?: {2,}|\(|$| \.\.\. )", line):
            names.update(found[1].split())
    return names


def read(script: Path) -> set[str]:
    """Return the variables that a script allows to be unset, as in ${NAME:-default}: those it does not set itself."""
    text = re.sub(r"^\s*#.*$", "", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    own = {name for name, value in re.findall(r"^([A-Z][A-Z0-9_]*)=(.*)$", text, re.MULTILINE) if name not in value}
    for line in re.findall(r'^(?:[A-Z][A-Z0-9_]*="" ?)+$', text, re.MULTILINE):  # several on a line, empty at first
        own |= set(re.findall(r"\w+(?==)", line))
    return set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):?[-+]", text)) - own


SETTING = re.compile(r"[A-Z][A-Z0-9_]*( --[a-z-]+)?")
READERS = {"env", "count", "path", "flags", "path_flags", "choice"}  # of minimind_mcore/cli/settings.py


def read_by_commands(checkout: Path) -> set[str]:
    """Return the settings that the commands read: words that the functions of cli/settings.py are called with.

    LOG_LEVEL is read below the commands, in log.py.
    """
    log = checkout / "minimind_mcore/log.py"
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    names = set(re.findall('^SETTING = "(.*)"', text, re.MULTILINE))
    folders = (checkout / "minimind_mcore/cli", checkout / "minimind_mcore/pipeline")
    for file in (file for folder in folders for file in folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in READERS:
                words = [str(word.value) for word in node.args if isinstance(word, ast.Constant)]
                words = words if node.func.id in ("flags", "path_flags") else words[:1]
                names |= {word.split()[0] for word in words if SETTING.fullmatch(word)}
            elif isinstance(node, ast.Dict | ast.Tuple):  # tables of settings
                row = node.keys if isinstance(node, ast.Dict) else node.elts
                words = [str(word.value) for word in row if isinstance(word, ast.Constant)]
                if words and all(map(SETTING.fullmatch, words)):
                    names |= {word.split()[0] for word in words}
    return names


def record(checkout: Path) -> dict[str, dict[str, list[str]]]:
    """Return the names of a checkout: flags by command, documented settings by script, settings that scripts read."""
    scripts = sorted(file for name in ("examples", "requirements") for file in (checkout / name).rglob("*.sh"))
    found = {script.relative_to(checkout).as_posix(): sorted(documented(script)) for script in scripts}
    return {
        "flags": flags(checkout),
        "documented settings": {script: names for script, names in found.items() if names},
        "settings": {"read": sorted(set().union(*map(read, scripts), read_by_commands(checkout)))},
    }


def wrapped(names: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, list[str]]]:
    """Return the same record with lines of several names each, so that the file has few lines."""
    return {
        kind: {place: textwrap.wrap(" ".join(words), 110, break_on_hyphens=False) for place, words in places.items()}
        for kind, places in names.items()
    }


if __name__ == "__main__":
    print(json.dumps(wrapped(record(Path(sys.argv[1]).resolve())), indent=1))

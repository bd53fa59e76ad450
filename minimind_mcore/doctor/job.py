"""One script's job: its own dry run, and the paths on the command line that this prints."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.doctor.finding import Finding, fail, ok
from minimind_mcore.doctor.installed import Host
from minimind_mcore.errors import UserError

DATASET = ("{}.idx", "{}_packed_input_ids_document.idx", "{}_packed_chosen_input_ids_document.idx")
PROGRAM = re.compile(r"(^|/)(pretrain_gpt|posttrain_gpt|inference|evaluation|preprocess_data|convert_ckpt_v2)\.py$")


def require(script: str) -> None:
    """That there is such a script.

    Raises:
        UserError: there is none.
    """
    if not Path(script).is_file():
        raise UserError(
            f"{script}: no such script; expected one such as examples/mcore/minimind/pretrain_minimind_ptd.sh"
        )


def check(host: Host, script: str, arguments: Sequence[str]) -> list[Finding]:
    """Run a script with `--dry-run` in this environment, and check what it would use."""
    done = subprocess.run(
        ["bash", script, *arguments, *([] if "--dry-run" in arguments else ["--dry-run"])],
        env=dict(host.environ),
        capture_output=True,
        text=True,
    )
    name = Path(script).name
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        start = next((n for n, line in enumerate(said) if line.startswith("error:")), max(0, len(said) - 3))
        return [fail(name, "\n".join(said[start:]).removeprefix("error: ") or f"exit status {done.returncode}")]
    words = command(done.stdout)
    found = paths(words, pending(done.stdout))
    return found or [ok(name, "its dry run finds nothing wrong")]


def command(printed: str) -> list[str]:
    """The last command line of one of the programs that a dry run has printed, from the program on."""
    for line in reversed(printed.splitlines()):
        try:
            words = shlex.split(line)
        except ValueError:
            continue
        at = next((n for n, word in enumerate(words) if PROGRAM.search(word)), None)
        if at is not None and len(words) > at + 1:
            return words[at:]
    return []


def pending(printed: str) -> list[str]:
    """What the commands that a dry run shows before that one (`+ python ... --output PATH`) would make."""
    shown = (line for line in printed.splitlines() if line.startswith("+ "))
    return [path for line in shown for path in values(shlex.split(line), "--output")]


def values(words: Sequence[str], flag: str) -> list[str]:
    """The values of a flag's last occurrence."""
    found: list[str] = []
    for n, word in enumerate(words):
        if word == flag:
            rest = words[n + 1 :]
            end = next((k for k, value in enumerate(rest) if value.startswith("--")), len(rest))
            found = list(rest[:end])
        elif word.startswith(flag + "="):
            found = [word.partition("=")[2]]
    return found


def paths(words: Sequence[str], made: Sequence[str] = ()) -> list[Finding]:
    """Whether what a command line names is there, or is `made` before. The dry run itself has looked at checkpoints."""
    found = [
        _dataset(prefix) for prefix in values(words, "--data-path") if not re.fullmatch(r"[\d.]+(e-?\d+)?", prefix)
    ]
    for path in values(words, "--tokenizer-name-or-path"):
        found.append(ok("tokenizer", f"{path}, made first") if path in made else _tokenizer(Path(path)))
    for path in values(words, "--prompt-type-path"):
        if not Path(path).is_file():
            found.append(fail("templates", f"--prompt-type-path {path}: no such file", "configs/templates.json"))
    for path in values(words, "--save"):
        found.append(_writable(Path(path)))
    return found


def _dataset(prefix: str) -> Finding:
    index = next((name for form in DATASET if Path(name := form.format(prefix)).is_file()), None)
    if index is None:
        return fail(
            "data",
            f"--data-path {prefix}: no {prefix}.idx, nor one of instructions or pairs",
            "bash examples/mcore/minimind/data_convert_minimind_pretrain.sh    # or _instruction, _pairwise",
        )
    binary = Path(index).with_suffix(".bin")
    if not binary.is_file() or binary.stat().st_size == 0:
        return fail("data", f"{binary} is missing or empty beside {Path(index).name}", "convert the data again")
    return ok("data", f"{prefix} ({binary.stat().st_size / 2**20:.1f} MiB of tokens)")


def _tokenizer(path: Path) -> Finding:
    file = path if path.is_file() else path / "tokenizer.json"
    if not file.is_file():
        return fail("tokenizer", f"{path} has no tokenizer.json", "export TOKENIZER_PATH=the directory of MiniMind's")
    return ok("tokenizer", str(path))


def _writable(path: Path) -> Finding:
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return fail("output", f"--save {path}: cannot write to {existing}", "export CKPT_SAVE_DIR=somewhere else")
    return ok("output", f"checkpoints go to {path}")

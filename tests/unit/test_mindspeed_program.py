"""MindSpeed-LLM's programs end with a status that says whether they failed, though Megatron gives up with status 0."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import ROOT

# A program of MindSpeed-LLM's: its second argument calls a function of the module that the first one names.
PROGRAM = """\
import importlib, sys
assert __name__ == "__main__" and sys.argv[0] == "pretrain_gpt.py"
importlib.import_module(sys.argv[1]).give_up(eval(sys.argv[2]))
print("trained")
"""
GIVE_UP = """\
import sys
def give_up(status):
    if status != "no":
        print("the reason")
        exit() if status == "exit" else sys.exit(status)
"""
CASES = {
    "a checkpoint that cannot be loaded": ("checkpointing", "None", 1),
    "the same, with a number": ("checkpointing", "0", 1),
    "flags, by another exit": ("arguments", "'exit'", 1),
    "autoresume": ("global_vars", "None", 1),
    "a status of its own": ("checkpointing", "3", 3),
    "--exit-interval": ("training", "0", 0),
    "MindSpeed-LLM's --exit-interval": ("training", "None", 0),
    "the end": ("training", "'no'", 0),
}


@pytest.mark.parametrize("case", CASES)
def test_giving_up_is_no_success(case: str, tmp_path: Path) -> None:
    module, status, expected = CASES[case]
    training = tmp_path / "megatron/training"
    training.mkdir(parents=True)
    (training / f"{module}.py").write_text(GIVE_UP)
    (tmp_path / "pretrain_gpt.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "minimind_mcore.mindspeed.program", "pretrain_gpt.py"]
    done = subprocess.run(
        [*command, f"megatron.training.{module}", status], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == expected, done.stderr
    assert ("nothing was trained" in done.stderr) == (expected == 1)
    assert done.stdout == ("trained\n" if case == "the end" else "the reason\n")

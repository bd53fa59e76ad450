"""The measures of a change to the code: lines of code, and records of what two checkouts train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.engine import ROOT

COUNT, COMPARE = ROOT / "benchmarks/count_lines.py", ROOT / "benchmarks/same_results.py"
PYTHON_FILE = '''"""A docstring
of two lines."""

import os  # counts


def f(
    a: int,
) -> str:
    """Not counted."""
    # nor this
    return """a string
    counts on both lines"""
'''


def test_lines_of_code_are_those_with_more_than_a_comment_or_docstring(tmp_path: Path) -> None:
    files = {
        "kit/a.py": PYTHON_FILE,  # 6 lines
        "b.py": "x = 1\n",
        "tests/c.py": "x = 1\n",
        "benchmarks/d.py": "x = 1\n",
        "examples/e.sh": "#!/bin/bash\n\n# all three lines count\n",
        "docker/f.sh": "echo\n",
        "untracked.py": "x = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "linked").symlink_to("kit")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    subprocess.run(["git", "rm", "-q", "--cached", "untracked.py"], cwd=tmp_path, check=True)
    done = subprocess.run([sys.executable, COUNT, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1].split()[:3] == ["7", "3", "10"]


def trained(loss: float = 2.5, weights: str = "ab", rows: int = 2) -> dict[str, Any]:
    """A record of one run."""
    steps = [{"iteration": step + 1, "lm_loss": loss} for step in range(rows)]
    return {"commit": "c", "data": "d", "runs": {"minimind3_tiny tp1": {"steps": steps, "weights": weights}}}


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (trained(), "equal: 1 runs"),
        (trained(loss=2.5000000000000004), "minimind3_tiny tp1: lm_loss of "),
        (trained(weights="cd"), "minimind3_tiny tp1: the weights of the final checkpoint differ"),
        (trained(rows=1), "minimind3_tiny tp1: 2 and 1 rows"),
        (trained() | {"runs": {}}, "minimind3_tiny tp1: only in the first record"),
        (trained() | {"data": "e"}, "the tokenizer or dataset files differ"),
    ],
)
def test_records_are_compared_to_the_last_bit(after: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name, record in (("before.json", trained()), ("after.json", after)):
        (tmp_path / name).write_text(json.dumps(record))
    command = [sys.executable, COMPARE, "compare", tmp_path / "before.json", tmp_path / "after.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert message in done.stdout, done.stderr
    assert done.returncode == (0 if message.startswith("equal") else 1)

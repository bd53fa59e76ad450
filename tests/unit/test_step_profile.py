"""The profile of a training step: its phases, its largest loss and its flame graph."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from step_profile import Entry, largest_loss, totals, write_flame_graph

ENTRIES = [
    Entry(("forward", "aten::linear", "aten::mm"), 0.3),
    Entry(("backward", "aten::mm"), 0.3),
    Entry(("forward", "aten::silu"), 0.05),
    Entry(("backward", "aten::silu"), 0.06),
]


@pytest.mark.parametrize(
    ("step", "ideal", "expected"),
    [
        (0.72, 0.55, ("aten::silu", 0.11)),
        (0.72, 0.4, ("matrix products below the rate", 0.2)),
        (1.2, 0.55, ("time in which no operator runs", 0.49)),
    ],
)
def test_the_largest_loss(step: float, ideal: float, expected: tuple[str, float]) -> None:
    assert largest_loss(ENTRIES, step, ideal) == (expected[0], pytest.approx(expected[1]))


def test_totals_and_flame_graph(tmp_path: Path) -> None:
    assert dict(totals(ENTRIES, lambda entry: entry.phase)) == {
        "forward": pytest.approx(0.35),
        "backward": pytest.approx(0.36),
    }
    write_flame_graph([*ENTRIES, ENTRIES[0]], tmp_path / "new" / "stacks")
    lines = (tmp_path / "new" / "stacks").read_text().splitlines()
    assert lines[0] == "forward;aten::linear;aten::mm 600000" and len(lines) == 4


def test_a_step_of_two_ranks(tmp_path: Path) -> None:
    """Every phase has time, and the stacks hold as much of it as the table."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "benchmarks/step_profile.py"), "--model", "minimind3_tiny", "--seq", "32", "--dtype", "bf16"]
    command += ["--steps", "1", "--output", str(tmp_path / "stacks"), "--", "--tensor-model-parallel-size", "2"]
    environment = os.environ | {"DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = dict(re.findall(r"^([a-z ]+?) +([\d.]+) +[\d.]+%$", done.stdout, re.MULTILINE))
    assert {"data", "forward", "backward", "gradient reduction", "optimizer"} <= set(table)
    assert re.search(r"^[\d.]+% of the rate of matrix products", done.stdout, re.MULTILINE)
    assert re.search(r"^largest loss: .+, [\d.]+ ms, [\d.]+% of a step$", done.stdout, re.MULTILINE)
    stacks = [line.rsplit(" ", 1) for line in (tmp_path / "stacks").read_text().splitlines()]
    for phase in ("forward", "backward", "optimizer"):
        found = sum(int(time) for stack, time in stacks if stack.split(";")[0] == phase)
        assert found / 1e3 == pytest.approx(float(table[phase]), rel=0.1, abs=0.3)

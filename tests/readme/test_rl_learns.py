"""The README's reinforcement learning in full: a model of a careless teacher learns to carry from the reward alone."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_accuracy_on_unseen_sums_rises_by_twenty_points(tmp_path: Path) -> None:
    gains = []
    for seed in (1, 2, 3):
        out = tmp_path / str(seed)
        overrides = [f"megatron_training.seed={seed}", f"minimind.output_dir={out}", f"actor_config.save={out}/save"]
        done = subprocess.run(
            ["bash", str(ROOT / "examples/rlxf/grpo_minimind_single.sh"), *overrides],
            env={**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu"},
            capture_output=True,
            text=True,
            timeout=3600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        print(*done.stdout.splitlines()[-2:], sep="\n")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
        assert f"{accuracies[0]:.1%} before, {accuracies[-1]:.1%} after" in done.stdout
        assert (out / "reward.png").is_file()
        gains.append(accuracies[-1] - accuracies[0])
    assert statistics.median(gains) >= 0.2, gains

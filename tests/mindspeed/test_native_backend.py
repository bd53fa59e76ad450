"""BACKEND=native under MindSpeed's patches logs and evaluates what it does without them, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import rehearsal
from helpers.engine import read_rows, worst_difference
from helpers.rehearsal import Inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_two_data_parallel_ranks_log_the_mean_of_both(inputs: Inputs, tmp_path: Path) -> None:
    environment = rehearsal.SETTINGS | inputs.environment | {"TP": "1", "NPUS_PER_NODE": "2", "BACKEND": "native"}
    environment |= {"MODEL": str(inputs.model("minimind3")), "DATA_PATH": str(inputs.folder / "text.jsonl")}
    environment |= {"SPLIT": "80,20,0", "EVAL_ITERS": "1", "EVAL_INTERVAL": "5", "MBS": "1"}
    found = {}
    for name, rehearse in (("mindspeed", True), ("plain", False)):
        folder = tmp_path / name
        result = rehearsal.run_script("pretrain", rehearse=rehearse, **environment, OUTPUT_DIR=str(folder))
        assert "DP=2 on 2 processes" in result.output
        assert ("npu: " in result.output) == rehearse
        found[name] = read_rows(folder)
    for column, count in (("lm_loss", 10), ("validation_loss", 2)):
        values = {name: [row[column] for row in rows if column in row] for name, rows in found.items()}
        assert len(values["plain"]) == count
        assert worst_difference(values["mindspeed"], values["plain"]) < 1e-5
    for rows in found.values():  # 4 sequences of 64 tokens in a step
        steps = [row for row in rows if "lm_loss" in row]
        tokens = [row["tokens_per_second"] * row["seconds_per_iteration"] for row in steps]
        assert tokens == pytest.approx([256] * 10, rel=1e-3)


def test_packed_fine_tuning_is_that_without_mindspeed(
    inputs: Inputs, weights: Callable[..., Path], tmp_path: Path
) -> None:
    """MindSpeed's patches for --reset-attention-mask would look for the batches of MindSpeed-LLM."""
    environment = rehearsal.SETTINGS | inputs.environment | rehearsal.layout() | {"BACKEND": "native", "PACK": "1"}
    environment |= {"MODEL": str(inputs.model("minimind3")), "DATA_PATH": str(inputs.folder / "chats.jsonl")}
    environment |= {"SEQ_LENGTH": "128", "CKPT_LOAD_DIR": str(weights("minimind3")), "MBS": "1"}
    losses = {}
    for name, rehearse in (("mindspeed", True), ("plain", False)):
        folder = tmp_path / name
        rehearsal.run_script("tune_minimind_full_ptd.sh", rehearse=rehearse, **environment, OUTPUT_DIR=str(folder))
        losses[name] = [row["lm_loss"] for row in read_rows(folder) if "lm_loss" in row]
    assert len(losses["plain"]) == 10
    assert worst_difference(losses["mindspeed"], losses["plain"]) < 1e-5

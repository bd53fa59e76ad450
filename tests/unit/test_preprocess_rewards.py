"""Data of process reward models has the bytes that MindSpeed-LLM 2.2.0 writes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess import main as preprocess
from minimind_mcore.preprocess.indexed import Column

STEP = "<|buffer1|>"
ROWS = [
    {"input": f"Step 1: 1+1=2 {STEP}\nStep 2: 2*3=6 {STEP}\nStep 3: 7 {STEP}", "value": ["+", "+", "-"]},
    {"input": f"Janet has 3 apples. 光合 {STEP} done {STEP}", "value": ["-", "+"]},
    {"input": f"one step: x^2 {STEP}", "value": ["+"]},
]
# SHA-256 of the files that AlpacaStyleProcessRewardHandler of MindSpeed-LLM 2.2.0 wrote of these rows, with MiniMind's
# tokenizer, --seq-length 4096 --placeholder-token '<|buffer1|>' --reward-tokens + -
RECORDED = {
    "attention_mask": "87db35fa63fc12c899ee2f8a8e102433c81946d5aa789a24f1afdcc6eab514e1",
    "input_ids": "51fb7af92714f3810ff134e1f429de22acf2366903a3cf7da2d3092e343f9fe2",
    "labels": "9ceafbf1a63eb6d07f1d622bd9cb741ffdceb91042a05953b53b9cb5f3374ec0",
}
INDEX = "276b757ec41dd6c11c4d594d946f03e43af8e71ddacf7f49b2e1c5b4d07cd2c3"
PLUS, MINUS = 46, 48


def convert(folder: Path, tokenizer: str, rows: list[dict[str, object]], *flags: str) -> str:
    file, prefix = folder / "steps.jsonl", folder / "steps"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    words = ["--input", str(file), "--output-prefix", str(prefix), "--tokenizer-name-or-path", tokenizer]
    words += ["--handler-name", "AlpacaStyleProcessRewardHandler", "--seq-length", "4096"]
    preprocess.main([*words, "--placeholder-token", STEP, "--reward-tokens", "+", "-", *flags])
    return str(prefix)


def test_the_files_are_those_of_mindspeed_llm(tmp_path: Path, tokenizer: str) -> None:
    prefix = convert(tmp_path, tokenizer, [dict(row) for row in ROWS])
    for key, digest in RECORDED.items():
        name = f"{prefix}_packed_{key}_document"
        assert hashlib.sha256(Path(f"{name}.bin").read_bytes()).hexdigest() == digest
        assert hashlib.sha256(Path(f"{name}.idx").read_bytes()).hexdigest() == INDEX
    labels = [Column(f"{prefix}_packed_labels_document")[number] for number in range(3)]
    assert [[int(label) for label in row if label != -100] for row in labels] == [
        [PLUS, PLUS, MINUS],
        [MINUS, PLUS],
        [PLUS],
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input": f"a {STEP}", "value": ["+", "-"]}, "it has 1 placeholders and 2 rewards"),
        ({"input": f"a {STEP}", "value": ["good"]}, "the reward 'good' is not in --reward-tokens + -"),
        ({"input": f"a {STEP}", "value": "+"}, "field 'value' is not a list of texts"),
        ({"value": ["+"]}, "field 'input' is missing"),
    ],
)
def test_rows_without_a_reward_for_each_step_are_rejected(
    row: dict[str, object], reason: str, tmp_path: Path, tokenizer: str
) -> None:
    """MindSpeed-LLM drops rewards that are too many, and ends with an IndexError if they are too few."""
    with pytest.raises(UserError):
        convert(tmp_path, tokenizer, [row])
    assert reason in (tmp_path / "steps.rejects.jsonl").read_text(encoding="utf-8")

"""Data of preference and reward models has the bytes that MindSpeed-LLM 2.2.0 and 26.1.0 write.

The bytes are recorded here. Where MINDSPEED_LLM_220_HOME or MINDSPEED_LLM_HOME names the sources of MindSpeed-LLM 2.2.0
or 26.1.0, their own preprocess_data.py also runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import ROOT

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

TURNS = [
    {"from": "human", "value": "你好，你会什么？"},
    {"from": "gpt", "value": "I answer."},
    {"from": "human", "value": "2+3?"},
]
PAIRS: dict[str, list[dict[str, object]]] = {
    "AlpacaStylePairwiseHandler": [
        {"instruction": "Add.", "input": "2+3", "chosen": "5", "rejected": "It is 6.", "system": ""},
        {"instruction": "光合作用是什么？", "input": "", "chosen": "植物 makes sugar 🌱", "rejected": "no",
         "system": "Be brief."},
    ],
    "SharegptStylePairwiseHandler": [
        {"conversations": TURNS, "chosen": {"from": "gpt", "value": "5"}, "rejected": {"from": "gpt", "value": "6 🌱"}},
    ],
}  # fmt: skip
# MindSpeed-LLM reads no system field unless it is named.
SYSTEM = {"prompt": "instruction", "query": "input", "system": "system", "chosen": "chosen", "rejected": "rejected"}
COLUMNS = [f"{side}_{kind}" for side in ("chosen", "rejected") for kind in ("input_ids", "labels")]
# SHA-256 over the files of the four columns, of each handler and template. MindSpeed-LLM 2.2.0 has no qwen3 for pairs:
# its ReasoningTemplate._encode() raises a TypeError, which 2.3.0 repaired.
RECORDED_PAIRS = {
    ("AlpacaStylePairwiseHandler", "qwen3"): "3ddd99267ba0c99a6cd474e653bb9c972f8c984c205143e861b4e74a5c88329a",
    ("AlpacaStylePairwiseHandler", "chatml"): "5a082daddd1c3521af4ac756b8f710bd6bdd558b512edaadbf97683ac407aabe",
    ("AlpacaStylePairwiseHandler", "chatml_de"): "fb8834d5df843024a007c56ebf25dd5240e606708fae571f373d27aa7ccddc33",
    ("AlpacaStylePairwiseHandler", "qwen_r1"): "b82f9423cd7a49ced0c9a3c8ec63f0f85fefa1daabe642ec5987e121056dfb38",
    ("SharegptStylePairwiseHandler", "qwen3"): "36fcf163f7459c6c1dc451a812759ad255b7450e12ffd660f7130c662ffb933b",
    ("SharegptStylePairwiseHandler", "chatml"): "9bfefa2dbf8cd1ad0a56985affc7aeb73033ea5e8516f516c8e6ec130ccd9ae1",
    ("SharegptStylePairwiseHandler", "chatml_de"): "fe93b96ac74fb0ca240e1dac104ca1e4d63e319577656edda9b962b5a8522b4d",
    ("SharegptStylePairwiseHandler", "qwen_r1"): "514a1f131e80b577b96b45c8615cd0958d45224fba8ac41df14b5c19cbab4dd3",
}
HOMES = {"2.2.0": "MINDSPEED_LLM_220_HOME", "26.1.0": "MINDSPEED_LLM_HOME"}


@pytest.fixture
def published() -> str:
    """MiniMind's tokenizer, with which the bytes were recorded."""
    root = os.environ.get("MINIMIND_TOKENIZER_DIR")
    if not root:
        pytest.skip("MINIMIND_TOKENIZER_DIR is not set: MiniMind's published tokenizers are not shipped here")
    return str(Path(root) / "v3")


def convert(folder: Path, tokenizer: str, rows: list[dict[str, object]], *flags: str) -> str:
    file, prefix = folder / "steps.jsonl", folder / "steps"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    words = ["--input", str(file), "--output-prefix", str(prefix), "--tokenizer-name-or-path", tokenizer]
    words += ["--handler-name", "AlpacaStyleProcessRewardHandler", "--seq-length", "4096"]
    preprocess.main([*words, "--placeholder-token", STEP, "--reward-tokens", "+", "-", *flags])
    return str(prefix)


def flags_of_pairs(folder: Path, tokenizer: str, handler: str, template: str) -> list[str]:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PAIRS[handler]), encoding="utf-8")
    words = ["--input", str(file), "--tokenizer-name-or-path", tokenizer, "--handler-name", handler]
    words += ["--prompt-type", template, "--prompt-type-path", str(ROOT / "configs/templates.json")]
    words += ["--enable-thinking", "true"] if template == "qwen3" else []
    words += ["--map-keys", json.dumps(SYSTEM)] if handler.startswith("Alpaca") else []
    return [*words, "--seq-length", "512", "--output-prefix"]


def contents(prefix: Path) -> dict[str, bytes]:
    files = {file.name.removeprefix(prefix.name): file.read_bytes() for file in prefix.parent.glob("*_document.[bi]*")}
    return dict(sorted(files.items()))


def run_theirs(version: str, flags: list[str], folder: Path) -> dict[str, bytes]:
    """Run the preprocess_data.py of MindSpeed-LLM. Skip if its sources are not given."""
    pytest.importorskip("datasets")
    home = os.environ.get(HOMES[version], "")
    if not Path(home, "mindspeed_llm/tasks/preprocess/data_handler.py").is_file():
        pytest.skip(f"{HOMES[version]} is not a checkout of MindSpeed-LLM {version}")
    process_rewards = "AlpacaStyleProcessRewardHandler" in Path(home, "preprocess_data.py").read_text(encoding="utf-8")
    assert process_rewards == (version == "2.2.0"), f"{HOMES[version]}={home} is another version than {version}"
    folder.mkdir()
    command = [sys.executable, "-m", "helpers.upstream_preprocess", home, *flags, str(folder / "x")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    command += ["--cache-dir", str(folder / "cache")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return contents(folder / "x")


@pytest.mark.parametrize("template", ["qwen3", "chatml", "chatml_de", "qwen_r1"])
@pytest.mark.parametrize("handler", PAIRS)
def test_pairs_are_those_of_mindspeed_llm(handler: str, template: str, tmp_path: Path, published: str) -> None:
    (tmp_path / "ours").mkdir()
    preprocess.main([*flags_of_pairs(tmp_path, published, handler, template), str(tmp_path / "ours/x")])
    found = contents(tmp_path / "ours/x")
    assert list(found) == sorted(f"_packed_{name}_document.{kind}" for name in COLUMNS for kind in ("bin", "idx"))
    assert hashlib.sha256(b"".join(found.values())).hexdigest() == RECORDED_PAIRS[handler, template]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "template"),
    [("2.2.0", "chatml"), ("2.2.0", "chatml_de"), ("2.2.0", "qwen_r1"), ("26.1.0", "qwen3"), ("26.1.0", "chatml")],
)
@pytest.mark.parametrize("handler", PAIRS)
def test_mindspeed_llm_s_own_code_writes_these_pairs(
    version: str, template: str, handler: str, tmp_path: Path, published: str
) -> None:
    flags = flags_of_pairs(tmp_path, published, handler, template)
    theirs = run_theirs(version, flags, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    preprocess.main([*flags, str(tmp_path / "ours/x")])
    assert len(theirs) == 2 * len(COLUMNS) and theirs == contents(tmp_path / "ours/x")
    assert hashlib.sha256(b"".join(theirs.values())).hexdigest() == RECORDED_PAIRS[handler, template]


@pytest.mark.slow
def test_mindspeed_llm_s_own_code_writes_these_process_rewards(tmp_path: Path, published: str) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    words = ["--input", str(file), "--tokenizer-name-or-path", published, "--placeholder-token", STEP]
    words += ["--handler-name", "AlpacaStyleProcessRewardHandler", "--seq-length", "4096", "--reward-tokens", "+", "-"]
    theirs = run_theirs("2.2.0", [*words, "--output-prefix"], tmp_path / "theirs")
    assert len(theirs) == 2 * len(RECORDED)
    for key, digest in RECORDED.items():
        assert hashlib.sha256(theirs[f"_packed_{key}_document.bin"]).hexdigest() == digest
        assert hashlib.sha256(theirs[f"_packed_{key}_document.idx"]).hexdigest() == INDEX


def test_the_files_are_those_of_mindspeed_llm(tmp_path: Path, published: str) -> None:
    prefix = convert(tmp_path, published, [dict(row) for row in ROWS])
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

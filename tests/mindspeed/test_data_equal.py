"""The data files that the kit writes are those of MindSpeed-LLM's preprocess_data.py, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import rehearsal
from helpers.rehearsal import Inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_pretraining_text(inputs: Inputs, tmp_path: Path) -> None:
    flags = ["--handler-name", "GeneralPretrainHandler", "--json-keys", "text", "--append-eod"]
    # Theirs has no way to put bos before a text, so it is left out here.
    assert compare(inputs, "text.jsonl", flags, tmp_path) == {"text_document.bin", "text_document.idx"}


def test_conversations(inputs: Inputs, tmp_path: Path) -> None:
    flags = ["--handler-name", "SharegptStyleInstructionHandler", "--prompt-type", "qwen3", "--enable-thinking", "true"]
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    tags = json.dumps({"messages": "conversations", "tags": roles})
    files = compare(inputs, "chats.jsonl", [*flags, "--map-keys", tags], tmp_path)
    columns = ("input_ids", "attention_mask", "labels")
    assert files == {f"packed_{name}_document.{kind}" for name in columns for kind in ("bin", "idx")}


TURNS = [
    {"from": "human", "value": "你好，你会什么？"},
    {"from": "gpt", "value": "I answer."},
    {"from": "human", "value": "2+3?"},
]
PAIRS = {
    "AlpacaStylePairwiseHandler": [
        {"instruction": "Add.", "input": "2+3", "chosen": "5", "rejected": "It is 6."},
        {
            "instruction": "光合作用是什么？",
            "input": "",
            "chosen": "植物 makes sugar 🌱",
            "rejected": "no",
            "system": "Be brief.",
        },
    ],
    "SharegptStylePairwiseHandler": [
        {"conversations": TURNS, "chosen": {"from": "gpt", "value": "5"}, "rejected": {"from": "gpt", "value": "6 🌱"}},
    ],
}


@pytest.mark.parametrize("handler", PAIRS)
def test_pairs(handler: str, inputs: Inputs, tmp_path: Path) -> None:
    """Of DPO and of outcome reward models."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PAIRS[handler]), encoding="utf-8")
    flags = ["--handler-name", handler, "--prompt-type", "qwen3", "--enable-thinking", "true", "--seq-length", "512"]
    if handler.startswith("Alpaca"):  # theirs reads no system field unless it is named
        keys = {
            "prompt": "instruction",
            "query": "input",
            "system": "system",
            "chosen": "chosen",
            "rejected": "rejected",
        }
        flags += ["--map-keys", json.dumps(keys)]
    files = compare(inputs, str(file), flags, tmp_path)
    columns = [f"{side}_{kind}" for side in ("chosen", "rejected") for kind in ("input_ids", "labels")]
    assert files == {f"packed_{name}_document.{kind}" for name in columns for kind in ("bin", "idx")}


def compare(inputs: Inputs, source: str, flags: list[str], folder: Path) -> set[str]:
    """Convert a file with both programs; the names, without the prefix, of the files that are equal."""
    words = ["--input", str(inputs.folder / source), "--tokenizer-type", "PretrainedFromHF", *flags]
    words += ["--tokenizer-name-or-path", str(inputs.tokenizer), "--workers", "1"]
    contents = []
    for name, home in (("theirs", rehearsal.home("MINDSPEED_LLM_HOME")), ("ours", rehearsal.ROOT)):
        prefix = folder / name / "x"
        prefix.parent.mkdir()
        cache = ["--cache-dir", str(folder / "cache")] if name == "theirs" else []
        rehearsal.run_program(home / "preprocess_data.py", *words, "--output-prefix", str(prefix), *cache)
        files = [file for file in prefix.parent.iterdir() if file.suffix in (".bin", ".idx")]
        contents.append({file.name.removeprefix("x_"): file.read_bytes() for file in files})
    assert contents[0] == contents[1]
    return set(contents[0])

"""The sample corpus, and the path from nothing to a dataset that the shell script takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minimind_mcore.preprocess.check import check_dataset
from minimind_mcore.preprocess.corpus import build, problems
from minimind_mcore.preprocess.tokenize import tokenizer_info

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "mcore" / "minimind" / "data_convert_minimind_pretrain.sh"


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return build(42)


def test_corpus_is_a_few_megabytes_of_both_languages(corpus: list[str]) -> None:
    size = sum(len(text.encode("utf-8")) for text in corpus)
    assert 3e6 < size < 6e6
    chinese = [text for text in corpus if any("\u4e00" <= char <= "\u9fff" for char in text)]
    assert len(corpus) / 5 < len(chinese) < len(corpus) / 2
    assert any("iterable" in text for text in corpus)


def test_problems_are_decided_by_the_seed() -> None:
    assert problems(42, 50_000) == problems(42, 50_000) != problems(43, 50_000)


def test_the_arithmetic_is_right() -> None:
    """Every equation in the generated problems holds."""
    checked = 0
    for text in problems(1, 200_000):
        for left, sign, right, result in re.findall(r"(\d+) ?([-+×÷/]) ?(\d+) ?= ?(\d+)", text):
            a, b, c = int(left), int(right), int(result)
            assert c == {"+": a + b, "-": a - b, "×": a * b, "÷": a // b, "/": a // b}[sign], text
            checked += 1
        for heads, feet, x in re.findall(r"4x ?\+ ?2\((\d+) ?- ?x\) ?= ?(\d+).*?x ?= ?(\d+)", text):
            assert 4 * int(x) + 2 * (int(heads) - int(x)) == int(feet)
            checked += 1
    assert checked > 1000


def run_script(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "DATA_DIR": str(tmp_path / "data"), **environment},
        timeout=120,
        check=False,
    )


def test_the_script_makes_the_sample_dataset_once(corpus: list[str], tmp_path: Path) -> None:
    first = run_script(tmp_path)
    assert first.returncode == 0, first.stderr
    lines = (tmp_path / "data" / "sample.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == corpus  # another process, the same texts
    prefix = first.stdout.strip()
    assert check_dataset(prefix, tokenizer_info(tmp_path / "data" / "tokenizer")) == []
    again = run_script(tmp_path)
    assert again.stdout == first.stdout and "up to date" in again.stderr


def test_the_script_takes_the_users_data_and_flags(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"content": "你好"}) + "\n")
    refused = run_script(tmp_path, DATA_PATH="mine.jsonl")
    assert refused.returncode == 1 and "TOKENIZER_PATH is not set" in refused.stderr
    tokenizer = tmp_path / "tk"
    tokenizer.mkdir()
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", "ä", "½", "ł", "å", "¥"])}
    content = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}
    content["pre_tokenizer"].update(add_prefix_space=False, trim_offsets=True, use_regex=True)
    (tokenizer / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], **content}))
    (tokenizer / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    settings = {"DATA_PATH": "mine.jsonl", "TOKENIZER_PATH": "tk", "OUTPUT_PREFIX": "out/x", "JSON_KEYS": "content"}
    done = run_script(tmp_path, "--dtype", "uint16", **settings)
    assert done.stdout.strip() == str(tmp_path / "out/x_content_document"), done.stderr
    tokens = (tmp_path / "out" / "x_content_document.bin").read_bytes()
    assert tokens == bytes([0, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 3, 0, 1, 0])
    assert check_dataset(tmp_path / "out" / "x_content_document") == []

"""The sample corpus, and the path from nothing to a dataset that the shell script takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess import corpus as corpus_program
from minimind_mcore.preprocess import main as preprocess
from minimind_mcore.preprocess import train_tokenizer
from minimind_mcore.preprocess.check import check_dataset
from minimind_mcore.preprocess.corpus import build, problems
from minimind_mcore.preprocess.dialogues import KEYS, dialogues, drills, held_out, preferences
from minimind_mcore.preprocess.handlers import find_handler
from minimind_mcore.preprocess.meta import read_meta
from minimind_mcore.preprocess.tokenize import tokenizer_info

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "examples" / "mcore" / "minimind"
SCRIPT = SCRIPTS / "data_convert_minimind_pretrain.sh"
CONFIGS = sorted((REPOSITORY / "configs" / "datasets").glob("*.yaml"))


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


def run_script(
    tmp_path: Path, *arguments: str, script: Path | str = SCRIPT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
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


# ------------------------------------------------------------------ dialogues


def answer_of(question: str, table: dict[str, str]) -> str | None:
    """What a program that reads the question answers; None for small talk."""
    table |= dict(re.findall(r"([A-Z]{2})=(\d+)", question))
    if total := re.match(r"(\d+)\+(\d+)(=\?|等于多少？)$", question):
        return str(int(total[1]) + int(total[2]))
    asked = re.search(r"(?:What is )?([A-Z]{2})(?:\?|是多少？)$", question)
    return table[asked[1]] if asked else None


def marked(conversation: list[dict[str, str]]) -> list[bool]:
    """Whether each answer is right."""
    table: dict[str, str] = {}
    answers = [answer_of(turn["content"], table) for turn in conversation[::2]]
    return [a is None or a == turn["content"] for a, turn in zip(answers, conversation[1::2], strict=True)]


def test_answers_are_right_and_both_languages_are_asked() -> None:
    records = dialogues(1, 3000)
    assert all(all(marked(record["conversations"])) for record in records)
    chinese = sum("是多少" in str(record) or "等于" in str(record) for record in records)
    assert 0.3 < chinese / 3000 < 0.7
    assert any(len(record["conversations"]) == 4 for record in records)
    assert records == dialogues(1, 3000) != dialogues(2, 3000)


def sums_in(text: str) -> set[str]:
    """a+b, in both orders."""
    found = re.findall(r"(\d+) ?\+ ?(\d+)", text)
    return {f"{a}+{b}" for a, b in found} | {f"{b}+{a}" for a, b in found}


def test_drills_are_right_and_of_both_kinds() -> None:
    texts = list(drills(1, 300))
    assert texts == list(drills(1, 300)) != list(drills(2, 300))
    sums = [line for text in texts for line in text.split("\n") if "+" in line]
    assert len(sums) > 500 and all(eval(line.replace("=", "==")) for line in sums)
    tables = [line for text in texts for line in text.split("\n") if "+" not in line]
    assert len(tables) > 100
    for table in tables:
        first, again = re.findall(r"[A-Z]{2}=\d+", re.split("[。.]", table)[0]), re.split("[。.]", table)[1]
        assert sorted(first) == sorted(re.findall(r"[A-Z]{2}=\d+", again)), table


def test_what_is_held_out_is_in_nothing_else() -> None:
    seen = str(dialogues(1)) + str(preferences(1)) + "\n".join(drills(1, 20_000))
    seen_keys, seen_sums = set(re.findall(r"[A-Z]{2}", seen)), sums_in(seen)
    questions = held_out(3)
    assert sums_in("\n".join(problems(1, 1_000_000))).isdisjoint(sums_in(str(questions)))
    assert seen_keys == set(KEYS[0]) and len(KEYS[1]) == 38
    for task, pattern, found in (("lookup", r"[A-Z]{2}", seen_keys), ("addition", r"\d+\+\d+", seen_sums)):
        asked = [record for record in questions if record["task"] == task]
        assert len(asked) == 200
        assert all(set(re.findall(pattern, str(record["conversations"]))).isdisjoint(found) for record in asked)
        assert all(record["conversations"][-1]["content"] == record["answer"] for record in asked)
        assert all(all(marked(record["conversations"])) for record in asked)


def test_of_a_pair_only_the_chosen_answer_is_right() -> None:
    for pair in preferences(1):
        assert all(marked(pair["chosen"])) and not marked(pair["rejected"])[-1]
        assert pair["chosen"][:-1] == pair["rejected"][:-1]


def test_only_dialogues_hold_something_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["corpus", "--kind", "dpo", "--output", str(tmp_path / "a"), "--held-out", str(tmp_path / "b")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="nothing to hold out"):
        corpus_program.main()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = str(tmp_path_factory.mktemp("tokenizer") / "tk")
    train_tokenizer.save(train_tokenizer.train(iter(["assistant user system 是多少 Table: " * 9]), 310), directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "output", "count"), [("instruction", "labels", 20_000), ("pairwise", "chosen_labels", 500)]
)
def test_the_scripts_make_the_sample_conversations(
    kind: str, output: str, count: int, tokenizer: str, tmp_path: Path
) -> None:
    script, settings = SCRIPTS / f"data_convert_minimind_{kind}.sh", {"TOKENIZER_PATH": tokenizer, "SEQ_LENGTH": "512"}
    dry = run_script(tmp_path, "--dry-run", script=script, **settings)
    assert dry.returncode == 0 and "--handler-name MiniMind" in dry.stdout and not (tmp_path / "data").exists()
    done = run_script(tmp_path, script=script, **settings)
    assert done.returncode == 0, done.stderr
    prefix = done.stdout.strip()
    meta = read_meta(f"{prefix}_packed_{output}_document")
    assert meta is not None and (meta.samples, meta.too_long, meta.truncated) == (count, 0, 0)
    assert check_dataset(f"{prefix}_packed_{output}_document") == []
    again = run_script(tmp_path, script=script, **settings, DATA_PATH=prefix)
    assert again.stdout.strip() == prefix
    if kind == "instruction":
        assert len((tmp_path / "data" / "sample_questions.jsonl").read_text().splitlines()) == 400


# ------------------------------------------------------------------ datasets by name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_described_datasets_use_what_there_is(config: Path) -> None:
    args = preprocess.parse(["--config", str(config)])
    assert find_handler(args.handler_name) and args.input and args.output_prefix and args.tokenizer_name_or_path
    assert Path(args.output_prefix).name == config.stem


def test_a_dataset_is_converted_by_its_name(tokenizer: str, tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "data" / "preprocess_data.sh"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample_dpo.jsonl").write_text("".join(json.dumps(r) + "\n" for r in preferences(1, 5)))
    (tmp_path / "data" / "tokenizer").symlink_to(tokenizer)
    done = run_script(tmp_path, "sample_dpo", "--seq-length", "300", script=script)
    assert done.stdout.strip() == "data/sample_dpo", done.stderr
    meta = read_meta(tmp_path / "data" / "sample_dpo_packed_rejected_labels_document")
    assert meta is not None and (meta.samples, meta.seq_length) == (5, 300)
    unknown = run_script(tmp_path, "sample_dop", script=script)
    assert unknown.returncode == 1 and "no dataset sample_dop" in unknown.stderr and "sample_dpo.yaml" in unknown.stderr

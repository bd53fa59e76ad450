"""Blends of pretraining data: which words are one, what each set's share is, raw files among the sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.engine import ROOT, as_flags

from minimind_mcore import arguments
from minimind_mcore.errors import UserError
from minimind_mcore.models import recipes
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.preprocess import main as preprocess
from minimind_mcore.preprocess import train_tokenizer
from minimind_mcore.preprocess.check import check_dataset
from minimind_mcore.preprocess.indexed import IndexedWriter, read_index
from minimind_mcore.training import data
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.validation import validate

LARGE, MEDIUM, SMALL = 50, 60, 70  # the id of every token of a set
DOCUMENTS = {
    LARGE: (300, 40),
    MEDIUM: (100, 40),
    SMALL: (1, 10),
}  # documents, tokens of each; SMALL is less than a sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer `tk`, the datasets `50`, `60` and `70` under sets/, and raw text."""
    folder = tmp_path_factory.mktemp("blend")
    train_tokenizer.save(train_tokenizer.train(iter(["one two three four " * 9]), 300), str(folder / "tk"))
    (folder / "sets").mkdir()
    for token, (count, length) in DOCUMENTS.items():
        with IndexedWriter(folder / "sets" / str(token)) as writer:
            writer.add(np.full(count * length, token, np.uint32), np.full(count, length))
    (folder / "raw one.jsonl").write_text(json.dumps({"text": "one two"}) + "\n")
    (folder / "raw.jsonl").write_text("".join(json.dumps({"text": "three four"}) + "\n" for _ in range(3)))
    return folder


READ = """
import json, sys
import torch.distributed as dist
from minimind_mcore import arguments
from minimind_mcore.training import data
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.validation import validate
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
args = arguments.parse(sys.argv[2:])
sets = data.build_datasets(TrainConfig.from_args(args, validate(args, 1)))
print(json.dumps([s and [int(s[i]["tokens"][0]) for i in range(len(s))] for s in sets]))
"""


def read(
    folder: Path, tmp_path: Path, data_path: list[Any], lists: dict[str, list[Any]] | None = None, **changes: Any
) -> subprocess.CompletedProcess[str]:
    """Build the datasets of a run of 40 updates of 8 samples of 32 tokens, in a process of its own."""
    values = {
        "seq_length": 32, "micro_batch_size": 8, "global_batch_size": 8, "train_iters": 40, "eval_iters": 1,
        "eval_interval": 20, "split": "90,10,0", "tokenizer_name_or_path": folder / "tk", "transformer_impl": "local",
        "data_cache_path": tmp_path / "cache", "lr": 1e-3,
    }  # fmt: skip
    flags = [*PRESETS["minimind3_tiny"].megatron_flags(), *as_flags(values | changes)]
    for name, words in {"data_path": data_path, **(lists or {})}.items():
        flags += ["--" + name.replace("_", "-"), *map(str, words)] if words else []
    command = [sys.executable, "-c", READ, str(tmp_path / "store"), *flags]
    environment = os.environ | {"DEVICE": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def shares(samples: list[int]) -> dict[int, float]:
    return {token: count / len(samples) for token, count in Counter(samples).items()}


@pytest.mark.parametrize("weights", [None, ("1.", "3"), ("0.25", ".75")])
def test_each_set_has_its_share(weights: tuple[str, str] | None, folder: Path, tmp_path: Path) -> None:
    large, medium = folder / "sets" / str(LARGE), folder / "sets" / str(MEDIUM)
    words = [large, medium] if weights is None else [weights[0], large, weights[1], medium]
    done = read(folder, tmp_path, words, train_iters=100)  # more than a pass over both
    assert done.returncode == 0, done.stderr
    train, valid, test = json.loads(done.stdout.splitlines()[-1])
    # 12,000 tokens to 4,000 without weights
    expected = {LARGE: 0.75, MEDIUM: 0.25} if weights is None else {LARGE: 0.25, MEDIUM: 0.75}
    assert len(train) >= 800 and test is None
    for found, tolerance in ((train, 0.01), (valid, 0.06)):
        assert shares(found) == pytest.approx(expected, abs=tolerance)


def test_a_set_of_less_than_a_sample_has_its_share(folder: Path, tmp_path: Path) -> None:
    done = read(folder, tmp_path, [folder / "sets" / str(token) for token in (LARGE, SMALL)], train_iters=400)
    assert done.returncode == 0, done.stderr
    train, valid, _ = json.loads(done.stdout.splitlines()[-1])
    assert Counter(train)[SMALL] == pytest.approx(len(train) * 10 / 12010, abs=2)
    assert set(valid) == {LARGE}  # the only document of the small set is for training


def test_a_dataset_that_is_too_small_to_validate_trains(folder: Path, tmp_path: Path) -> None:
    done = read(folder, tmp_path, [folder / "sets" / str(SMALL)])
    assert done.returncode == 0, done.stderr
    train, valid, test = json.loads(done.stdout.splitlines()[-1])
    assert len(train) >= 320 and valid is None and test is None
    done = read(folder, tmp_path, [folder / "sets" / str(SMALL)], split="0,100,0")
    assert "no training data is left of" in done.stderr


def test_lists_for_each_part_are_weighted_too(folder: Path, tmp_path: Path) -> None:
    sets = folder / "sets"
    lists = {"train_data_path": [sets / str(LARGE), sets / str(MEDIUM)], "valid_data_path": [sets / str(MEDIUM)]}
    done = read(folder, tmp_path, [], lists, split=None)
    assert done.returncode == 0, done.stderr
    train, valid, test = json.loads(done.stdout.splitlines()[-1])
    assert shares(train) == pytest.approx({LARGE: 0.75, MEDIUM: 0.25}, abs=0.01)
    assert set(valid) == {MEDIUM} and test is None


WRONG = {
    "0 {large} 1 {medium}": "the weight of {large} is 0; expected a number above 0",
    "-1 {large} 1 {medium}": "the weight of {large} is -1; expected a number above 0",
    "1 {large} inf {medium}": "the weight of {medium} is inf; expected a number above 0",
    "1 {large} nan {medium}": "the weight of {medium} is nan; expected a number above 0",
    "1 {large} {medium}": "found weights (1) for some sets only",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_weight_is_refused_with_the_sets_name(words: str, folder: Path, tmp_path: Path) -> None:
    names = {"large": str(folder / "sets" / str(LARGE)), "medium": str(folder / "sets" / str(MEDIUM))}
    message = WRONG[words].format(**names)
    run = "--seq-length 8 --micro-batch-size 1 --lr 1e-3 --train-iters 1 --data-path".split()
    args = arguments.parse([*PRESETS["minimind3_tiny"].megatron_flags(), *run, *words.format(**names).split()])
    with pytest.raises(UserError) as error:  # a run and its dry run begin with this
        data.prefixes(TrainConfig.from_args(args, validate(args, 1)).data)
    assert message in str(error.value)
    with pytest.raises(UserError) as error:
        recipes.count_samples(words.format(**names).split(), 32)
    assert message in str(error.value)
    with pytest.raises(UserError) as error:
        preprocess_data(folder, tmp_path, words.format(**names), "--dry-run")
    assert message in str(error.value)


def preprocess_data(folder: Path, tmp_path: Path, data: str, *flags: str) -> None:
    """preprocess_data.py, as the training scripts run it."""
    words = ["--input", data, "--cache-dir", str(tmp_path / "cache"), "--tokenizer-name-or-path", str(folder / "tk")]
    preprocess.main([*words, "--prepend-bos", "--append-eod", *flags])


@pytest.mark.parametrize("weights", [("1.", "2"), ("", "")])
def test_raw_files_of_a_blend_are_converted(
    weights: tuple[str, str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    data = f"{weights[0]} raw.jsonl {weights[1]} sets/{LARGE}"
    preprocess_data(folder, tmp_path, data, "--dry-run")
    assert capsys.readouterr().out == ""  # what training would read is not there yet
    preprocess_data(folder, tmp_path, data)
    first, prefix, second, dataset = capsys.readouterr().out.split()
    assert dataset == str(folder / "sets" / str(LARGE))
    assert check_dataset(prefix) == [] and len(read_index(prefix).lengths) == 3
    size = int(read_index(prefix).lengths.sum())
    assert (first, second) == (("1.", "2") if weights[0] else (str(size), "12000"))
    preprocess_data(folder, tmp_path, data, "--dry-run")
    assert capsys.readouterr().out.split() == [first, prefix, second, dataset]


def test_white_space_in_a_path_is_no_blend(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess_data(folder, tmp_path, str(folder / "raw one.jsonl"))
    [prefix] = capsys.readouterr().out.splitlines()
    assert len(read_index(prefix).lengths) == 1


def test_what_a_blend_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    data = f"1 {folder / 'raw.jsonl'} 2 {folder / 'sets' / str(LARGE)}"
    for flags, message in (
        (["--handler-name", "MiniMindInstructionHandler"], "a blend is for pretraining data"),
        (["--output-prefix", str(tmp_path / "out")], "use --cache-dir"),
    ):
        words = ["--input", data, "--tokenizer-name-or-path", str(folder / "tk"), *flags]
        with pytest.raises(UserError, match=message):
            preprocess.main(words)


@pytest.mark.parametrize(
    ("blend", "shown"),
    [
        ("0 {folder}/raw.jsonl 1. {folder}/sets/50", "the weight of {folder}/raw.jsonl is 0"),
        ("1. {folder}/sets/50 2. {folder}/sets/60", "--data-path 1. {folder}/sets/50 2. {folder}/sets/60"),
        ("{folder}/sets/50 {folder}/sets/60", "--data-path 12000 {folder}/sets/50 4000 {folder}/sets/60"),
    ],
)
def test_a_script_takes_a_blend(blend: str, shown: str, folder: Path, tmp_path: Path) -> None:
    settings = {"DATA_PATH": blend.format(folder=folder), "TOKENIZER_PATH": str(folder / "tk"), "TRAIN_ITERS": "1"}
    settings |= {"MODEL": "minimind3_tiny", "DATA_DIR": str(tmp_path), "OUTPUT_DIR": str(tmp_path / "out")}
    settings |= {"PYTHON": sys.executable, "DEVICE": "cpu", "NPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "examples/mcore/minimind/pretrain_minimind_ptd.sh"), "--dry-run"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert shown.format(folder=folder) in done.stdout + done.stderr
    assert done.returncode == int(blend.startswith("0")), done.stderr

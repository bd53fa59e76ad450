"""The fields of a FusionOne AI task are those of a job that would run; what would not is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.engine import ROOT
from helpers.weights_on_disk import state_dict, write_hf

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.converters.convert import convert
from minimind_mcore.converters.megatron import MegatronTarget
from minimind_mcore.errors import UserError
from minimind_mcore.models.presets import PRESETS

FOLDER = ROOT / "examples/fusionone"
MODEL = "minimind3_tiny"


def load_program() -> Any:
    spec = importlib.util.spec_from_file_location("training_task", FOLDER / "training_task.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


program = load_program()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories for data, models and outputs, with a Hugging Face model and a checkpoint of TP=2."""
    root = tmp_path_factory.mktemp("site")
    for name in ("data", "models/tokenizer", "outputs"):
        (root / name).mkdir(parents=True)
    for name in ("data/pretrain.jsonl", "data/whole_text_document.idx", "models/tokenizer/tokenizer.json"):
        (root / name).touch()
    shutil.copytree(root / "models/tokenizer", root / "data/tokenizer")
    shutil.copytree(root / "models/tokenizer", root / "elsewhere")
    (root / "models/link").symlink_to(root / "elsewhere")
    config = PRESETS[MODEL]
    source = open_source(write_hf(root / "models/hf", config, state_dict(config, "hf")))
    convert(source, MegatronTarget(source, ParallelLayout(tp=2)), root / "models/mcore")
    return root


def fields(place: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    argv = [word for name in ("data", "models", "outputs") for word in (f"--{name}", str(place / name))]
    argv += ["--data-path", f"{place}/data/pretrain.jsonl", "--tokenizer", f"{place}/models/tokenizer"]
    program.main([*argv, "--model", MODEL, "--json", *more])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_paths_are_those_of_the_task(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fields(
        place, capsys, "--cards", "4", "--load", f"{place}/models/mcore", "--set", "GBS=64", "--", "--lr", "1e-3"
    )
    assert found["mounts"]["/outputs"] == str(place / "outputs")
    words = shlex.split(found["run command"])
    settings = dict(word.split("=", 1) for word in words[: words.index("bash")])
    assert settings == {
        "MODEL": MODEL, "TP": "2", "PP": "1", "EP": "1", "NPUS_PER_NODE": "4", "DATA_PATH": "/data/pretrain.jsonl",
        "TOKENIZER_PATH": "/models/tokenizer", "OUTPUT_DIR": f"/outputs/{MODEL}-pretrain", "GBS": "64",
        "LOG_DIR": f"/outputs/{MODEL}-pretrain/logs", "DATA_DIR": "/outputs/converted",
        "CKPT_LOAD_DIR": "/models/mcore",
    }  # fmt: skip
    assert words[words.index("bash") :] == [
        "bash", "/workspace/algorithm/examples/fusionone/train.sh", "pretrain_minimind_ptd.sh", "--lr", "1e-3",
    ]  # fmt: skip


REFUSED: dict[str, tuple[list[str], str]] = {
    "another layout": (["--load", "{}/models/mcore", "--tp", "1"], r"has the layout TP=2 PP=1 EP=1(?s:.*)mcore2mcore"),
    "weights that are not a checkpoint": (["--load", "{}/models/hf"], r"wants a Megatron checkpoint(?s:.*)hf2mcore"),
    "another model": (["--load", "{}/models/mcore", "--model", "minimind2_tiny"], "give the same model flags"),
    "no checkpoint": (["--load", "{}/models/none"], "does not exist"),
    "a path that is not mounted": (["--tokenizer", "{}/elsewhere"], "expected a path below --models"),
    "a path above": (["--tokenizer", "{}/models/../elsewhere"], "expected a path below --models"),
    "a tokenizer among the data": (["--tokenizer", "{}/data/tokenizer"], "expected a path below --models"),
    "data among the models": (["--data-path", "{}/models/tokenizer"], "expected a path below --data .* or --outputs"),
    "a link out of the mount": (["--tokenizer", "{}/models/link"], "a link to .*elsewhere, which the task cannot see"),
    "a directory without a tokenizer": (["--tokenizer", "{}/models/hf"], "there is no tokenizer.json in it"),
    "half a prefix": (["--data-path", "{}/data/pre"], "no such file, nor a converted dataset"),
    "a mount that is not there": (["--models", "{}/none"], "--models .*none: there is no such directory"),
    "no cards": (["--cards", "0"], "--cards 0: expected 1 or more"),
    "less than none": (["--cards", "-8"], "--cards -8: expected 1 or more"),
    "no nodes": (["--nodes", "0"], "--nodes 0: expected 1 or more"),
    "a layout by the back door": (["--load", "{}/models/mcore", "--set", "TP=1"], "--set TP=1: give --tp 1, which is"),
    "data that is not there": (["--data-path", "{}/data/other.jsonl"], "no such file"),
    "fewer cards than parts": (["--cards", "1", "--tp", "2"], "cannot divide 1 cards"),
    "more parts than heads": (["--cards", "8", "--tp", "8"], "cannot divide .* key-value heads"),
    "layers that do not divide": (["--cards", "8", "--pp", "8"], "cannot divide .* layers"),
    "tuning nothing": (["--job", "sft"], "needs --load"),
    "half a setting": (["--set", "GBS"], "expected NAME=VALUE"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        fields(place, capsys, *(word.format(place) for word in more))


def test_converted_data_is_given_by_its_prefix(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fields(place, capsys, "--data-path", f"{place}/data/whole_text_document")
    assert "DATA_PATH=/data/whole_text_document" in found["run command"]


def test_several_nodes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fields(place, capsys, "--nodes", "2")
    assert "NNODES=2" in found["run command"] and "NODE_RANK" in found["on each node"]


def run_task(tmp_path: Path, *argv: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", **settings}
    return subprocess.run(
        ["bash", str(FOLDER / "train.sh"), *argv], cwd=tmp_path, env=environ, capture_output=True, text=True
    )


def test_the_task_s_log_is_made_and_its_status_is_the_script_s(tmp_path: Path) -> None:
    logs = tmp_path / "not yet/logs"
    failed = run_task(tmp_path, "pretrain_minimind_ptd.sh", "--dry-run", LOG_DIR=str(logs), DATA_PATH="/no/such.jsonl")
    assert failed.returncode == 1  # TOKENIZER_PATH is not set
    [log] = logs.glob("task-*-node0.log")
    assert "TOKENIZER_PATH is not set" in log.read_text() and str(log) in failed.stdout
    assert "not an absolute path" in run_task(tmp_path, "pretrain_minimind_ptd.sh", LOG_DIR="logs").stderr
    assert "no script other.sh" in run_task(tmp_path, "other.sh", LOG_DIR=str(logs)).stderr

"""The programs as users start them: a script, a pipe, a checkpoint of torch_dist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import ROOT, Corpus
from helpers.inference_models import run_inference, write_model

SCRIPTS = ROOT / "examples" / "mcore" / "minimind"


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, two lines at its standard input."""
    settings = {"DEVICE": "cpu", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env={**os.environ, **settings, **environment}, input="abc\nabd\n", capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    return write_model(tmp_path_factory.mktemp("programs") / "model", "minimind3_moe", corpus)


def test_a_checkpoint_of_torch_dist_writes_the_same_text(model: Path, tmp_path: Path) -> None:
    convert = [sys.executable, str(ROOT / "convert_ckpt_v2.py"), "--load-model-type", "hf", "--save-model-type", "mg"]
    convert += ["--load-dir", str(model), "--save-dir", str(tmp_path / "mcore"), "--ckpt-format", "torch_dist"]
    done = start([*convert, "--tokenizer-name-or-path", str(model)])
    assert done.returncode == 0, done.stderr
    output = tmp_path / "dist.jsonl"
    done = start(
        [sys.executable, str(ROOT / "inference.py"), "--load", str(tmp_path / "mcore"), "--output", str(output)]
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert rows == run_inference(model, tmp_path / "hf.jsonl", "--prompt", "abc", "--prompt", "abd")


def test_scripts_run_and_pass_flags_on(model: Path, tmp_path: Path) -> None:
    done = start(
        ["bash", str(SCRIPTS / "chat_minimind_ptd.sh"), "--repetition-penalty", "1.2"],
        LOAD_DIR=str(model), SYSTEM="be kind", THINKING="true", MAX_NEW_TOKENS="6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("you> ab") == 2 and done.stderr.count("tokens/s") == 2
    (tmp_path / "held out.txt").write_text("abcd hgfe\n")
    done = start(
        ["bash", str(SCRIPTS / "evaluate_minimind_ptd.sh"), "--task-data-path", str(tmp_path / "held out.txt")],
        LOAD_DIR=str(model), TASK="perplexity", OUTPUT_DIR=str(tmp_path / "scores"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and (tmp_path / "scores" / "scores.json").is_file()


def test_an_error_is_one_message_and_status_1(model: Path) -> None:
    done = start(["bash", str(SCRIPTS / "generate_minimind_ptd.sh")], LOAD_DIR=str(model), TASK="gready")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip().startswith("error: --task gready: expected greedy") and "Traceback" not in done.stderr
    done = start(["bash", str(SCRIPTS / "generate_minimind_ptd.sh")])
    assert done.returncode == 1 and "LOAD_DIR is not set" in done.stderr

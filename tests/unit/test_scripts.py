"""What the training scripts make of settings: the commands that a dry run shows, and settings that are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import ROOT

SCRIPTS = ROOT / "examples/mcore/minimind"


def dry_run(script: str, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """A dry run on one process of this CPU, which finds nothing that a user made in the checkout."""
    environment = (
        os.environ
        | {"DATA_DIR": "data", "OUTPUT_DIR": "outputs"}
        | {"PYTHON": sys.executable, "DEVICE": "cpu", "NPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    )
    command = ["bash", str(SCRIPTS / script), *flags, "--dry-run"]
    return subprocess.run(command, env=environment | settings, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, "--handler-name MiniMindInstructionHandler --seq-length 256"),  # the recipe's
        ({"SEQ_LENGTH": "128"}, "--handler-name MiniMindInstructionHandler --seq-length 128"),
        ({"PACK": "1"}, "--handler-name MiniMindInstructionHandler --pack --neat-pack --seq-length 256"),
    ],
)
def test_conversations_are_converted_for_the_length_that_is_trained(
    settings: dict[str, str], shown: str, tmp_path: Path
) -> None:
    done = dry_run("tune_minimind_full_ptd.sh", DATA_DIR=str(tmp_path), TRAIN_ITERS="2", **settings)
    assert shown in done.stdout, done.stderr


def test_adapters_have_their_base_for_the_reference(tmp_path: Path) -> None:
    def command(*flags: str) -> str:
        settings = {"DATA_DIR": str(tmp_path), "TRAIN_ITERS": "2", "CKPT_LOAD_DIR": "/tuned"}
        return dry_run("dpo_minimind_ptd.sh", *flags, **settings).stdout.splitlines()[-1]

    adapters = ["--lora-target-modules", "linear_qkv"]
    assert "--ref-model /tuned" in command()
    assert "--stage dpo" in command(*adapters) and "--ref-model" not in command(*adapters)
    assert "--ref-model /tuned" in command(*adapters, "--reference-live")


def test_precision_auto_is_bf16_where_the_cpu_multiplies_it() -> None:
    fast = any(word in Path("/proc/cpuinfo").read_text().split() for word in ("avx512_bf16", "amx_bf16"))
    output = dry_run("pretrain_minimind_ptd.sh", PRECISION="auto", TRAIN_ITERS="2").stdout
    assert ("--bf16" in output.split()) == fast
    assert "--bf16" not in dry_run("pretrain_minimind_ptd.sh", TRAIN_ITERS="2").stdout  # the default on a CPU is fp32
    chosen = f"--params-dtype {'bf16' if fast else 'fp32'}"
    assert chosen in dry_run("generate_minimind_ptd.sh", PRECISION="auto", LOAD_DIR="model").stdout


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("NPUS_PER_NODE", "abc", "a whole number of 1 or more"),
        ("NPUS_PER_NODE", "0", "a whole number of 1 or more"),
        ("TP", "0", "a whole number of 1 or more"),
        ("PP", "x", "a whole number of 1 or more"),
        ("PRECISION", "int8", "auto, bf16, fp16 or fp32"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(name: str, value: str, expected: str) -> None:
    done = dry_run("pretrain_minimind_ptd.sh", **{name: value})
    assert done.returncode == 1 and done.stderr == f"error: {name}={value}: expected {expected}\n"


def test_a_mistyped_flag_is_refused_before_the_data_is_converted(tmp_path: Path) -> None:
    settings = {"DATA_DIR": str(tmp_path / "data"), "OUTPUT_DIR": str(tmp_path), "DEVICE": "cpu"}
    command = [sys.executable, "-m", "minimind_mcore.cli", "pretrain", "--clip-gradd", "0.5"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: unknown flag --clip-gradd; did you mean --clip-grad?\n"
    assert not (tmp_path / "data").exists()
    kit = dry_run("pretrain_minimind_ptd.sh", "--trust-checkpoints", "--keep-last", "1", DATA_DIR=str(tmp_path))
    assert kit.returncode == 0, kit.stderr

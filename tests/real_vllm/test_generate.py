"""`generate_minimind_ptd.sh --engine vllm` on a CPU, as a user types it; test_vllm.py says how to run these tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import ROOT

PYTHON = os.environ.get("VLLM_PYTHON", "")
SCRIPTS = ROOT / "examples/mcore/minimind"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON is not set: the interpreter of requirements/vllm.sh"),
]
PROMPTS = ("the cat", "17+25=?", "小猫坐在")


def script(name: str, *flags: str, **settings: str) -> str:
    """What a script prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **settings}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # a user does not set it
    command = ["bash", str(SCRIPTS / f"{name}_minimind_ptd.sh"), *flags]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def answers(python: str, load: Path, file: Path, *flags: str, **settings: str) -> list[tuple[str, int, bool]]:
    """What generate adds to the prompts: texts, numbers of tokens, and whether they ended by themselves."""
    given = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    script("generate", *given, "--output", str(file), *flags, PYTHON=python, LOAD_DIR=str(load), RAW="1", **settings)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(row["completion"], row["tokens"], row["finished"]) for row in rows]


def test_a_trained_checkpoint_gives_the_tokens_of_the_kit_s_own_engine(tmp_path: Path) -> None:
    """A checkpoint of two pipeline stages, greedy and with the settings of sampling, which follows its seed."""
    save = tmp_path / "run"
    training = {"DATA_DIR": str(tmp_path / "data"), "OUTPUT_DIR": str(tmp_path / "output"), "CKPT_SAVE_DIR": str(save)}
    training |= {"TP": "1", "PP": "2", "NPUS_PER_NODE": "2", "TRAIN_ITERS": "20", "EVAL_ITERS": "0"}
    script("pretrain", PYTHON=sys.executable, **training)
    expected = answers(sys.executable, save, tmp_path / "native.jsonl", MAX_NEW_TOKENS="24")
    assert all(tokens > 8 for _, tokens, _ in expected)
    sampling = {"TASK": "greedy do_sample do_sample", "TEMPERATURE": "1.2", "TOP_K": "50", "TOP_P": "0.9", "SEED": "7"}
    found = answers(PYTHON, save, tmp_path / "vllm.jsonl", "--engine", "vllm", MAX_NEW_TOKENS="24", **sampling)
    greedy, first, second = (found[start : start + len(PROMPTS)] for start in (0, len(PROMPTS), 2 * len(PROMPTS)))
    assert greedy == expected
    assert first == second != expected

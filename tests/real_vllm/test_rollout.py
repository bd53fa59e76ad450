"""vLLM on a CPU as rollout engine of the embedded trainer; see test_vllm.py for how to run these tests."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import engine, rl_ray, rl_trees
from helpers.engine import ROOT
from helpers.vllm_models import NAMES, VOCABULARY

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON is not set: the interpreter of requirements/vllm.sh"),
]
SAME = 1e-4  # of log-probabilities, in fp32
TIE = 1e-3


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """A program of the environment with vLLM."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "DEVICE": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **more,
    }  # fmt: skip
    return subprocess.run([PYTHON, *command], env=environment, capture_output=True, text=True, timeout=1700)


def require_equal(tokenizer: Path, *names: str) -> None:
    """The embedded decoder and vLLM agree after every sync; a sync restores a spoilt engine, and only a right one."""
    done = run(["-m", "helpers.vllm_rollout", str(tokenizer), *names])
    lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert [row["name"] for row in found] == [name for name in names for _ in range(3)], done.stdout + done.stderr
    for row in found:
        assert row["logp"] < SAME and row["tie"] < TIE, row
        assert row["largest"] < VOCABULARY - 10, row  # no id of the padding
        assert not row["wrong"] and row["stale"], row


def test_a_tied_model_gives_the_embedded_decoder_s_log_probabilities(corpus: engine.Corpus) -> None:
    require_equal(corpus.tokenizer, "minimind3")


@pytest.mark.slow
def test_every_other_preset_gives_the_embedded_decoder_s_log_probabilities(corpus: engine.Corpus) -> None:
    require_equal(corpus.tokenizer, *NAMES[1:])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["minimind3_tiny", "minimind3_moe_tiny"])
def test_grpo_with_vllm(model: str, corpus: engine.Corpus, tmp_path: Path) -> None:
    """train_grpo.py trains several steps; the trainer and vLLM agree about every response."""
    tree = rl_trees.run_tree(corpus, rl_trees.write_prompts(tmp_path / "prompts"), tmp_path / "run")
    tree["model"] = rl_trees.tree(corpus, model)["model"]
    for section in ("megatron_training", "actor_config"):
        tree[section]["model"] = model
    tree["generate_config"] |= {"max_model_len": 64, "enforce_eager": True, "max_num_batched_tokens": 512}
    tree["minimind"] |= {"rollout_engine": "vllm", "actor_timeout_s": 900.0, "weight_check_interval": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    ray = Path("/tmp") / f"vr{os.getpid()}"
    words = [str(ROOT / "train_grpo.py"), "--config-name", "run", "--config-dir", str(tmp_path)]
    done = run(words, RAY_ADDRESS="local", RAY_TMPDIR=str(ray), RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    rows = rl_ray.rows(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert all(row["rollout/logp_diff"] < 1e-5 for row in rows), rows
    assert "weights of the rollout engines checked at step 4" in done.stdout + done.stderr

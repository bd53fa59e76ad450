"""Numbers out of their range are refused by every reader, with the flag, key or file named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from minimind_mcore import arguments
from minimind_mcore.converters.main import main_v2
from minimind_mcore.errors import UserError
from minimind_mcore.inference import main as inference
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import get_preset
from minimind_mcore.preprocess import main as preprocess
from minimind_mcore.rl.config.lint import lint

SECONDS = 20  # after which a reader counts as hanging


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def train(words: list[str]) -> None:
    """Parse a command line of pretraining, and post-training where it needs that."""
    base = [*get_preset("minimind3_tiny").megatron_flags(), "--seq-length", "32", "--micro-batch-size", "1"]
    arguments.parse([*base, *words], posttrain=any("dpo" in word or "distill" in word for word in words))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("--seq-length", value) for value in ("-1", "0", "1000000000000000000000000000000")],
        *[("--num-layers", value) for value in ("0", "-2", "1000000000000000000000000000000")],
        *[("--adam-beta1", value) for value in ("nan", "1", "-0.5", "inf")],
        *[("--lr", "nan"), ("--lr", "-1"), ("--min-lr", "inf"), ("--weight-decay", "nan"), ("--clip-grad", "-1")],
        *[("--norm-epsilon", "nan"), ("--norm-epsilon", "0"), ("--rotary-base", "-5"), ("--attention-dropout", "1.5")],
        *[("--train-iters", "-1"), ("--eval-interval", "0"), ("--log-interval", "-3"), ("--num-workers", "-1")],
        *[
            ("--seed", "-1"),
            ("--lr-warmup-fraction", "2"),
            ("--moe-aux-loss-coeff", "nan"),
            ("--padded-vocab-size", "0"),
        ],
        *[("--dpo-beta", "0"), ("--dpo-beta", "nan"), ("--distill-temperature", "inf"), ("--distill-alpha", "nan")],
    ],
)
def test_flags_of_training(flag: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{flag}: found .*, expected"):
        train([flag, value])


@pytest.mark.parametrize(
    ("program", "flag", "value"),
    [
        *[(preprocess.main, "--max-reject-rate", value) for value in ("nan", "-1", "2", "inf")],
        *[(preprocess.main, "--workers", "0"), (preprocess.main, "--seq-length", "-1")],
        *[(preprocess.main, "--thinking-ratio", "nan"), (preprocess.main, "--n-subs", "0")],
        *[(main_v2, "--max-shard-size", "nan"), (main_v2, "--max-shard-size", "-1")],
        *[(main_v2, "--target-tensor-parallel-size", "0"), (main_v2, "--padded-vocab-size", "-1")],
        *[(main_v2, "--norm-epsilon", "nan"), (main_v2, "--rotary-base", "-5")],
        *[(inference.main, "--temperature", "nan"), (inference.main, "--top-p", "nan")],
        *[(inference.main, "--repetition-penalty", "inf"), (inference.main, "--prompt-batch-size", "0")],
    ],
)
def test_flags_of_other_programs(program: Callable[..., None], flag: str, value: str, tmp_path: Path) -> None:
    words = {
        preprocess.main: ["--input", str(tmp_path / "none.jsonl"), "--tokenizer-name-or-path", str(tmp_path)],
        main_v2: ["--load-dir", str(tmp_path / "none"), "--save-dir", str(tmp_path / "out"), "--save-model-type", "hf"],
        inference.main: ["--load", str(tmp_path / "none"), "--prompt", "a"],
    }[program]
    with pytest.raises(UserError, match=rf"{flag}: found .*, expected"):
        program([*words, flag, value])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("num_hidden_layers", value) for value in (10**30, 0, -1, 1.5, True, "8")],
        *[("rms_norm_eps", value) for value in (float("nan"), 0, -1e-6, float("inf"), "1e-6")],
        *[("rope_theta", value) for value in (-5, float("nan"), 0, float("inf"), "1e6")],
        *[("vocab_size", -1), ("hidden_size", 0), ("num_attention_heads", 0), ("num_key_value_heads", -2)],
        *[("head_dim", -8), ("intermediate_size", 2.5), ("max_position_embeddings", 0), ("tie_word_embeddings", "no")],
        *[("num_experts", 10**30), ("num_experts_per_tok", 0), ("router_aux_loss_coef", float("nan"))],
    ],
)
def test_config_json(key: str, value: object, tmp_path: Path) -> None:
    fields: dict[str, object] = dict(model_type="qwen3_moe", vocab_size=64, hidden_size=32, num_hidden_layers=2)
    fields |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=64, rms_norm_eps=1e-6)
    fields |= dict(rope_theta=1e6, max_position_embeddings=128, num_experts=4, num_experts_per_tok=1)
    fields |= dict(moe_intermediate_size=64, norm_topk_prob=True, router_aux_loss_coef=0.1, tie_word_embeddings=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields), encoding="utf-8")
    assert ModelConfig.from_hf_config(tmp_path).num_layers == 2
    file.write_text(json.dumps(fields | {key: value}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"config.json: {key}: found .*, expected"):
        ModelConfig.from_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("actor_config.lr", value) for value in ("-1", "nan", "inf")],
        *[("actor_config.adam_beta1", "nan"), ("actor_config.weight_decay", "-1")],
        *[("actor_config.clip_grad", "-1"), ("megatron_training.eval_interval", "0")],
        *[("rl_config.gamma", "nan"), ("rl_config.lam", "2"), ("rl_config.clip_ratio", "nan")],
        *[("generate_config.gpu_memory_utilization", "2"), ("generate_config.sampling_config.top_p", "nan")],
        *[("minimind.reward_failure_limit", "nan"), ("minimind.actor_timeout_s", "inf")],
    ],
)
def test_yaml(key: str, value: str) -> None:
    findings, _, _ = lint("grpo_minimind_tiny", "embedded", [f"{key}={value}"])
    errors = [finding for finding in findings if finding.level == "error"]
    assert [error.key for error in errors] == [key] and "found" in errors[0].message and "expected" in errors[0].message


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]\n"], ids=["aliases of aliases", "itself"])
def test_yaml_that_grows_by_aliases(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"bomb\.yaml: .*alias"):
        preprocess.parse(["--config", str(file)])
    with pytest.raises(UserError, match=r"bomb\.yaml: .*alias"):
        lint(str(file), "embedded")


@pytest.mark.parametrize("number", [4_000_000_000, -1, 2.5, True])
def test_ids_of_a_tokenizer(number: object, tmp_path: Path) -> None:
    """In a process of its own: the tokenizers library ends it, or takes 100 GB."""
    content = json.loads(Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).to_str())
    content["model"]["vocab"]["zzz"] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    code = "import sys, resource as r; r.setrlimit(r.RLIMIT_AS, (4 << 30,) * 2)\n"
    code += "from minimind_mcore import errors\nfrom minimind_mcore.preprocess.tokenize import tokenizer_info\n"
    code += "errors.run(lambda: tokenizer_info(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert f"{tmp_path / 'tokenizer.json'}: id of the token 'zzz': found {number}, expected" in run.stderr

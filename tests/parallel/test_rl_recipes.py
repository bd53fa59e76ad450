"""MiniMind's and minimind-ascend's recipes run end to end: a tiny model, a reward model with code of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine
from helpers.reward_model import write_reward_model
from helpers.weights_on_disk import state_dict, write_hf

from minimind_mcore.models.presets import PRESETS
from minimind_mcore.preprocess.convert import convert
from minimind_mcore.preprocess.options import Options
from minimind_mcore.rl.config.load import compose, plain
from minimind_mcore.rl.models import model_section

MODELS = {"rlaif_minimind3": "minimind3_tiny"}  # the others train a MiniMind2-Small
SMALLER = {
    "megatron_training": {"seq_length": 256, "train_iters": 2, "save_interval": 1},
    "actor_config": {"lr": 1e-3, "min_lr": 1e-3, "lr_decay_style": "constant"},
    "rl_config": {"actor_resource": {"num_npus": 1}, "max_prompt_length": 200},
    "generate_config": {"max_model_len": 256},
}


@pytest.fixture(scope="module")
def shared(corpus: engine.Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions, converted, and a reward model."""
    folder = tmp_path_factory.mktemp("rlaif")
    ends = {"role": "assistant", "content": "无"}
    asked = ["".join(chr(97 + (7 * i + k * k) % 8) for k in range(4 + i % 5)) for i in range(40)]
    talks = [{"conversations": [{"role": "user", "content": text}, ends]} for text in asked]
    (folder / "rlaif.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    convert(Options(str(folder / "rlaif.jsonl"), str(corpus.tokenizer), str(folder / "rlaif"),
                    handler="MiniMindPromptHandler"))  # fmt: skip
    write_reward_model(folder / "judge", corpus.tokenizer)
    return folder


def tree_of(name: str, shared: Path, corpus: engine.Corpus, folder: Path) -> dict[str, Any]:
    """A shipped recipe with a tiny model, on the questions."""
    model = MODELS.get(name, "minimind2_small_tiny")
    config = PRESETS[model].replace(vocab_size=corpus.vocab_size)
    if not (folder / "model").exists():
        write_hf(folder / "model", config, state_dict(config, "hf"))
    tree = plain(compose(name, [f"model=[{model}]"], device="cpu"))
    tree["model"] = {model: model_section(config)}
    for section, values in SMALLER.items():
        tree[section] |= values
    tree["megatron_training"] |= {"model": model, "data_path": str(shared / "rlaif")}
    tree["megatron_training"] |= {"tokenizer_name_or_path": str(corpus.tokenizer), "spec": None}
    for role in ("actor_config", "critic_config"):
        if role in tree:
            tree[role] |= {"model": model, "load": str(folder / "model"), "save": str(folder / role)}
    tree["generate_config"]["sampling_config"]["max_tokens"] = 24
    tree["minimind"] |= {"reward_model": str(shared / "judge"), "output_dir": str(folder)}
    tree["minimind"] |= {"save_rollouts": str(folder / "rollouts"), "sample_interval": 0, "eval_interval": 0}
    return tree


def run(server: engine.Server, tree: dict[str, Any], folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Train; return the rows of the steps, and what was printed."""
    file = folder / "tree.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    output = server.run(["--tree", str(file)], folder, module="helpers.rl_local").output
    return [row for row in engine.read_rows(folder) if "timing/all" in row], output


def responses(folder: Path, step: int) -> list[dict[str, Any]]:
    lines = (folder / f"rollouts/rollouts-{step:07d}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_rlaif_of_minimind_3(
    server: engine.Server, shared: Path, corpus: engine.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards are those of MiniMind's formula, called by hand; advantages those of its trainer."""
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setenv("COLUMNS", "80")
    rows, output = run(server, tree_of("rlaif_minimind3", shared, corpus, tmp_path), tmp_path)
    assert [row["iteration"] for row in rows] == [1, 2] and all(row["actor/grad_norm"] > 0 for row in rows)
    assert rows[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-6) and rows[1]["actor/kl_loss"] > 0
    for role in ("policy", "reference"):
        assert f"{role}: loaded weights of {tmp_path}/model" in output
    assert all(len(line) <= 80 for line in output.splitlines() if "reward" in line and "ETA" in line)
    assert "2/2" in output

    judge = AutoModel.from_pretrained(shared / "judge", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(shared / "judge")
    thoughts = []
    for step in (1, 2):
        found = responses(tmp_path, step)
        assert len(found) == 2 * 6
        for row in found:
            asked = row["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            system = row["prompt"].split("<|im_start|>system\n")
            assert len(system) <= 2
            thoughts.append(row["prompt"].endswith("<think>\n"))
            response = row["response"]
            shape = 0.5 if 20 <= len(response.strip()) <= 800 else -0.5
            assert "</think>" not in response  # the tiny model does not write any
            words = re.findall(r"\w+|[^\w\s]", response.lower())
            grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
            shape -= min(0.5, (len(grams) - len(set(grams))) / len(grams)) if grams else 0.0
            question = asked
            if len(system) == 2:
                told = f"system: {system[1].split('<|im_end|>')[0]}"
                question = f"{told}\n以上是对话历史。我的新问题是：\n{asked}"
            talk = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
            score = min(max(judge.get_score(tokenizer, talk), -3.0), 3.0)
            assert row["rewards"]["reward_model"] == pytest.approx(score, abs=1e-4)
            assert row["reward"] == pytest.approx(shape + score, abs=1e-4)
        rewards = torch.tensor([row["reward"] for row in found]).view(2, 6)
        expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
        assert [row["advantage"] for row in found] == pytest.approx(expected.flatten().tolist(), abs=1e-4)
    assert any(thoughts)


@pytest.mark.parametrize("name", ["minimind_ascend_grpo", "minimind_ascend_spo", "minimind_ascend_ppo"])
def test_recipes_of_minimind_ascend(
    name: str, server: engine.Server, shared: Path, corpus: engine.Corpus, tmp_path: Path
) -> None:
    tree = tree_of(name, shared, corpus, tmp_path)
    rows, output = run(server, tree, tmp_path)
    assert [row["iteration"] for row in rows] == [1, 2] and all(row["actor/grad_norm"] > 0 for row in rows)
    found = responses(tmp_path, 1)
    expected = {"minimind_ascend_grpo": 2 * 8, "minimind_ascend_spo": 8, "minimind_ascend_ppo": 2}
    assert len(found) == expected[name]
    for row in found:
        assert row["reward"] == pytest.approx(
            row["rewards"]["minimind_reason"] + row["rewards"]["reward_model"], abs=1e-5
        )
    if name == "minimind_ascend_spo":  # the baseline begins at 0
        assert [row["advantage"] for row in found] == pytest.approx([row["reward"] for row in found], abs=1e-5)
    if name == "minimind_ascend_ppo":
        assert "critic: loaded weights of" in output and rows[0]["critic/vf_loss"] > 0

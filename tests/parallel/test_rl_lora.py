"""Reinforcement learning of LoRA adapters: peft on transformers is the reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import engine, rl_ray, rl_trees
from helpers.inference_models import twin
from helpers.weights_on_disk import state_dict, write_hf
from torch import Tensor

from minimind_mcore.models.presets import PRESETS
from minimind_mcore.models.weights import mcore_to_hf
from minimind_mcore.rl.runtime.batch import Batch

CONFIG = PRESETS["minimind3_tiny"]
LORA = {"lora_target_modules": ["linear_proj", "linear_fc2"], "lora_r": 4, "lora_alpha": 8}
THEIRS = {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}
PROMPTS = [[50, 60, 70], [80, 90], [100, 110, 120, 130], [140, 41, 42]]


@pytest.fixture(scope="module")
def base(corpus: engine.Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CONFIG.replace(vocab_size=corpus.vocab_size)
    return write_hf(tmp_path_factory.mktemp("base") / "hf", config, state_dict(config, "hf"))


def step(server: engine.Server, folder: Path, tree: dict[str, Any], processes: int = 1, **task: Any) -> dict[str, Any]:
    folder.mkdir()
    tree["rl_config"]["entropy_coeff"] = 0.0
    torch.save({"tree": tree, "updates": 1, **task}, folder / "task.pt")
    server.run(["--task", str(folder / "task.pt")], folder, processes, module="helpers.rl_rank")
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def alone(
    server: engine.Server, corpus: engine.Corpus, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """One update in one process, of all responses."""
    tree = rl_trees.tree(corpus, load=str(base), **LORA)
    return step(server, tmp_path_factory.mktemp("alone") / "run", tree, prompts=PROMPTS)


def theirs(name: str) -> str:
    """peft's name of an adapter."""
    layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
    module, _, adapter = rest.partition(".lora_")
    return f"base_model.model.model.layers.{layer}.{THEIRS[module]}.lora_{adapter}"


def peft_model(base: Path, adapters: dict[str, Tensor]) -> Any:
    how = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"])
    model: Any = peft.get_peft_model(twin(base), how)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in adapters.items():
            own[theirs(name)].copy_(tensor)
    return model


def test_the_first_update_is_peft_s(alone: dict[str, Any], base: Path) -> None:
    """With the ratio 1 and the policy still the reference, the gradient is that of advantage times log-probability."""
    model, batch = peft_model(base, alone["adapters"]), Batch(**alone["batch"])
    assert len(alone["adapters"]) == 4 * CONFIG.num_layers
    temperature, total = 0.8, batch.mask.sum()
    advantages, order = batch.advantages, range(len(batch))
    assert advantages is not None
    loss = torch.zeros(())
    for row in order:
        start, length = int(batch.prompt_lengths[row]), int(batch.response_lengths[row])
        ids = batch.tokens[row, : start + length]
        logits = model(ids[None]).logits[0, start - 1 : -1] / temperature
        logp = logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0]
        loss = loss - (advantages[row, :length] * logp).sum() / total
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    assert alone["metrics"][0]["actor/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    for name, after in alone["adapters_after"].items():
        change, grad = after - alone["adapters"][name], grads[theirs(name)]
        sure = grad.abs() > 1e-5
        if ".lora_B." in name:
            assert sure.any() and torch.equal(change[sure].sign(), -grad[sure].sign()), name


def test_the_engine_gets_what_peft_merges(alone: dict[str, Any], base: Path, corpus: engine.Corpus) -> None:
    config = CONFIG.replace(vocab_size=corpus.vocab_size)
    merged = peft_model(base, alone["adapters_after"]).merge_and_unload().state_dict()
    found = mcore_to_hf(alone["weights_after"], config)
    before = mcore_to_hf(alone["weights"], config)
    for name, tensor in found.items():
        assert torch.allclose(tensor, merged[name], atol=1e-6), name
        is_adapted = "o_proj" in name or "down_proj" in name
        assert torch.equal(tensor, before[name]) != is_adapted, name


def test_a_tensor_parallel_layout_gives_the_same(
    server: engine.Server, corpus: engine.Corpus, base: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    tree = rl_trees.tree(corpus, load=str(base), tensor_model_parallel_size=2, **LORA)
    tree["rl_config"]["actor_resource"] = {"num_npus": 2}
    found = step(server, tmp_path / "tp", tree, 2, batch=alone["batch"])
    for name, tensor in alone["weights_after"].items():
        assert torch.allclose(found["weights_after"][name], tensor, atol=1e-5), name


def test_a_run_saves_adapters_alone_and_goes_on(
    server: engine.Server, corpus: engine.Corpus, base: Path, tmp_path: Path
) -> None:
    prompts = rl_trees.write_prompts(tmp_path / "prompts")

    def run(name: str) -> None:
        tree = rl_trees.run_tree(corpus, prompts, tmp_path / name, load=str(base), **LORA)
        (tmp_path / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
        server.run(["--tree", str(tmp_path / f"{name}.json")], tmp_path / name, module="helpers.rl_local")

    run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/iter_0000004")
    run("cut")
    saved = torch.load(tmp_path / "cut/checkpoints/iter_0000004/mp_rank_00/model_optim_rng.pt", weights_only=False)
    assert saved["model"] and all(".lora_" in name for name in saved["model"])
    whole, cut = (rl_ray.rows(tmp_path / name) for name in ("whole", "cut"))
    for name in ("grpo/score/mean", "actor/pg_loss", "actor/grad_norm"):
        assert [row[name] for row in cut] == [row[name] for row in whole], name
    assert all(row["rollout/logp_diff"] < 1e-5 for row in cut)
    assert cut[-1]["actor/kl_loss"] > 0  # the reference is the base

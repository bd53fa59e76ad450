"""Adapters merge into the weights as training would have used them, and PEFT loads them by themselves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from helpers.weight_tables import hf_to_mcore
from helpers.weights_on_disk import SMALL, assert_same_bits, read_hf, state_dict, write_hf
from torch import Tensor

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.converters.convert import convert
from minimind_mcore.converters.main import main_v2
from minimind_mcore.converters.megatron import MegatronTarget
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig

RANK, ALPHA = 4, 8
MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
CONFIG = SMALL["minimind3"]
LAYOUTS = {
    "TP1": ParallelLayout(),
    "TP2 PP2": ParallelLayout(tp=2, pp=2),
    "VPP": ParallelLayout(pp=2, layers_per_virtual_stage=1),
}
Pairs = dict[str, tuple[Tensor, Tensor]]


def random_adapters(config: ModelConfig, modules: tuple[str, ...] = MODULES) -> Pairs:
    """A and B by the name of the weight in the whole megatron-core model."""
    generator = torch.Generator().manual_seed(5)
    pairs = {}
    for name, shape in weights.mcore_shapes(config).items():
        if name.split(".")[-2] in modules:
            a, b = (0.1 * torch.randn(s, generator=generator) for s in ((RANK, shape[1]), (shape[0], RANK)))
            pairs[name] = (a, b)
    return pairs


def cut(name: str, a: Tensor, b: Tensor, rank: int, tp: int) -> tuple[Tensor, Tensor]:
    """What a tensor rank holds of an adapter: B's rows as the weight's, or A's columns."""
    if name.endswith("linear_fc1.weight"):
        return a, torch.cat([half.chunk(tp)[rank] for half in b.chunk(2)])  # of gate and of up
    if name.endswith("linear_qkv.weight"):
        return a, b.chunk(tp)[rank]
    return a.chunk(tp, dim=1)[rank], b


def lora_checkpoint(
    base: Path, folder: Path, config: ModelConfig, pairs: Pairs, layout: ParallelLayout, alone: bool
) -> Path:
    """A checkpoint as MindSpeed-LLM's LoRA training writes it: adapters beside the weights, or alone."""
    source = open_source(base)
    root = convert(source, MegatronTarget(source, layout), folder).path
    parts = layout.parts(config)
    for file in root.glob("iter_*/*/model_optim_rng.pt"):
        content = torch.load(file, weights_only=False)
        content["args"].lora_r, content["args"].lora_alpha = RANK, ALPHA
        content["args"].lora_target_modules = sorted({name.split(".")[-2] for name in pairs})
        for whole, (a, b) in pairs.items():
            for part in (p for p in parts[whole] if p.folder == file.parent.name):
                stem = part.name.removesuffix(".weight")
                chunk = content[part.chunk]
                chunk[stem + ".base_layer.weight"] = chunk.pop(part.name)
                a_part, b_part = cut(whole, a, b, part.rank, layout.tp)
                chunk[stem + ".lora_A.default.weight"] = a_part.clone()
                chunk[stem + ".lora_B.default.weight"] = b_part.clone()
        if alone:
            for key in [k for k in content if k.startswith("model")]:
                content[key] = {n: t for n, t in content[key].items() if ".lora_" in n}
        torch.save(content, file)
    next(root.glob("iter_*/manifest.json")).unlink()
    return root


def merged_state(config: ModelConfig, state: dict[str, Tensor], pairs: Pairs, scale: float) -> dict[str, Tensor]:
    whole = hf_to_mcore(state, config)
    for name, (a, b) in pairs.items():
        whole[name] = whole[name] + scale * (b @ a)
    return weights.mcore_to_hf(whole, config)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "base", CONFIG, state_dict(CONFIG, "hf"))


def run(load: Path, save: Path, *flags: str) -> Path:
    main_v2(["--load-dir", str(load), "--save-dir", str(save), "--save-model-type", "hf", *flags])
    return save


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_in_a_checkpoint_merge(layout: str, base: Path, tmp_path: Path) -> None:
    pairs = random_adapters(CONFIG)
    trained = lora_checkpoint(base, tmp_path / "trained", CONFIG, pairs, LAYOUTS[layout], alone=False)
    found = read_hf(run(trained, tmp_path / "merged", "--lora-r", str(RANK), "--lora-alpha", str(ALPHA)))
    expected = merged_state(CONFIG, read_hf(base), pairs, ALPHA / RANK)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("where", ["TP2 PP2", "VPP"])
def test_adapters_of_another_checkpoint_and_layout_merge(where: str, base: Path, tmp_path: Path) -> None:
    pairs = random_adapters(CONFIG)
    adapters = lora_checkpoint(base, tmp_path / "adapters", CONFIG, pairs, LAYOUTS[where], alone=True)
    source = open_source(base)
    mcore = convert(source, MegatronTarget(source, ParallelLayout(tp=2)), tmp_path / "mcore").path
    inside = lora_checkpoint(base, tmp_path / "inside", CONFIG, pairs, LAYOUTS["TP1"], alone=False)
    expected = read_hf(run(inside, tmp_path / "expected"))
    assert_same_bits(read_hf(run(mcore, tmp_path / "one", "--lora-load", str(adapters))), expected)
    assert_same_bits(read_hf(run(base, tmp_path / "two", "--lora-load", str(adapters))), expected)


def test_adapters_of_experts_merge(tmp_path: Path) -> None:
    config = SMALL["minimind3_moe"]
    base = write_hf(tmp_path / "base", config, state_dict(config, "hf"))
    pairs = random_adapters(config)
    trained = lora_checkpoint(base, tmp_path / "trained", config, pairs, ParallelLayout(tp=2, ep=2), alone=False)
    found = read_hf(run(trained, tmp_path / "merged"))
    for name, tensor in merged_state(config, read_hf(base), pairs, ALPHA / RANK).items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("modules", [MODULES, ("linear_qkv", "linear_proj")])
@pytest.mark.parametrize("layout", ["TP1", "TP2 PP2"])
def test_peft_loads_the_adapters(layout: str, modules: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    pairs = random_adapters(CONFIG, modules)
    trained = lora_checkpoint(base, tmp_path / "trained", CONFIG, pairs, LAYOUTS[layout], alone=False)
    adapter = run(trained, tmp_path / "adapter", "--save-lora-to-hf", "--hf-cfg-dir", str(base))
    merged = run(trained, tmp_path / "merged")
    ids = torch.randint(0, CONFIG.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)
        before = plain(ids).logits
        found = PeftModel.from_pretrained(plain, adapter)(ids).logits
    assert (found - expected).abs().max() < 1e-5 < 0.01 < (before - expected).abs().max()
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    wanted = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(config["target_modules"]) == (
        wanted | {"gate_proj", "up_proj", "down_proj"} if "linear_fc1" in modules else wanted
    )


# MiniMind's own


def minimind_adapters(config: ModelConfig, path: Path, rank: int = RANK, prefix: str = "") -> dict[str, Tensor]:
    """As model_lora.py saves them: of square layers, which are q and o."""
    generator = torch.Generator().manual_seed(6)
    state: dict[str, Tensor] = {}
    for n in range(config.num_layers):
        for module in ("q_proj", "o_proj"):
            for letter, shape in (("A", (rank, config.hidden_size)), ("B", (config.hidden_size, rank))):
                name = f"{prefix}model.layers.{n}.self_attn.{module}.lora.{letter}.weight"
                state[name] = 0.1 * torch.randn(shape, generator=generator)
    torch.save(state, path)
    return state


def test_minimind_s_adapters_merge_and_become_peft(tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    config = CONFIG.replace(head_dim=4)  # so that q and o are square
    base_state = state_dict(config, "native")
    base = tmp_path / "full_sft_32.pth"
    torch.save(base_state, base)
    state = minimind_adapters(config, tmp_path / "lora_identity_32.pth", prefix="_orig_mod.")
    lora = ("--lora-load", str(tmp_path / "lora_identity_32.pth"))
    found = torch.load(run(base, tmp_path / "merged.pth", *lora))
    for name, tensor in base_state.items():
        stem = "_orig_mod." + name.removesuffix(".weight")
        adapted = f"{stem}.lora.A.weight" in state
        expected = tensor + state[f"{stem}.lora.B.weight"] @ state[f"{stem}.lora.A.weight"] if adapted else tensor
        assert torch.allclose(found[name], expected, atol=1e-6), name

    adapter = run(base, tmp_path / "adapter", *lora, "--save-lora-to-hf")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["o_proj", "q_proj"] and fields["lora_alpha"] == fields["r"] == RANK
    ids = torch.randint(0, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(run(base, tmp_path / "hf"))
        expected = transformers.AutoModelForCausalLM.from_pretrained(run(base, tmp_path / "merged", *lora))(ids).logits
        assert (PeftModel.from_pretrained(model, adapter)(ids).logits - expected).abs().max() < 1e-5


def test_adapters_of_q_k_and_v_share_one_a(tmp_path: Path) -> None:
    """A model without grouped queries has square k and v too."""
    config = CONFIG.replace(num_kv_heads=8, head_dim=4)
    base_state = state_dict(config, "native")
    torch.save(base_state, tmp_path / "base.pth")
    state: dict[str, Tensor] = {}
    for n in range(config.num_layers):
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            stem = f"model.layers.{n}.self_attn.{module}.lora."
            state |= {stem + "A.weight": 0.1 * torch.randn(RANK, 32), stem + "B.weight": 0.1 * torch.randn(32, RANK)}
    torch.save(state, tmp_path / "lora.pth")
    found = torch.load(run(tmp_path / "base.pth", tmp_path / "merged.pth", "--lora-load", str(tmp_path / "lora.pth")))
    for name in (n for n in base_state if "_proj" in n and "self_attn" in n):
        a, b = (state[name.replace(".weight", f".lora.{x}.weight")] for x in "AB")
        assert torch.allclose(found[name], base_state[name] + b @ a, atol=1e-6), name


# Refusals


def test_wrong_flags_and_damage_are_said(base: Path, tmp_path: Path) -> None:
    pairs = random_adapters(CONFIG)
    trained = lora_checkpoint(base, tmp_path / "trained", CONFIG, pairs, ParallelLayout(tp=2), alone=False)
    for flags, message in (
        (["--lora-r", "16"], "--lora-r 16: the adapters have rank 4"),
        (["--lora-alpha", "32"], "--lora-alpha 32: the checkpoint was trained with 8"),
        (
            ["--lora-target-modules", "linear_qkv"],
            "the adapters belong to linear_fc1 linear_fc2 linear_proj linear_qkv",
        ),
        (["--lora-load", str(base)], "expected a Megatron checkpoint with adapters"),
    ):
        with pytest.raises(UserError, match=message):
            run(trained, tmp_path / "out", *flags)
    file = next(trained.glob("iter_*/mp_rank_01/model_optim_rng.pt"))
    content = torch.load(file, weights_only=False)
    content["model"].pop("decoder.layers.2.mlp.linear_fc2.lora_B.default.weight")
    torch.save(content, file)
    with pytest.raises(UserError, match=r"missing tensors: model/decoder\.layers\.2\.mlp\.linear_fc2\.lora_B"):
        run(trained, tmp_path / "out")


def test_alpha_must_come_from_somewhere(base: Path, tmp_path: Path) -> None:
    pairs = random_adapters(CONFIG)
    trained = lora_checkpoint(base, tmp_path / "trained", CONFIG, pairs, ParallelLayout(), alone=False)
    file = next(trained.glob("iter_*/mp_rank_00/model_optim_rng.pt"))
    content = torch.load(file, weights_only=False)
    content["args"] = argparse.Namespace(**{k: v for k, v in vars(content["args"]).items() if "lora" not in k})
    torch.save(content, file)
    with pytest.raises(UserError, match="alpha is not in the checkpoint: give --lora-alpha"):
        run(trained, tmp_path / "out")
    run(trained, tmp_path / "out", "--lora-alpha", str(ALPHA))

"""Every form that MiniMind's weights come in is read for what it is, and written so that others read it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.weights_on_disk import SMALL, assert_same_bits, config_json, read_hf, read_mcore, state_dict, write_hf
from safetensors.torch import save_file
from torch import Tensor

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.checkpoint.source import Source, cast, resize_vocabulary
from minimind_mcore.converters.convert import convert
from minimind_mcore.converters.hf import HFTarget, PthTarget
from minimind_mcore.converters.megatron import MegatronTarget
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.hf_config import to_native_config
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.models.weights import EMBEDDING


def whole(source: Source) -> dict[str, Tensor]:
    return {name: lazy.read() for name, lazy in source.tensors.items()}


def save_pth(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


# MiniMind's .pth

GENERATIONS = {
    "minimind3": PRESETS["minimind3_tiny"],
    "minimind3 untied": PRESETS["minimind3_tiny"].replace(tie_embeddings=False),
    "minimind3_moe": PRESETS["minimind3_moe_tiny"],
    "minimind2_small": PRESETS["minimind2_small_tiny"],
    "minimind2": PRESETS["minimind2_tiny"],
    "minimind2_moe": PRESETS["minimind2_moe_tiny"],
}
V1 = PRESETS["minimind2_small_tiny"].replace(
    num_heads=16, num_kv_heads=8, head_dim=4, rope_theta=10_000, max_position_embeddings=512
)
FIRST_2 = PRESETS["minimind2_moe_tiny"].replace(max_position_embeddings=8192)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", GENERATIONS)
def test_a_pth_tells_its_architecture(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = GENERATIONS[name]
    state = state_dict(config, "native", dtype)
    source = open_source(save_pth(tmp_path / "full_sft_128.pth", state))
    assert source.config == config and source.dtype == dtype
    back = convert(source, PthTarget(source), tmp_path / "back.pth").path
    assert_same_bits(torch.load(back), state)


@pytest.mark.parametrize("config", [V1, FIRST_2], ids=["v1", "first MiniMind2"])
def test_weights_before_2025_04_26_become_todays(config: ModelConfig, tmp_path: Path) -> None:
    state = state_dict(config, "legacy")
    source = open_source(save_pth(tmp_path / "pretrain_512.pth", state))
    assert source.config == config
    back = convert(source, PthTarget(source), tmp_path / "today.pth").path
    today = torch.load(back)
    assert torch.equal(today["model.layers.0.self_attn.v_proj.weight"], state["layers.0.attention.wv.weight"])
    q, old = today["model.layers.0.self_attn.q_proj.weight"], state["layers.0.attention.wq.weight"]
    half = config.head_dim // 2
    assert torch.equal(q[:half], old[: config.head_dim : 2])  # the first of each pair of neighbours
    assert torch.equal(q[half : 2 * half], old[1 : config.head_dim : 2])


def test_the_interleaved_rotation_computes_the_same(tmp_path: Path) -> None:
    """Scores of queries and keys, rotated as MiniMind did then and as it does now."""
    config = V1
    state = state_dict(config, "legacy")
    source = open_source(save_pth(tmp_path / "old.pth", state))
    today = torch.load(convert(source, PthTarget(source), tmp_path / "new.pth").path)
    x = torch.randn(12, config.hidden_size)
    d = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, d, 2) / d)
    angles = torch.outer(torch.arange(12), frequencies)

    def neighbours(rows: Tensor) -> Tensor:
        heads = (x @ rows.T).view(12, -1, d // 2, 2)
        rotated = torch.view_as_complex(heads) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(rotated).flatten(2)

    def halves(rows: Tensor) -> Tensor:
        heads = (x @ rows.T).view(12, -1, d)
        cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
        return heads * cos + torch.cat([-heads[..., d // 2 :], heads[..., : d // 2]], -1) * sin

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1))

    then = scores(*(neighbours(state[f"layers.1.attention.w{n}.weight"]) for n in "qk"))
    now = scores(*(halves(today[f"model.layers.1.self_attn.{n}_proj.weight"]) for n in "qk"))
    assert (then - now).abs().max() < 1e-4 < then.std()


def test_a_resume_file_and_wrapped_names_are_the_weights(tmp_path: Path) -> None:
    state = state_dict(GENERATIONS["minimind3"], "native", torch.float16)
    plain = whole(open_source(save_pth(tmp_path / "plain.pth", state)))
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}
    resume = {"model": wrapped, "optimizer": optimizer, "epoch": 1, "step": 7, "world_size": 1, "wandb_id": None}
    assert_same_bits(whole(open_source(save_pth(tmp_path / "full_sft_128_resume.pth", resume))), plain)


def test_a_config_tells_what_a_pth_does_not(tmp_path: Path) -> None:
    config = GENERATIONS["minimind2"].replace(num_heads=4, num_kv_heads=1, head_dim=32, rope_theta=500_000)
    path = save_pth(tmp_path / "odd.pth", state_dict(config, "native"))
    assert open_source(path).config != config  # eight heads are assumed
    (tmp_path / "config.json").write_text(json.dumps(to_native_config(config)))
    assert open_source(path, ModelConfig.from_hf_config(tmp_path)).config == config


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    state: dict[str, Any] = dict(state_dict(GENERATIONS["minimind3"], "native"))
    with pytest.raises(UserError, match=r"trap\.pth: names __builtin__.getattr"):
        open_source(save_pth(tmp_path / "trap.pth", {"model": state, "extra": Trap()}))
    assert not (tmp_path / "sprung").exists()


# Hugging Face directories


@pytest.mark.parametrize("model", SMALL)
def test_every_form_of_a_directory_is_the_same_model(model: str, tmp_path: Path) -> None:
    config = SMALL[model]
    state = state_dict(config, "hf")
    expected = whole(open_source(write_hf(tmp_path / "one", config, state)))
    names = list(state)
    halves = {"a": {n: state[n] for n in names[::2]}, "b": {n: state[n] for n in names[1::2]}}
    for form, ending, save in (("safe", "safetensors", save_file), ("bin", "bin", torch.save)):
        folder = write_hf(tmp_path / form, config, state)
        (folder / "model.safetensors").unlink()
        index = {name: f"{half}.{ending}" for half, part in halves.items() for name in part}
        stem = "model.safetensors" if form == "safe" else "pytorch_model.bin"
        (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": index}))
        for half, part in halves.items():
            save(part, folder / f"{half}.{ending}")
        assert_same_bits(whole(open_source(folder)), expected)
    if config.moe:
        assert_same_bits(whole(open_source(fused(tmp_path / "fused", config, state))), expected)


def fused(folder: Path, config: ModelConfig, state: dict[str, Tensor]) -> Path:
    """Experts stacked, and the config of transformers 5."""
    assert config.moe
    stacked = {name: tensor for name, tensor in state.items() if ".mlp.experts." not in name}
    for n in range(config.num_layers):
        p = f"model.layers.{n}.mlp.experts."
        experts = range(config.moe.num_experts)
        gate, up, down = (
            torch.stack([state[f"{p}{e}.{x}_proj.weight"] for e in experts]) for x in ("gate", "up", "down")
        )
        stacked |= {p + "gate_up_proj": torch.cat([gate, up], dim=1), p + "down_proj": down}
    write_hf(folder, config, stacked)
    raw = config_json(config)
    raw |= {"rope_parameters": {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}}
    raw |= {"dtype": raw.pop("torch_dtype"), "num_local_experts": raw.pop("num_experts")}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("model", ["minimind3", "minimind2", "minimind3_moe", "minimind2_moe"])
def test_minimind_s_own_directory_round_trips(model: str, tmp_path: Path) -> None:
    config = SMALL[model]
    source = open_source(write_hf(tmp_path / "hf", config, state_dict(config, "hf")))
    native = convert(source, HFTarget(source, native=True, folder=None), tmp_path / "native").path
    assert_same_bits(read_hf(native), state_dict_of(source, config))
    raw = json.loads((native / "config.json").read_text())
    assert raw["model_type"] == "minimind" and raw["torch_dtype"] == "float32"
    assert ("n_routed_experts" in raw) == model.startswith("minimind2")  # which it has for dense models too
    assert_same_bits(whole(open_source(native)), whole(source))


def state_dict_of(source: Source, config: ModelConfig) -> dict[str, Tensor]:
    from minimind_mcore.models import weights

    return weights.mcore_to_hf(whole(source), config, "native")


def test_a_config_of_before_2025_04_26_is_read(tmp_path: Path) -> None:
    raw = {
        "model_type": "minimind", "dim": 64, "n_layers": 4, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 6400,
        "hidden_dim": None, "multiple_of": 64, "norm_eps": 1e-5, "max_seq_len": 512, "dropout": 0.0, "use_moe": False,
        "n_routed_experts": 4, "n_shared_experts": True, "scoring_func": "softmax",
    }  # fmt: skip
    state = state_dict(V1, "legacy")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert open_source(tmp_path).config == V1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", SMALL)
def test_output_loads_with_transformers_and_computes_the_same(
    model: str, dtype: str, published_tokenizer: Path, tmp_path: Path
) -> None:
    import transformers

    config = SMALL[model].replace(vocab_size=6400, rope_theta=500_000)
    source = open_source(write_hf(tmp_path / "hf", config, state_dict(config, "hf"), rope_theta=5e5))
    source = cast(source, getattr(torch, dtype))
    target = HFTarget(source, native=False, folder=published_tokenizer)
    output = convert(source, target, tmp_path / "out").path
    model_ = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert model_.dtype == getattr(torch, dtype)
    assert model_.generation_config.eos_token_id == 2 and model_.generation_config.pad_token_id == 0
    rule = config.moe and dataclasses.replace(config.moe, router_weight="normalized")  # an export names the rule
    assert ModelConfig.from_hf_config(output) == config.replace(moe=rule)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert prompt.startswith("<|im_start|>") and "hello<|im_end|>" in prompt
    twin = transformers.AutoModelForCausalLM.from_config(config.hf_config()).float()
    twin.load_state_dict(in_memory(twin, {name: tensor.float() for name, tensor in whole(source).items()}, config))
    ids = torch.randint(0, 6400, (1, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(model_.float()(ids).logits, twin(ids).logits)


def in_memory(model: Any, tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    from minimind_mcore.models import weights

    state = weights.mcore_to_hf(tensors, config, weights.detect_form(model.state_dict()))
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def test_large_models_are_written_in_several_files(tmp_path: Path) -> None:
    import transformers

    config = SMALL["minimind3_moe"]
    state = state_dict(config, "hf")
    source = open_source(write_hf(tmp_path / "hf", config, state))
    out = convert(source, HFTarget(source, native=False, folder=None, shard_bytes=100_000), tmp_path / "out").path
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
    assert all(file.stat().st_size < 120_000 for file in files)
    assert_same_bits(read_hf(out), state)
    assert isinstance(transformers.AutoModelForCausalLM.from_pretrained(out), transformers.Qwen3MoeForCausalLM)


# Qwen2-MoE is not quite MiniMind2's mixture


def test_the_ungated_shared_expert_becomes_a_gated_one_and_comes_back(tmp_path: Path) -> None:
    config = PRESETS["minimind2_moe_tiny"]
    state = state_dict(config, "native", torch.float16)
    source = open_source(save_pth(tmp_path / "moe.pth", state))
    hf = convert(source, HFTarget(source, native=False, folder=None), tmp_path / "hf").path
    found = read_hf(hf)
    for n in range(config.num_layers):
        p = f"model.layers.{n}."
        assert not found[p + "mlp.shared_expert_gate.weight"].any()  # a gate of sigmoid(0) = 1/2
        assert torch.equal(
            found[p + "mlp.shared_expert.down_proj.weight"], 2 * state[p + "mlp.shared_experts.0.down_proj.weight"]
        )
        assert not any(found[f"{p}self_attn.{x}_proj.bias"].any() for x in "qkv")
    again = open_source(hf)
    back = convert(again, PthTarget(again), tmp_path / "back.pth").path
    assert_same_bits(torch.load(back), state)


def test_a_halving_that_loses_bits_is_refused(tmp_path: Path) -> None:
    config = SMALL["minimind2_moe"]
    state = state_dict(config, "hf", torch.float16)
    state["model.layers.1.mlp.shared_expert.down_proj.weight"][0, 0] = 6e-8  # the smallest there is
    source = open_source(write_hf(tmp_path / "hf", config, state))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.shared_expert\.down_proj.*--params-dtype fp32"):
        convert(source, MegatronTarget(source, ParallelLayout()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Vocabulary and dtype


def test_a_padded_vocabulary_is_trimmed_and_restored(tmp_path: Path) -> None:
    config = SMALL["minimind3"].replace(vocab_size=97, tie_embeddings=False)
    state = state_dict(config, "hf")
    source = open_source(write_hf(tmp_path / "hf", config, state))
    padded = resize_vocabulary(source, 100)
    mcore = convert(padded, MegatronTarget(padded, ParallelLayout(tp=2, pp=2)), tmp_path / "mcore").path
    tensors = read_mcore(mcore)
    assert tensors[f"mp_rank_01_000/model/{EMBEDDING}"].shape == (50, 32)
    assert not tensors[f"mp_rank_01_000/model/{EMBEDDING}"][47:].any()
    trimmed = resize_vocabulary(open_source(mcore), 97)
    back = convert(trimmed, HFTarget(trimmed, native=False, folder=None), tmp_path / "back").path
    assert_same_bits(read_hf(back), state)
    assert json.loads((back / "config.json").read_text())["vocab_size"] == 97


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    config = SMALL["minimind3"]
    state = state_dict(config, "hf")
    state["model.norm.weight"][3] = 70_000.0
    source = cast(open_source(write_hf(tmp_path / "hf", config, state)), torch.float16)
    with pytest.raises(UserError, match=r"final_layernorm\.weight: has NaN or infinite values .*float16"):
        convert(source, MegatronTarget(source, ParallelLayout()), tmp_path / "out")


def test_checkpoints_of_a_trained_model_keep_iteration_and_tokenizer(tmp_path: Path, published_tokenizer: Path) -> None:
    config = SMALL["minimind3"].replace(vocab_size=6400)
    hf = write_hf(tmp_path / "hf", config, state_dict(config, "hf"))
    shutil.copy(published_tokenizer / "tokenizer.json", hf)
    source = open_source(hf)
    source = source.replace(training=source.training.replace(iteration=300, consumed_samples=9600))
    first = convert(source, MegatronTarget(source, ParallelLayout(tp=2)), tmp_path / "one").path
    assert (first / "iter_0000300" / "mp_rank_01" / "model_optim_rng.pt").is_file()
    opened = open_source(first)
    second = open_source(convert(opened, MegatronTarget(opened, ParallelLayout(pp=2)), tmp_path / "two").path)
    assert second.training == source.training and second.training.fingerprint
    with pytest.raises(UserError, match="not the tokenizer that the model was trained with"):
        other = published_tokenizer.parent / ("v2" if published_tokenizer.name == "v3" else "v3")
        convert(second, HFTarget(second, native=False, folder=other), tmp_path / "out")


# what a directory may not do


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "{root}/elsewhere.safetensors", "a/../../x.safetensors"])
def test_an_index_points_nowhere_else(name: str, tmp_path: Path) -> None:
    config = SMALL["minimind3"]
    folder = write_hf(tmp_path / "hf", config, state_dict(config, "hf"))
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {key: name.format(root=tmp_path) for key in state_dict(config, "hf")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match=r"index\.json: names .* an index may not point anywhere else"):
        open_source(folder)


def test_modelling_code_is_copied_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = SMALL["minimind3"]
    folder = write_hf(tmp_path / "hf", config, state_dict(config, "hf"))
    (folder / "model_minimind.py").write_text("raise SystemExit('this is code')\n")
    source = open_source(folder)
    plain = convert(source, HFTarget(source, native=True, folder=None), tmp_path / "plain").path
    assert not (plain / "model_minimind.py").exists()
    assert "auto_map" not in json.loads((plain / "config.json").read_text())
    assert "was not copied: transformers would run this code" in capsys.readouterr().err
    source = open_source(folder)
    asked = convert(source, HFTarget(source, native=True, folder=None, copy_code=True), tmp_path / "asked").path
    assert (asked / "model_minimind.py").is_file() and "this code" in capsys.readouterr().err

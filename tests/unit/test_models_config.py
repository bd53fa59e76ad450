"""Presets have MiniMind's sizes, and every description of a model leads back to the same config."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minimind_mcore.arguments import parse
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import build_parser
from minimind_mcore.models import hf_config, recipes
from minimind_mcore.models.config import ModelConfig, MoEConfig
from minimind_mcore.models.presets import PRESETS, get_preset
from minimind_mcore.models.recipes import RECIPES, get_recipe
from minimind_mcore.preprocess.indexed import IndexedWriter

# jingyaogong/minimind, counted on its own models: all parameters, active ones.
PARAMETERS = {
    "minimind3": (63_912_192, 63_912_192),
    "minimind3_moe": (198_416_640, 63_936_768),
    "minimind2_small": (25_829_888, 25_829_888),
    "minimind2": (104_030_976, 104_030_976),
    "minimind2_moe": (145_029_760, 91_945_600),
    "minimind2_moe_768": (406_070_016, 255_075_072),
}


VARIANTS = {
    **PRESETS,
    "untied": PRESETS["minimind3_tiny"].replace(tie_embeddings=False),
    "unnormalised": PRESETS["minimind3_moe_tiny"].replace(
        moe=MoEConfig(topk=2, ffn_hidden_size=64, norm_topk_prob=False, load_balancing="aux_loss", aux_loss_coeff=0.25)
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    config = PRESETS[name]
    assert (config.num_parameters(), config.num_active_parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_preset_has_a_tiny_variant_that_divides(name: str) -> None:
    tiny = PRESETS[f"{name}_tiny"]
    assert tiny.num_kv_heads % 2 == 0 and tiny.num_layers % 4 == 0
    assert tiny.num_parameters() < 10_000_000
    assert (tiny.moe is None) == (PRESETS[name].moe is None)
    assert hf_config.hf_model_type(tiny) == hf_config.hf_model_type(PRESETS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_megatron_flags_lead_back_to_the_config(name: str) -> None:
    config = VARIANTS[name]
    assert ModelConfig.from_args(build_parser().parse_args(config.megatron_flags())) == config


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_config_leads_back_to_the_config(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    config.hf_config().save_pretrained(tmp_path)
    assert ModelConfig.from_hf_config(tmp_path) == config
    assert ModelConfig.from_hf_config(str(tmp_path / "config.json")) == config
    assert ModelConfig.from_hf_config(config.hf_config().to_dict()) == config


@pytest.mark.parametrize("name", VARIANTS)
def test_minimind_config_leads_back_to_the_config(name: str) -> None:
    native = json.loads(json.dumps(hf_config.to_native_config(VARIANTS[name])))
    assert ModelConfig.from_hf_config(native) == VARIANTS[name]


def test_transformers_4_config_is_read() -> None:
    raw = {
        "model_type": "qwen3_moe", "vocab_size": 6400, "hidden_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 448,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "float16",
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "sliding_window": None, "num_experts": 4,
        "num_experts_per_tok": 1, "moe_intermediate_size": 448, "norm_topk_prob": True, "router_aux_loss_coef": 5e-4,
    }  # fmt: skip
    assert ModelConfig.from_hf_config(raw) == PRESETS["minimind3_moe_tiny"]


def test_dense_minimind_config_that_lists_experts_is_dense() -> None:
    native = hf_config.to_native_config(PRESETS["minimind3"])
    assert native["num_experts"] == 4 and native["use_moe"] is False
    assert ModelConfig.from_hf_config(native).moe is None


def test_old_minimind2_config_without_intermediate_size_gets_its_formula() -> None:
    native = hf_config.to_native_config(PRESETS["minimind2"]) | {"intermediate_size": None}
    assert ModelConfig.from_hf_config(native) == PRESETS["minimind2"]


def test_several_experts_per_token_of_minimind3_scale_the_aux_loss() -> None:
    # Upstream's load has shape [k, experts] and its sum over k is not divided: k times the Switch loss.
    native = hf_config.to_native_config(PRESETS["minimind3_moe"]) | {"num_experts_per_tok": 2}
    moe = ModelConfig.from_hf_config(native).moe
    assert moe is not None and moe.aux_loss_coeff == 2 * 5e-4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention_bias": True}, "attention_bias: found True, expected False"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope scaling: found 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rope scaling: found 'linear'"),
        ({"rope_parameters": {"rope_theta": 10000.5}}, "rope_theta: found 10000.5"),
        ({"model_type": "gemma3"}, "model_type: found 'gemma3'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
    ],
)
def test_unsupported_hf_config_is_named(change: dict[str, object], says: str) -> None:
    raw = PRESETS["minimind3_tiny"].hf_config().to_dict() | change
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        ModelConfig.from_hf_config(raw)


@pytest.mark.parametrize(
    ("flag", "says"),
    [("--swiglu", "--swiglu"), ("--disable-bias-linear", "--disable-bias-linear"), ("--num-layers", "--num-layers")],
)
def test_missing_megatron_flag_is_named(flag: str, says: str) -> None:
    words = PRESETS["minimind3"].megatron_flags()
    start = words.index(flag)
    del words[start : start + (2 if flag == "--num-layers" else 1)]
    with pytest.raises(UserError, match=says):
        ModelConfig.from_args(build_parser().parse_args(words))


def test_broken_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        ModelConfig.from_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON"):
        ModelConfig.from_hf_config(tmp_path)


def test_wrong_preset_name_suggests_the_nearest() -> None:
    assert get_preset("MiniMind3-MoE") is PRESETS["minimind3_moe"]
    with pytest.raises(UserError, match="Did you mean minimind2_moe"):
        get_preset("minimind2_mo")
    with pytest.raises(UserError, match="Did you mean minimind3_pretrain"):
        get_recipe("minimind3_pretrian")


def test_flops_follow_the_stated_formula() -> None:
    config = PRESETS["minimind3"]
    active = 63_912_192 - 6400 * 768  # without the embedding, which is the output layer's weight too
    assert config.flops_per_token(512) == 6 * active + 6 * 6400 * 768 + 6 * 8 * 768 * 512
    assert config.flops_per_token(512, frozen=True) == 4 * active + 4 * 6400 * 768 + 6 * 8 * 768 * 512


def test_recipe_gives_megatron_minimind_hyper_parameters() -> None:
    flags = RECIPES["minimind3_pretrain"].megatron_flags(data_parallel_size=2)
    values = dict(itertools.pairwise(flags))
    assert float(values["--lr"]) == 5e-4 and float(values["--min-lr"]) == 5e-5
    assert values["--global-batch-size"] == "512" and values["--seq-length"] == "340"
    assert "--decay-all" in flags and values["--minimind-init"] == "normal"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_flags_are_known_to_the_training_program(name: str) -> None:
    words = PRESETS["minimind3"].megatron_flags() + RECIPES[name].megatron_flags()
    args = parse(words, posttrain=not name.endswith("pretrain"))
    assert args.lr == RECIPES[name].lr and args.minimind_init == RECIPES[name].init


def test_flags_are_printed_without_importing_torch() -> None:
    program = (
        "import sys; from minimind_mcore.models import presets, recipes; sys.argv[1:] = ['minimind3']; "
        "presets.main(); assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == PRESETS["minimind3"].megatron_flags()


def printed_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    monkeypatch.setattr(sys, "argv", ["recipes", *words])
    recipes.main()
    return dict(itertools.pairwise(capsys.readouterr().out.split("\n")))


def test_micro_batch_leaves_the_global_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = printed_recipe(monkeypatch, capsys, "--model", "minimind3", "--micro-batch-size", "4")
    assert (flags["--micro-batch-size"], flags["--global-batch-size"]) == ("4", "256")
    with pytest.raises(UserError, match=r"a global batch of 256 .* micro-batches of 7"):
        printed_recipe(monkeypatch, capsys, "minimind3_pretrain", "--micro-batch-size", "7")


def test_iterations_are_epochs_of_the_training_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for prefix, tokens in ((a, 256_000), (b, 512_000)):
        with IndexedWriter(prefix) as writer:
            writer.add(np.zeros(tokens, np.uint32), np.array([tokens]))
    assert recipes.count_samples([a, b], 256) == recipes.count_samples(["0.3", a, "7", b], 256) == 3000
    assert recipes.count_samples([a], 256) == 1000
    with IndexedWriter(f"{b}_packed_chosen_input_ids_document") as writer:
        writer.add(np.zeros(90), np.full(30, 3))
    assert recipes.count_samples([b], 256) == 30
    flags = printed_recipe(
        monkeypatch, capsys, "--model", "minimind3_tiny", "--split", "90,10,0", "--data", a, "--epochs", "2"
    )
    assert flags["--train-iters"] == str(2 * 900 // 16)


def test_the_recipe_suits_the_model(tmp_path: Path) -> None:
    for model, recipe in (
        ("MiniMind3-MoE-Tiny", "tiny_pretrain"),
        ("minimind2-small", "minimind2_pretrain"),
        ("minimind3_moe", "minimind3_pretrain"),
    ):
        assert recipes.recipe_for(model) == recipe
    assert recipes.recipe_for("minimind2", "lora") == "minimind2_lora"
    PRESETS["minimind2"].hf_config().save_pretrained(tmp_path)
    assert recipes.recipe_for(str(tmp_path)) == "minimind2_pretrain"
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        recipes.recipe_for(str(tmp_path / "no" / "config.json"))

"""`--pad-head-dim 128`: a Hugging Face directory with larger heads that computes the same function.

The reference is transformers: the directory of the model before, and the padded one, both loaded by the library.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import ROOT
from helpers.inference_models import run_inference, twin, write_pth
from helpers.weights_on_disk import read_hf, state_dict, write_hf

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.converters.convert import convert
from minimind_mcore.converters.main import main_v2
from minimind_mcore.converters.megatron import MegatronTarget
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import PRESETS


def shrunk(name: str) -> ModelConfig:
    """A preset with its own head size and number of heads, and little else."""
    config = PRESETS[name]
    moe = config.moe and replace(
        config.moe, ffn_hidden_size=96, shared_ffn_hidden_size=96 if config.moe.shared_ffn_hidden_size else 0
    )
    return config.replace(vocab_size=160, hidden_size=64, num_layers=2, ffn_hidden_size=96, moe=moe)


NAMES = ["minimind3", "minimind3_moe", "minimind2_small", "minimind2", "minimind2_moe", "minimind2_moe_768"]
CONFIGS = {name: shrunk(name) for name in NAMES} | {"minimind3_tiny": PRESETS["minimind3_tiny"]}


def test_every_preset_is_here() -> None:
    sizes = {config.head_dim for name, config in PRESETS.items() if not name.endswith("_tiny")}
    assert sizes == {config.head_dim for name, config in CONFIGS.items() if not name.endswith("_tiny")}


def write(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    return write_hf(folder, config, state_dict(config, "hf", dtype), **changes)


def pad(source: Path, target: Path, *flags: str, size: int = 128) -> Path:
    main_v2(["--save-model-type", "hf", "--load-dir", str(source), "--save-dir", str(target), *flags,
             "--pad-head-dim", str(size)])  # fmt: skip
    return target


@torch.no_grad()
def logits(folder: Path, tokens: int) -> torch.Tensor:
    model = twin(folder)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(3))
    found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_padded_model_computes_the_same(name: str, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", CONFIGS[name])
    padded = pad(plain, tmp_path / "padded")
    shapes = {key.rpartition("layers.0.")[2]: tuple(tensor.shape) for key, tensor in read_hf(padded).items()}
    assert shapes["self_attn.k_proj.weight"][0] == 128 * CONFIGS[name].num_kv_heads
    assert json.loads((padded / "config.json").read_text())["head_dim"] == 128
    expected, found = logits(plain, 512), logits(padded, 512)
    assert expected.abs().max() > 0.5
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (found - expected).abs().max() < 1e-4


def test_yarn_scales_the_same_frequencies(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048, "beta_fast": 32.0,
               "beta_slow": 1.0, "attention_factor": 1.0}  # fmt: skip
    plain = write(tmp_path / "plain", CONFIGS["minimind3"], rope_scaling=scaling)
    padded = pad(plain, tmp_path / "padded")
    expected, found = logits(plain, 512), logits(padded, 512)
    assert (logits(write(tmp_path / "unscaled", CONFIGS["minimind3"]), 512) - expected).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["pth", "native", "torch", "torch tp 2", "torch_dist"])
def test_pads_from_every_form(form: str, tmp_path: Path) -> None:
    """The same bytes, whatever they come from."""
    config = CONFIGS["minimind2"]
    plain = write(tmp_path / "plain", config)
    expected = read_hf(pad(plain, tmp_path / "expected"))
    other, kept = tmp_path / "other", ["--hf-cfg-dir", str(plain)]
    if form == "pth":
        other = tmp_path / "other.pth"
        write_pth(other, config)
    elif form == "native":
        main_v2(["--save-model-type", "hf", "--format", "minimind", "--load-dir", str(plain), "--save-dir", str(other)])
        kept = []
    elif form == "torch_dist":  # megatron-core writes it, which wants a process of its own
        words = ["convert_ckpt_v2.py", "--load-dir", plain, "--save-dir", other, "--ckpt-format", "torch_dist"]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, timeout=120)
    else:
        source = open_source(plain)
        convert(source, MegatronTarget(source, ParallelLayout(tp=2 if form.endswith("2") else 1)), other)
    found = read_hf(pad(other, tmp_path / "found", *kept))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_one_tensor_a_layer(dtype: torch.dtype, tmp_path: Path) -> None:
    """With a norm of queries and keys only the weight of the norm of the keys is multiplied."""
    config = CONFIGS["minimind3"]
    plain = read_hf(write(tmp_path / "plain", config, dtype))
    padded = read_hf(pad(tmp_path / "plain", tmp_path / "padded"))
    half, rows = config.head_dim // 2, padded["model.layers.1.self_attn.q_proj.weight"].unflatten(0, (-1, 2, 64))
    assert torch.equal(rows[:, :, :half], plain["model.layers.1.self_attn.q_proj.weight"].unflatten(0, (-1, 2, half)))
    assert not rows[:, :, half:].any() and rows.dtype == dtype
    norm = padded["model.layers.1.self_attn.k_norm.weight"].view(2, 64)[:, :half].flatten()
    wanted = plain["model.layers.1.self_attn.k_norm.weight"].double() * (96 / 128) ** 0.5
    assert torch.equal(norm, wanted.to(dtype))


def test_the_conversion_prints_the_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write(tmp_path / "plain", CONFIGS["minimind2_moe"])
    pad(plain, tmp_path / "padded", "--verify", "logits")
    printed = capsys.readouterr().out
    assert "padded heads, 2,048 tokens: largest difference of the logits" in printed
    assert "logits of 512 tokens: largest difference" in printed and "argmax equal in 100.0 %" in printed


def test_a_padded_directory_generates(tmp_path: Path, tokenizer: str) -> None:
    """With the kit's own decoder; the flags of a model that are not given are not compared."""
    vocab = len(json.loads((Path(tokenizer) / "tokenizer.json").read_text())["model"]["vocab"]) + 64
    plain = write(tmp_path / "plain", CONFIGS["minimind3"].replace(vocab_size=vocab))
    padded = pad(plain, tmp_path / "padded", "--tokenizer-name-or-path", tokenizer)
    flags = ["--tokenizer-name-or-path", tokenizer, "--prompt", "a b c", "--max-new-tokens", "12", "--raw"]
    rows = [run_inference(folder, tmp_path / f"{folder.name}.jsonl", *flags) for folder in (plain, padded)]
    assert rows[0][0]["completion"] == rows[1][0]["completion"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load-model-type", "hf", "--save-model-type", "mg"], "unpadded_head_dim"),
        (["--save-model-type", "hf", "--format", "minimind"], "unpadded_head_dim"),
        (["--save-model-type", "hf", "--pad-head-dim", "192"], "padded already, from 96 to 128"),
    ],
)
def test_a_padded_directory_is_not_taken_for_minimind(flags: list[str], message: str, tmp_path: Path) -> None:
    padded = pad(write(tmp_path / "plain", CONFIGS["minimind3"]), tmp_path / "padded")
    with pytest.raises(UserError, match=message):
        main_v2([*flags, "--load-dir", str(padded), "--save-dir", str(tmp_path / "back")])
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("minimind3", ["--pad-head-dim", "96"], "have size 96, expected a larger size"),
        ("minimind3", ["--pad-head-dim", "64"], "have size 96, expected a larger size"),
        ("minimind3", ["--pad-head-dim", "129"], "expected an even number"),
        ("minimind3", ["--pad-head-dim", "128", "--format", "minimind"], "only a Hugging Face directory"),
        ("minimind2_tiny", ["--pad-head-dim", "128"], "would become 1e.48, which exceeds float32"),
        ("minimind2_tiny", ["--pad-head-dim", "65536"], "exceeds float32"),
    ],
)
def test_what_cannot_be_padded_is_refused(name: str, flags: list[str], message: str, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", CONFIGS.get(name, PRESETS[name]))
    with pytest.raises(UserError, match=message):
        main_v2(["--save-model-type", "hf", "--load-dir", str(plain), "--save-dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_a_megatron_checkpoint_is_not_padded(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", CONFIGS["minimind3"])
    with pytest.raises(UserError, match="only a Hugging Face directory"):
        main_v2(["--load-dir", str(plain), "--save-dir", str(tmp_path / "out"), "--pad-head-dim", "128"])


def test_a_changed_base_is_noticed(tmp_path: Path) -> None:
    padded = pad(write(tmp_path / "plain", CONFIGS["minimind2_moe"]), tmp_path / "padded")
    file = padded / "config.json"
    content = json.loads(file.read_text())
    assert content["rope_theta"] == pytest.approx(1e6 ** (128 / 80), rel=1e-12)
    content["rope_theta"] = content["rope_parameters"]["rope_theta"] = 1e6
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not the base of heads padded by --pad-head-dim"):
        open_source(padded)

"""`inference_rope_scaling: true` is MiniMind's YaRN, in conversion, generation and export.

The reference is a decoder in plain torch with the formula of jingyaogong/minimind, model/model_minimind.py (d65ef2c): a
frequency f becomes f (1 - r + r / 16), with r from 0 to 1 between the frequencies that turn 32 times and once in 2048
tokens. MINIMIND_DIR (a checkout of MiniMind) and TRANSFORMERS_4_DIR name upstream's own class and transformers 4.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.engine import ROOT
from helpers.weights_on_disk import SMALL, state_dict
from safetensors.torch import save_file
from torch import Tensor

from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.converters.main import main_v2
from minimind_mcore.errors import UserError
from minimind_mcore.inference.decoder import Cache, Decoder
from minimind_mcore.inference.loading import build_model
from minimind_mcore.models.config import ModelConfig

MODELS = ("minimind3", "minimind2")
THETA = 1e6


def native_json(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    """MiniMind's config.json, by hand."""
    return {
        "model_type": "minimind", "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.ffn_hidden_size, "hidden_act": "silu", "rms_norm_eps": config.norm_eps,
        "rope_theta": THETA, "max_position_embeddings": 32768, "tie_word_embeddings": True, "use_moe": False,
        "dropout": 0.0, "flash_attn": True, "inference_rope_scaling": True,
        **({} if config.qk_layernorm else {"n_routed_experts": 4, "n_shared_experts": 1}),
        **changes,
    }  # fmt: skip


def write_native(folder: Path, config: ModelConfig, **changes: Any) -> Path:
    folder.mkdir()
    state = state_dict(config, "native")
    state.pop("lm_head.weight", None)  # tied
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(native_json(config, **changes)), encoding="utf-8")
    return folder


def frequencies(head_dim: int, scaled: bool) -> Tensor:
    """The rotation of each pair of a head for one token, in float64."""
    plain = torch.tensor([THETA ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)
    if not scaled:
        return plain
    # The number of the frequency that turns so many times in 2048 tokens solves 2048 f / (2 pi) = turns.
    low, high = (head_dim / 2 * math.log(2048 / (2 * math.pi * turns), THETA) for turns in (32.0, 1.0))
    low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim // 2 - 1)
    numbers = torch.arange(head_dim // 2, dtype=torch.float64)
    rise = ((numbers - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - rise + rise / 16)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@torch.no_grad()
def reference_logits(config: ModelConfig, ids: Tensor, scaled: bool = True) -> Tensor:
    """A MiniMind without experts, in plain torch and float64."""
    w = {name: tensor.double() for name, tensor in state_dict(config, "native").items()}
    length, d = ids.shape[1], config.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies(d, scaled)).repeat(1, 2)

    def rotated(x: Tensor) -> Tensor:  # [batch, heads, length, d]
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config.num_layers):
        p = f"model.layers.{layer}."
        y = norm(x, w[p + "input_layernorm.weight"], config.norm_eps)
        q, k, v = (
            (y @ w[f"{p}self_attn.{name}_proj.weight"].T).view(*ids.shape, -1, d).transpose(1, 2) for name in "qkv"
        )
        if config.qk_layernorm:
            q, k = (norm(t, w[f"{p}self_attn.{n}_norm.weight"], config.norm_eps) for n, t in (("q", q), ("k", k)))
        q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(config.num_heads // config.num_kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[p + "self_attn.o_proj.weight"].T
        y = norm(x, w[p + "post_attention_layernorm.weight"], config.norm_eps)
        gate, up = (y @ w[f"{p}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"], config.norm_eps) @ w["model.embed_tokens.weight"].T


def assert_logits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=0)


IDS = torch.randint(0, 96, (2, 48), generator=torch.Generator().manual_seed(3))

TRANSFORMERS = """
import sys, torch, transformers
ids = torch.load(sys.argv[1])
with torch.no_grad():
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], attn_implementation="eager").float().eval()
    torch.save(model(ids).logits, sys.argv[3])
"""
MEGATRON = """
import sys, torch
from pathlib import Path
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.converters.probe import megatron_logits
source = open_source(Path(sys.argv[2]))
with torch.no_grad():
    torch.save(megatron_logits(source.config, source.tensors, torch.load(sys.argv[1])), sys.argv[3])
"""
UPSTREAM = """
import json, sys, torch
sys.path.insert(0, sys.argv[4])
from safetensors.torch import load_file
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
raw = json.load(open(sys.argv[2] + "/config.json"))
model = MiniMindForCausalLM(MiniMindConfig(**{k: v for k, v in raw.items() if k != "model_type"})).eval()
model.load_state_dict(load_file(sys.argv[2] + "/model.safetensors"), strict=False)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[1])).logits, sys.argv[3])
"""


def run(program: str, model: Path, folder: Path, *more: str, path: str = "") -> Tensor:
    torch.save(IDS, folder / "ids.pt")
    environment = os.environ | {"DEVICE": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(ROOT)]))
    command = [sys.executable, "-c", program, str(folder / "ids.pt"), str(model), str(folder / "logits.pt"), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Tensor = torch.load(folder / "logits.pt")
    return found


def convert(load: Path, save: Path, to: str, *flags: str) -> Path:
    main_v2(["--load-dir", str(load), "--save-dir", str(save), "--save-model-type", to, *flags])
    return save


@pytest.mark.parametrize("name", MODELS)
def test_generation_and_exports_compute_minimind_s_yarn(name: str, tmp_path: Path) -> None:
    config = SMALL[name]
    expected = reference_logits(config, IDS)
    assert (expected - reference_logits(config, IDS, scaled=False)).abs().max() > 1e-2  # or nothing is shown
    native = write_native(tmp_path / "native", config)
    model = build_model(open_source(native))
    with torch.no_grad():
        assert_logits(model(IDS).logits, expected)
        assert_logits(Decoder(model)(IDS, Cache(2)), expected[:, -1])
    exported = convert(native, tmp_path / "hf", "hf")
    assert_logits(run(TRANSFORMERS, exported, tmp_path), expected)
    if older := os.environ.get("TRANSFORMERS_4_DIR"):
        assert_logits(run(TRANSFORMERS, exported, tmp_path, path=older), expected)
    raw = json.loads((exported / "config.json").read_text())["rope_scaling"]
    assert raw["attention_factor"] == 1.0
    assert raw["attn_factor"] * (0.1 * math.log(raw["factor"]) + 1) == pytest.approx(1.0)  # what vLLM multiplies by
    again = convert(exported, tmp_path / "again", "hf", "--format", "minimind")
    assert json.loads((again / "config.json").read_text())["inference_rope_scaling"] is True


@pytest.mark.parametrize(("name", "form"), [("minimind3", "torch"), ("minimind2", "torch_dist")])
def test_megatron_checkpoints_keep_it(name: str, form: str, tmp_path: Path) -> None:
    config = SMALL[name]
    expected = reference_logits(config, IDS)
    native = write_native(tmp_path / "native", config)
    command = [sys.executable, str(ROOT / "convert_ckpt_v2.py"), "--load-dir", str(native)]
    command += ["--save-dir", str(tmp_path / "mg"), "--save-model-type", "mg", "--ckpt-format", form]
    done = subprocess.run(command, env=os.environ | {"DEVICE": "cpu"}, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_logits(run(MEGATRON, tmp_path / "mg", tmp_path), expected)
    back = open_source(convert(tmp_path / "mg", tmp_path / "hf", "hf"))
    with torch.no_grad():
        assert_logits(build_model(back)(IDS).logits, expected)


def test_upstream_s_own_class_computes_the_same(tmp_path: Path) -> None:
    home, older = os.environ.get("MINIMIND_DIR"), os.environ.get("TRANSFORMERS_4_DIR")
    if not home or not older:
        pytest.skip("MINIMIND_DIR or TRANSFORMERS_4_DIR is not set: no class of MiniMind to compare with")
    config = SMALL["minimind3"]
    native = write_native(tmp_path / "native", config)
    theirs = run(UPSTREAM, native, tmp_path, home, path=older)
    assert_logits(theirs, reference_logits(config, IDS))
    with torch.no_grad():
        assert_logits(build_model(open_source(native))(IDS).logits, theirs)


def test_up_to_2048_positions_minimind_does_not_scale(tmp_path: Path) -> None:
    native = write_native(tmp_path / "native", SMALL["minimind3"], max_position_embeddings=2048)
    with torch.no_grad():
        logits = build_model(open_source(native))(IDS).logits
    assert_logits(logits, reference_logits(SMALL["minimind3"], IDS, scaled=False))


YARN = {
    "type": "yarn", "factor": 16, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1,
    "attention_factor": 1.0,
}  # fmt: skip


def test_the_rope_scaling_that_minimind_s_class_writes_is_read() -> None:
    config = SMALL["minimind3"]
    assert ModelConfig.from_hf_config(native_json(config, rope_scaling=YARN)) == config.replace(
        inference_rope_scaling=True
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_scaling": YARN | {"factor": 4, "beta_fast": 4}}, "rope scaling: found 'yarn'.*expected none, or MiniM"),
        ({"rope_scaling": YARN | {"attention_factor": 1.2}}, "expected none, or MiniMind's YaRN"),
        ({"rope_scaling": YARN, "inference_rope_scaling": False}, "inference_rope_scaling is false"),
    ],
)
def test_other_scalings_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ModelConfig.from_hf_config(native_json(SMALL["minimind3"], **changes))

"""Models with random weights in files, for tests: written with the libraries that users write them with."""

from __future__ import annotations

import itertools
import json
import random
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind_mcore import arguments
from minimind_mcore.checkpoint.files import NAME
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.tracker import TRACKER
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig, MoEConfig
from minimind_mcore.models.hf_config import hf_model_type

# Small, and with four key-value heads and eight layers, so that every size of the grid divides them.
_DENSE3 = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    ffn_hidden_size=48,
    qk_layernorm=True,
    norm_eps=1e-6,
)
_DENSE2 = _DENSE3.replace(qk_layernorm=False, norm_eps=1e-5, head_dim=4)
MODELS = {
    "minimind3": _DENSE3,
    "minimind2": _DENSE2,
    "minimind3_moe": _DENSE3.replace(
        moe=MoEConfig(topk=1, ffn_hidden_size=48, load_balancing="aux_loss", aux_loss_coeff=5e-4)
    ),
    "minimind2_moe": _DENSE2.replace(
        moe=MoEConfig(
            topk=2,
            ffn_hidden_size=48,
            shared_ffn_hidden_size=48,
            load_balancing="seq_aux_loss",
            aux_loss_coeff=0.01,
        )
    ),
}
# Two key-value heads and four layers; an MiniMind2 has eight heads, or its .pth could not be told.
SMALL = {name: config.replace(num_layers=4, num_kv_heads=2, vocab_size=96) for name, config in MODELS.items()}


def state_dict(config: ModelConfig, form: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Tensor]:
    """Random weights: norms near 1, a router that decides, zeros where Qwen2-MoE must have them."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for rule in weights.rules(config, form):
        for name, shape in zip(rule.hf, rule.shapes, strict=True):
            if not rule.written:
                continue
            noise = torch.randn(shape, generator=generator)
            value = 1 + 0.1 * noise if len(shape) == 1 else 0.15 * noise
            state[name] = (torch.zeros(shape) if isinstance(rule, weights.Zeros) else value).to(dtype)
            if isinstance(rule, weights.Doubled):
                state[name] = state[name] * 2  # as whoever wrote it did
    for output, embedding in (("lm_head", "model.embed_tokens"), ("output", "tok_embeddings")):
        if config.tie_embeddings and f"{output}.weight" in state:
            state[f"{output}.weight"] = state[f"{embedding}.weight"]
    return state


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json of transformers 4, written out by hand."""
    fields: dict[str, Any] = {
        "model_type": hf_model_type(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_hidden_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": 1e6,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
    }
    if moe := config.moe:
        fields |= {
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.topk,
            "norm_topk_prob": moe.norm_topk_prob,
            **({"router_weight": moe.router_weight} if moe.router_weight else {}),
            "moe_intermediate_size": moe.ffn_hidden_size,
            "router_aux_loss_coef": moe.aux_loss_coeff,
        }
        if moe.shared_ffn_hidden_size:
            fields["shared_expert_intermediate_size"] = moe.shared_ffn_hidden_size
    return fields


def write_hf(folder: Path, config: ModelConfig, state: dict[str, Tensor], **changes: Any) -> Path:
    """A directory of transformers with one file of safetensors."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(config) | changes), encoding="utf-8")
    return folder


def read_hf(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory of transformers, by the library."""
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def read_mcore(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Megatron checkpoint, by torch; "mp_rank_00_001/model/NAME"."""
    tensors = {}
    for file in sorted(folder.glob("iter_*/mp_rank_*/model_optim_rng.pt")):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None, f"{file}: a record has another CRC-32"
        content = torch.load(file, weights_only=False)
        for chunk in (key for key in content if key.startswith("model")):
            tensors |= {f"{file.parent.name}/{chunk}/{name}": t for name, t in content[chunk].items()}
    return tensors


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, shapes, dtypes and bytes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        same = torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        assert same, f"{name} differs"


def pairwise(grid: dict[str, Sequence[Any]], valid: Callable[..., bool]) -> list[dict[str, Any]]:
    """A small part of a grid in which every pair of values that occurs in the whole occurs."""
    cases = list(whole_grid(grid, valid))
    random.Random(1).shuffle(cases)

    def pairs(case: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations(sorted((k, str(v)) for k, v in case.items()), 2))

    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def whole_grid(grid: dict[str, Sequence[Any]], valid: Callable[..., bool]) -> Iterator[dict[str, Any]]:
    """Every valid combination."""
    for values in itertools.product(*grid.values()):
        case = dict(zip(grid, values, strict=True))
        if valid(**case):
            yield case


def write_arguments(root: Path, flags: Sequence[str]) -> Path:
    """A Megatron checkpoint with its arguments and no tensor: what is told of one before it is loaded."""
    args = arguments.parse(flags)
    for folder in ParallelLayout.from_args(args).folders():
        file = root / "iter_0000001" / folder / NAME
        file.parent.mkdir(parents=True)
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": {}}, file)
    (root / TRACKER).write_text("1")
    return root

"""Megatron checkpoints are what MindSpeed-LLM reads: names, shapes and values of every rank.

The tables are written from MindSpeed-LLM 26.1.0's layout (what its converter and its training wrote in a run),
and the values are cut here by row numbers; nothing of the converters' own tables is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.weights_on_disk import state_dict, write_hf
from torch import Tensor

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.converters.convert import convert
from minimind_mcore.converters.megatron import MegatronTarget
from minimind_mcore.models.config import ModelConfig, MoEConfig

# The model of MindSpeed-LLM's run: 4 layers, hidden 128, 8 query and 4 key-value heads of 16, MLP 384.
DENSE = ModelConfig(
    hidden_size=128,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    ffn_hidden_size=384,
    qk_layernorm=True,
    norm_eps=1e-6,
)
MOE = DENSE.replace(moe=MoEConfig(topk=2, ffn_hidden_size=96, load_balancing="aux_loss", aux_loss_coeff=1e-3))
ATTENTION = {
    "input_layernorm.weight": (128,),
    "self_attention.linear_qkv.weight": (256, 128),
    "self_attention.linear_proj.weight": (128, 128),
    "self_attention.q_layernorm.weight": (16,),
    "self_attention.k_layernorm.weight": (16,),
    "pre_mlp_layernorm.weight": (128,),
}
ATTENTION_TP2 = ATTENTION | {
    "self_attention.linear_qkv.weight": (128, 128),
    "self_attention.linear_proj.weight": (128, 64),
}
MLP = {"mlp.linear_fc1.weight": (768, 128), "mlp.linear_fc2.weight": (128, 384)}
MLP_TP2 = {"mlp.linear_fc1.weight": (384, 128), "mlp.linear_fc2.weight": (128, 192)}
EMBEDDING, OUTPUT, NORM = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"


def layers(numbers: list[int], *tables: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"decoder.layers.{n}.{name}": shape for n in numbers for table in tables for name, shape in table.items()}


def converted(folder: Path, config: ModelConfig, layout: ParallelLayout) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The Hugging Face weights, and what torch loads from each file of the checkpoint, by folder."""
    state = state_dict(config, "hf")
    source = open_source(write_hf(folder / "hf", config, state))
    root = convert(source, MegatronTarget(source, layout), folder / "mcore").path
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "1"
    files = sorted((root / "iter_0000001").glob("*/model_optim_rng.pt"))
    return state, {file.parent.name: torch.load(file, weights_only=False) for file in files}


def shapes(chunk: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in chunk.items()}


def layer(state: dict[str, Tensor], number: int, name: str) -> Tensor:
    return state[f"model.layers.{number}.{name}.weight"]


def qkv_rows(state: dict[str, Tensor], number: int, groups: range) -> Tensor:
    """For each group: its two query heads, its key head, its value head, of 16 rows each."""
    q, k, v = (layer(state, number, f"self_attn.{x}_proj") for x in "qkv")
    heads = [[q[32 * g : 32 * g + 32], k[16 * g : 16 * g + 16], v[16 * g : 16 * g + 16]] for g in groups]
    return torch.cat([rows for group in heads for rows in group])


def test_tensor_parallel_dense(tmp_path: Path) -> None:
    state, files = converted(tmp_path, DENSE, ParallelLayout(tp=2))
    assert list(files) == ["mp_rank_00", "mp_rank_01"]
    # tied on a single stage: no output layer
    expected = {EMBEDDING: (3200, 128), **layers([0, 1, 2, 3], ATTENTION_TP2, MLP_TP2), NORM: (128,)}
    for rank, content in enumerate(files.values()):
        model = content["model"]
        assert shapes(model) == expected
        assert torch.equal(model[EMBEDDING], state["model.embed_tokens.weight"][3200 * rank : 3200 * rank + 3200])
        for n in range(4):
            prefix = f"decoder.layers.{n}."
            assert torch.equal(
                model[prefix + "self_attention.linear_qkv.weight"],
                qkv_rows(state, n, range(2 * rank, 2 * rank + 2)),
            )
            columns = slice(64 * rank, 64 * rank + 64)
            assert torch.equal(
                model[prefix + "self_attention.linear_proj.weight"], layer(state, n, "self_attn.o_proj")[:, columns]
            )
            half = slice(192 * rank, 192 * rank + 192)
            gate, up = layer(state, n, "mlp.gate_proj")[half], layer(state, n, "mlp.up_proj")[half]
            assert torch.equal(model[prefix + "mlp.linear_fc1.weight"], torch.cat([gate, up]))
            assert torch.equal(model[prefix + "mlp.linear_fc2.weight"], layer(state, n, "mlp.down_proj")[:, half])
            assert torch.equal(model[prefix + "pre_mlp_layernorm.weight"], layer(state, n, "post_attention_layernorm"))
            assert torch.equal(model[prefix + "self_attention.k_layernorm.weight"], layer(state, n, "self_attn.k_norm"))


@pytest.mark.parametrize("tied", [True, False])
def test_pipeline(tied: bool, tmp_path: Path) -> None:
    state, files = converted(tmp_path, DENSE.replace(tie_embeddings=tied), ParallelLayout(pp=2))
    assert list(files) == ["mp_rank_00_000", "mp_rank_00_001"]
    first, last = (content["model"] for content in files.values())
    assert shapes(first) == {EMBEDDING: (6400, 128), **layers([0, 1], ATTENTION, MLP)}
    # numbers begin again in each stage; a tied embedding is copied to the last one
    assert shapes(last) == {**layers([0, 1], ATTENTION, MLP), NORM: (128,), OUTPUT: (6400, 128)}
    assert torch.equal(last["decoder.layers.1.mlp.linear_fc2.weight"], layer(state, 3, "mlp.down_proj"))
    assert torch.equal(last[OUTPUT], state["model.embed_tokens.weight" if tied else "lm_head.weight"])


def test_untied_on_one_stage_has_an_output_layer(tmp_path: Path) -> None:
    _, files = converted(tmp_path, DENSE.replace(tie_embeddings=False), ParallelLayout(tp=2))
    assert shapes(files["mp_rank_01"]["model"])[OUTPUT] == (3200, 128)


def test_virtual_stages(tmp_path: Path) -> None:
    state, files = converted(tmp_path, DENSE, ParallelLayout(pp=2, layers_per_virtual_stage=1))
    # stage 0 has layers 0 and 2, stage 1 layers 1 and 3; each chunk numbers from 0
    expected = {
        ("mp_rank_00_000", "model0"): ({EMBEDDING: (6400, 128), **layers([0], ATTENTION, MLP)}, 0),
        ("mp_rank_00_000", "model1"): (layers([0], ATTENTION, MLP), 2),
        ("mp_rank_00_001", "model0"): (layers([0], ATTENTION, MLP), 1),
        ("mp_rank_00_001", "model1"): ({**layers([0], ATTENTION, MLP), NORM: (128,), OUTPUT: (6400, 128)}, 3),
    }
    assert {(f, key) for f, content in files.items() for key in content if key.startswith("model")} == set(expected)
    for (folder, key), (table, number) in expected.items():
        assert shapes(files[folder][key]) == table
        found = files[folder][key]["decoder.layers.0.mlp.linear_fc2.weight"]
        assert torch.equal(found, layer(state, number, "mlp.down_proj"))


def test_noop_layers_leave_gaps_in_the_numbers(tmp_path: Path) -> None:
    state, files = converted(tmp_path, DENSE, ParallelLayout(pp=2, noop_layers=(1, 5)))
    first, last = (content["model"] for content in files.values())
    assert shapes(first) == {EMBEDDING: (6400, 128), **layers([0, 2], ATTENTION, MLP)}
    assert shapes(last) == {**layers([0, 1], ATTENTION, MLP), NORM: (128,), OUTPUT: (6400, 128)}
    assert torch.equal(first["decoder.layers.2.mlp.linear_fc2.weight"], layer(state, 1, "mlp.down_proj"))
    assert files["mp_rank_00_000"]["args"].num_layers == 6


def test_layers_by_stage(tmp_path: Path) -> None:
    state, files = converted(tmp_path, DENSE, ParallelLayout(pp=2, layers_per_stage=(1, 3)))
    first, last = (content["model"] for content in files.values())
    assert shapes(first) == {EMBEDDING: (6400, 128), **layers([0], ATTENTION, MLP)}
    assert shapes(last) == {**layers([0, 1, 2], ATTENTION, MLP), NORM: (128,), OUTPUT: (6400, 128)}
    assert torch.equal(last["decoder.layers.2.mlp.linear_fc2.weight"], layer(state, 3, "mlp.down_proj"))


def test_sequential_experts(tmp_path: Path) -> None:
    state, files = converted(tmp_path, MOE, ParallelLayout(tp=2, ep=2))
    assert list(files) == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]  # TT_EEE
    experts = {"mlp.router.weight": (4, 128)}
    for e in range(2):
        experts[f"mlp.experts.local_experts.{e}.linear_fc1.weight"] = (96, 128)
        experts[f"mlp.experts.local_experts.{e}.linear_fc2.weight"] = (128, 48)
    expected = {EMBEDDING: (3200, 128), **layers([0, 1, 2, 3], ATTENTION_TP2, experts), NORM: (128,)}
    for content in files.values():
        assert shapes(content["model"]) == expected
    # tensor rank 1, expert rank 1: number 1 there is expert 3
    found = files["mp_rank_01_001"]["model"]["decoder.layers.2.mlp.experts.local_experts.1.linear_fc1.weight"]
    gate, up = (layer(state, 2, f"mlp.experts.3.{x}_proj")[48:96] for x in ("gate", "up"))
    assert torch.equal(found, torch.cat([gate, up]))


def test_grouped_experts(tmp_path: Path) -> None:
    state, files = converted(tmp_path, MOE, ParallelLayout(tp=2, pp=2, ep=2, grouped_experts=True))
    assert list(files) == [f"mp_rank_{t:02d}_{p:03d}_{e:03d}" for t in (0, 1) for p in (0, 1) for e in (0, 1)]
    experts = {
        "mlp.router.weight": (4, 128),
        "mlp.experts.weight1": (128, 2 * 96),  # [hidden, experts x 2 f / TP]
        "mlp.experts.weight2": (2 * 48, 128),  # [experts x f / TP, hidden]
    }
    model = files["mp_rank_01_000_001"]["model"]
    assert shapes(model) == {EMBEDDING: (3200, 128), **layers([0, 1], ATTENTION_TP2, experts)}
    # the memory of weight1 is [experts, hidden, 2 f / TP], of weight2 [experts, f / TP, hidden]: experts 2 and 3
    weight1 = model["decoder.layers.1.mlp.experts.weight1"].view(2, 128, 96)
    weight2 = model["decoder.layers.1.mlp.experts.weight2"].view(2, 48, 128)
    for number, expert in enumerate((2, 3)):
        gate, up = (layer(state, 1, f"mlp.experts.{expert}.{x}_proj")[48:96] for x in ("gate", "up"))
        assert torch.equal(weight1[number], torch.cat([gate, up]).T)
        assert torch.equal(weight2[number], layer(state, 1, f"mlp.experts.{expert}.down_proj")[:, 48:96].T)


def test_what_mindspeed_reads_besides_tensors(tmp_path: Path) -> None:
    _, files = converted(tmp_path, MOE, ParallelLayout(tp=2, pp=2, ep=2, grouped_experts=True))
    content = files["mp_rank_00_000_000"]
    assert set(content) == {"args", "checkpoint_version", "iteration", "model"}
    assert content["checkpoint_version"] == 3.0 and content["iteration"] == 1
    expected = {
        "num_layers": 4, "hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 16,
        "group_query_attention": True, "num_experts": 4, "moe_grouped_gemm": True, "add_bias_linear": False,
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": None, "num_layer_list": None,
        "untie_embeddings_and_output_weights": False, "padded_vocab_size": 6400, "swiglu": True, "noop_layers": None,
        "rotary_base": 1000000, "norm_epsilon": 1e-6, "qk_layernorm": True, "params_dtype": torch.float32,
    }  # fmt: skip
    assert {name: getattr(content["args"], name) for name in expected} == expected

"""The weight table is exact in both directions, accounts for every tensor, and shards without loss."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.weight_tables import hf_to_mcore
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig, MoEConfig
from minimind_mcore.models.init import initial_tensor
from minimind_mcore.models.presets import PRESETS

CONFIGS = {name: config for name, config in PRESETS.items() if name.endswith("_tiny")}
CONFIGS["untied"] = PRESETS["minimind3_tiny"].replace(tie_embeddings=False)
SHARED_PAIR = PRESETS["minimind2_moe_tiny"].replace(
    moe=MoEConfig(
        topk=2, ffn_hidden_size=64, shared_ffn_hidden_size=128, load_balancing="seq_aux_loss", aux_loss_coeff=0.01
    )
)


def random_state(config: ModelConfig, form: str) -> dict[str, Tensor]:
    """A state dict with every tensor that the form writes, and random values where any may be."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}
    for rule in weights.rules(config, form):
        if rule.written:
            for name, shape in zip(rule.hf, rule.shapes, strict=True):
                zero = isinstance(rule, weights.Zeros)
                state[name] = torch.zeros(shape) if zero else torch.randn(shape, generator=generator)
    for output, embedding in (("lm_head", "model.embed_tokens"), ("output", "tok_embeddings")):
        if config.tie_embeddings and f"{output}.weight" in state:
            state[f"{output}.weight"] = state[f"{embedding}.weight"]
    return state


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("form", weights.FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bitwise(name: str, form: str) -> None:
    config = CONFIGS[name]
    state = random_state(config, form)
    mcore = hf_to_mcore(state, config)
    assert {n: tuple(t.shape) for n, t in mcore.items()} == weights.mcore_shapes(config)
    assert_same(weights.mcore_to_hf(mcore, config, form), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_trip_keeps_the_dtype(dtype: torch.dtype) -> None:
    config = CONFIGS["minimind2_moe_tiny"]
    state = {name: tensor.to(dtype) for name, tensor in random_state(config, "hf").items()}
    for name in state:
        if name.endswith("shared_expert.down_proj.weight"):
            state[name] = state[name] * 2  # as whoever wrote it did: what is halved is even
    back = weights.mcore_to_hf(hf_to_mcore(state, config), config)
    assert {t.dtype for t in back.values()} == {dtype}
    assert_same(back, state)


def test_several_shared_experts_become_one_wider_one() -> None:
    state = random_state(SHARED_PAIR, "native")
    mcore = hf_to_mcore(state, SHARED_PAIR)
    assert mcore["decoder.layers.0.mlp.shared_experts.linear_fc1.weight"].shape == (256, 128)
    assert_same(weights.mcore_to_hf(mcore, SHARED_PAIR, "native"), state)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_those_of_transformers(name: str) -> None:
    import transformers

    config = CONFIGS[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config.hf_config())
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    form = weights.detect_form(shapes)
    table = {n: s for rule in weights.rules(config, form) for n, s in zip(rule.hf, rule.shapes, strict=True)}
    assert shapes == table


def test_query_heads_sit_with_the_key_value_head_they_share() -> None:
    config = PRESETS["minimind2_small_tiny"]  # 8 query heads and 2 key-value heads of 8
    state = random_state(config, "hf")
    q, k, v = (state[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    expected = torch.cat([q[:32], k[:8], v[:8], q[32:], k[8:], v[8:]])
    mcore = hf_to_mcore(state, config)
    assert torch.equal(mcore["decoder.layers.0.self_attention.linear_qkv.weight"], expected)


def test_every_tensor_is_accounted_for() -> None:
    config = PRESETS["minimind3_tiny"]
    state = random_state(config, "hf")
    with pytest.raises(UserError, match=r"1 missing tensors: model\.norm\.weight"):
        hf_to_mcore({n: t for n, t in state.items() if n != "model.norm.weight"}, config)
    with pytest.raises(UserError, match=r"1 unknown tensors: model\.layers\.0\.self_attn\.q_proj\.bias"):
        hf_to_mcore(state | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}, config)
    with pytest.raises(UserError, match=r"q_norm\.weight: found shape \(16,\), expected \(32,\)"):
        hf_to_mcore(state | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, config)
    mcore = hf_to_mcore(state, config)
    with pytest.raises(UserError, match=r"1 unknown tensors: output_layer\.weight"):
        weights.mcore_to_hf(mcore | {"output_layer.weight": mcore[weights.EMBEDDING]}, config)


def test_tied_output_must_equal_the_embedding() -> None:
    config = PRESETS["minimind3_tiny"]
    state = random_state(config, "hf")
    embedding = state["model.embed_tokens.weight"]
    assert_same(hf_to_mcore(state | {"lm_head.weight": embedding.clone()}, config), hf_to_mcore(state, config))
    with pytest.raises(UserError, match=r"lm_head\.weight: differs"):
        hf_to_mcore(state | {"lm_head.weight": embedding + 1}, config)


def test_gate_and_biases_that_minimind_lacks_must_be_zero() -> None:
    config = PRESETS["minimind2_moe_tiny"]
    state = random_state(config, "hf")
    gate = "model.layers.1.mlp.shared_expert_gate.weight"
    with pytest.raises(UserError, match=r"shared_expert_gate.*expected zeros"):
        hf_to_mcore(state | {gate: torch.ones(1, 128)}, config)
    without_biases = {n: t for n, t in state.items() if not n.endswith(".bias")}
    assert_same(hf_to_mcore(without_biases, config), hf_to_mcore(state, config))


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_join_to_the_whole(name: str) -> None:
    config = CONFIGS[name]
    for tensor_name, tensor in hf_to_mcore(random_state(config, "native"), config).items():
        parts = [weights.shard(tensor_name, tensor, rank, 2) for rank in range(2)]
        assert torch.equal(weights.unshard(tensor_name, parts), tensor)
        cut = any(word in tensor_name for word in ("word_embeddings", "output_layer", "linear_"))
        assert parts[0].numel() * (2 if cut else 1) == tensor.numel()


def test_each_rank_has_its_part_of_gate_and_of_up() -> None:
    fc1 = torch.arange(8.0)[:, None]
    assert weights.shard("mlp.linear_fc1.weight", fc1, 1, 2).flatten().tolist() == [2, 3, 6, 7]
    with pytest.raises(UserError, match=r"does not divide by a TP size of 3"):
        weights.shard("mlp.linear_fc1.weight", fc1, 0, 3)


@pytest.mark.parametrize(("scheme", "std"), [("normal", 0.02), ("megatron", 0.02), ("torch", 1 / math.sqrt(3 * 128))])
def test_initial_weights_have_the_spread_of_their_scheme(scheme: str, std: float) -> None:
    config = PRESETS["minimind3_tiny"]
    names = [weights.EMBEDDING, "decoder.layers.3.self_attention.linear_proj.weight"]
    shapes = weights.mcore_shapes(config)
    embedding, proj = (initial_tensor(n, shapes[n], config, scheme=scheme, seed=1) for n in names)
    assert embedding.std().item() == pytest.approx(std, rel=0.02)
    assert proj.std().item() == pytest.approx(std / math.sqrt(8) if scheme == "megatron" else std, rel=0.02)


def test_initial_weights_depend_on_name_and_seed_only() -> None:
    config = PRESETS["minimind3_tiny"]

    def draw(name: str, seed: int) -> Tensor:
        return initial_tensor(name, (64, 64), config, scheme="normal", seed=seed)

    assert torch.equal(draw("a", 1), draw("a", 1))
    assert not torch.equal(draw("a", 1), draw("b", 1)) and not torch.equal(draw("a", 1), draw("a", 2))
    assert torch.equal(initial_tensor("norm", (8,), config, scheme="torch", seed=1), torch.ones(8))
    with pytest.raises(UserError, match="expected one of megatron, normal, torch"):
        initial_tensor("a", (8, 8), config, scheme="xavier", seed=1)

"""The native engine's layers call torch_npu's fused operators on an NPU; the stand-in here computes them in fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_mcore.platform import ascend
from minimind_mcore.platform.fused import elementwise


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators that were called."""
    names: list[str] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, layout: str, **options: Any) -> tuple[Tensor]:
        names.append(f"npu_fusion_attention {layout}")
        assert options["sparse_mode"] == 2 and options["atten_mask"].shape == (2048, 2048)
        assert options["atten_mask"].equal(torch.ones(2048, 2048).triu(1).bool())
        ends = options["actual_seq_qlen"]
        if layout == "SBH":
            size = q.shape[-1] // heads
            q, k, v = (x.unflatten(2, (-1, size)).permute(1, 2, 0, 3) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options["scale"], enable_gqa=True)
            return (out.permute(2, 0, 1, 3).flatten(2),)
        parts = [x.tensor_split(ends[:-1]) for x in (q, k, v)]
        out = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in one), is_causal=True, scale=options["scale"],
                                           enable_gqa=True).transpose(0, 1)
            for one in zip(*parts, strict=True)
        ]  # fmt: skip
        return (torch.cat(out),)

    def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        names.append("npu_rotary_mul")
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def swiglu(x: Tensor) -> Tensor:
        names.append("npu_swiglu")
        assert x.numel()
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, None]:
        names.append("npu_rms_norm")
        return F.rms_norm(x, weight.shape, weight, eps), None

    npu = SimpleNamespace(
        npu_fusion_attention=attention, npu_rotary_mul=rotary, npu_swiglu=swiglu, npu_rms_norm=rms_norm
    )
    monkeypatch.setattr(ascend, "operators", lambda: npu)
    return names


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def test_elementwise_operators_compute_the_same(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, angles = numbers(5, 2, 3, 8), numbers(8), numbers(5, 1, 1, 4)
    results = []
    for _ in range(2):
        results.append([
            elementwise.rms_norm(x, weight, 1e-5), elementwise.swiglu(x.clone()),
            elementwise.rotate(x, angles.cos(), angles.sin()),
        ])  # fmt: skip
        monkeypatch.setattr(ascend, "operators", lambda: None)
    assert called == ["npu_rms_norm", "npu_swiglu", "npu_rotary_mul"]
    for npu, cpu in zip(*results, strict=True):
        torch.testing.assert_close(npu, cpu)


def test_an_expert_without_tokens_calls_no_operator(called: list[str]) -> None:
    assert elementwise.swiglu(torch.zeros(0, 8)).shape == (0, 4) and not called


def test_attention_and_packed_attention_compute_the_same(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from minimind_mcore.models.attention import SDPACoreAttention

    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    sizes |= {"num_query_groups": 2, "kv_channels": 8}
    config = TransformerConfig(**sizes, attention_dropout=0.0)
    attention = SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    query, key, value = numbers(6, 2, 4, 8), numbers(6, 2, 2, 8), numbers(6, 2, 2, 8) + 1
    ends = torch.tensor([0, 4, 6], dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=4, max_seqlen_kv=4)
    found = []
    for _ in range(2):
        plain = attention(query, key, value, None)
        found.append((plain, attention(query[:, 0], key[:, 0], value[:, 0], None, packed_seq_params=packed)))
        monkeypatch.setattr(ascend, "operators", lambda: None)
    assert called == ["npu_fusion_attention SBH", "npu_fusion_attention TND"]
    for npu, cpu in zip(*found, strict=True):
        torch.testing.assert_close(npu, cpu)

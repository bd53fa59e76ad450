"""Fused operations equal the chains that they replace, values and gradients, in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.engine import ROOT
from torch import Tensor

from minimind_mcore.platform.fused import elementwise
from minimind_mcore.platform.fused.adam import FusedAdam
from minimind_mcore.platform.fused.attention import BLOCK, causal_attention
from minimind_mcore.platform.patches import add_weight_gradient

SEQUENCE, BATCH, HEADS, WIDTH = 7, 2, 4, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


ANGLES = normal(SEQUENCE, 1, 1, WIDTH // 2, seed=9)


def plain_rotate(x: Tensor) -> Tensor:
    """As complex numbers."""
    left, right = x.chunk(2, dim=-1)
    turned = torch.complex(left, right) * torch.polar(torch.ones_like(ANGLES), ANGLES)
    return torch.cat((turned.real, turned.imag), dim=-1)


CHAINS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rms_norm": (
        lambda x, weight: elementwise.rms_norm(x, weight, 1e-5),
        plain_rms_norm,
        [(SEQUENCE, BATCH, WIDTH), (WIDTH,)],
    ),
    "rms_norm of heads": (
        lambda x, weight: elementwise.rms_norm(x, weight, 1e-5),
        plain_rms_norm,
        [(SEQUENCE, BATCH, HEADS, WIDTH), (WIDTH,)],
    ),
    "swiglu": (elementwise.swiglu, plain_swiglu, [(SEQUENCE, BATCH, 2 * WIDTH)]),
    "rotate": (
        lambda x: elementwise.rotate(x, ANGLES.cos(), ANGLES.sin()),
        plain_rotate,
        [(SEQUENCE, BATCH, HEADS, WIDTH)],
    ),
}


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The result and the gradient of every input; what feeds them is no leaf, as in a model."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*(leaf * 1 for leaf in leaves))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check_equal(found: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    grad = normal(*expected(*inputs).shape, seed=99)
    pairs = zip(gradients(found, inputs, grad), gradients(expected, inputs, grad), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_as_one_node_is_the_same_function(name: str) -> None:
    found, expected, shapes = CHAINS[name]
    check_equal(found, expected, [normal(*shape, seed=i) for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("sequence", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_attention_is_torchs(sequence: int, kv_heads: int) -> None:
    scale = 1 / math.sqrt(WIDTH)

    def expected(*inputs: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in inputs)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3)

    inputs = [normal(sequence, BATCH, heads, WIDTH, seed=i) for i, heads in enumerate((HEADS, kv_heads, kv_heads))]
    check_equal(lambda q, k, v: causal_attention(q, k, v, scale), expected, inputs)


def test_a_second_backward_pass_of_swiglu_is_refused() -> None:
    x = normal(3, 8).requires_grad_()
    out = elementwise.swiglu(x * 1)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward pass"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weight_gradients_add_up_in_the_precision_of_the_sum(dtype: torch.dtype) -> None:
    inputs, grad = normal(5, 3).to(dtype), normal(5, 4, seed=1).to(dtype)
    total = torch.ones(4, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    add_weight_gradient(inputs, grad, total)
    expected = 1 + (grad.to(total.dtype).t() @ inputs.to(total.dtype))
    torch.testing.assert_close(total, expected, rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=1e-2)


USED = """
from minimind_mcore.platform import device
device.setup()
import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from minimind_mcore.platform.fused.norm import RMSNorm
from types import SimpleNamespace
config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)
x = torch.randn(3, 2, 4, 8, requires_grad=True)
for out in (
    bias_swiglu_impl(x[0], None), weighted_bias_swiglu_impl(x[0], None, torch.rand(8, 1)),
    _apply_rotary_pos_emb_bshd(x, torch.randn(3, 1, 1, 4).repeat(1, 1, 1, 2)), RMSNorm(config, 8, 1e-6)(x),
):
    nodes, names = [out.grad_fn], []
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent]
    print(*names)
print((torch.tensor(1e-30) * torch.tensor(1e-10)).item())
"""


def test_megatron_core_uses_them_and_the_cpu_flushes_denormals() -> None:
    command = [sys.executable, "-c", USED]
    environment = os.environ | {"DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    for line, name in zip(lines, ["_SwiGLU", "_SwiGLU", "_Rotary", "_RMSNorm"], strict=False):
        assert f"{name}Backward" in line, line
    assert lines[-1] == "0.0"


def test_adam_takes_the_options_of_newer_megatron_core() -> None:
    """0.17 and later give `capturable`, True under --optimizer-cuda-graph."""
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    FusedAdam([weight], lr=0.5, weight_decay=0.0, capturable=False).step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.5), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="CUDA graph"):
        FusedAdam([weight], capturable=True)

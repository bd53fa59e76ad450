"""MindSpeed: its patches for this kit's engine on an NPU, and the operations that the layer spec uses."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minimind_mcore.errors import UserError

MASK = 2048  # size of CANN's compressed mask, for sequences of any length


def adapt() -> None:
    """Let MindSpeed patch megatron-core for the NPU. Must run before megatron is imported.

    Raises:
        UserError: MindSpeed is not installed.
    """
    if importlib.util.find_spec("mindspeed") is None:
        raise UserError("an NPU needs MindSpeed, which is not installed: docs/install_ascend.md says how to install it")
    importlib.import_module("torch_npu.contrib.transfer_to_npu")
    given = sys.argv
    # With this flag MindSpeed reads the ends of packed samples from a global that only MindSpeed-LLM's batches set.
    sys.argv = [word for word in given if word != "--reset-attention-mask"]
    try:
        importlib.import_module("mindspeed.megatron_adaptor")
    finally:
        sys.argv = given
    if not os.environ.get("ATB_HOME_PATH"):  # set by nnal's set_env.sh
        layers = importlib.import_module("megatron.core.tensor_parallel.layers")
        # MindSpeed's operator is part of nnal. Without nnal `patches.py` supplies its own.
        layers._grad_accum_fusion_available = False  # type: ignore[attr-defined]


def active() -> bool:
    """Return whether MindSpeed-LLM has patched megatron-core in this process.

    False if this kit's own engine runs with MindSpeed, whose layers would look for MindSpeed-LLM's arguments.
    """
    return "mindspeed_llm.tasks.megatron_adaptor_v2" in sys.modules


def norm(config: Any, hidden_size: int, eps: float) -> Any:
    """Return MindSpeed-LLM's RMSNorm, which supports sequence parallelism and runs the fused kernel."""
    from mindspeed_llm.core.transformer.custom_layers.transformer_engine import (  # pyright: ignore[reportMissingImports]
        PTNorm,
    )

    return PTNorm(config=config, hidden_size=hidden_size, eps=eps)


def operators() -> Any:
    """Return torch_npu, whose fused operators the layers of this kit's engine call; None without training on an NPU."""
    return sys.modules.get("torch_npu") if "mindspeed.megatron_adaptor" in sys.modules and not active() else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """CANN's RMSNorm over the last axis."""
    result: Tensor = operators().npu_rms_norm(x, weight, eps)[0]
    return result


def swiglu(x: Tensor) -> Tensor:
    """CANN's `silu(gate) * up` of `x` [..., 2 n], which must not be empty."""
    result: Tensor = operators().npu_swiglu(x)
    return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """CANN's rotary embedding of `x` [sequence, batch, heads, n], by n/2 angles."""
    result: Tensor = operators().npu_rotary_mul(x, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    return result


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, ends: Sequence[int] | None = None
) -> Tensor:
    """CANN's flash attention with a causal mask per sequence.

    Args:
        query: [sequence, batch, heads, head_dim], or for packed sequences [tokens, heads, head_dim].
        key: like the query, with the key-value heads.
        value: like the key.
        scale: factor of the scores.
        dropout: dropout probability.
        ends: ends of the packed sequences, in tokens.

    Returns:
        [sequence, batch, heads * head_dim], or [tokens, heads * head_dim].
    """
    heads, layout = query.shape[-2], "SBH" if ends is None else "TND"
    if ends is None:
        query, key, value = query.flatten(2), key.flatten(2), value.flatten(2)
    out: Tensor = operators().npu_fusion_attention(
        query, key, value, heads, layout, atten_mask=_compressed_mask(query.device), scale=scale,
        keep_prob=1.0 - dropout, sparse_mode=2, actual_seq_qlen=ends, actual_seq_kvlen=ends,
    )[0]  # fmt: skip
    return out if ends is None else out.flatten(1)


@functools.cache
def _compressed_mask(device: torch.device) -> Tensor:
    """Return [2048, 2048], True above the diagonal. Sparse mode 2 uses this mask for sequences of any length."""
    return torch.ones(MASK, MASK, dtype=torch.bool, device=device).triu_(1)

"""Pad the heads of a model with zeros, so that engines without kernels for its head size can run it.

    source = pad_heads(source, 128)      # minimind-3 and MiniMind2 have heads of 96, MiniMind2-MoE of 80

The padded model computes the same function. With head size d before and D after:

- The rotary pair (i, i + d/2) of a head moves to (i, i + D/2). The new rows of q, k and v and the new columns of the
  output projection are zero.
- The base of the rotary embedding becomes theta^(D/d), so that pair i keeps its frequency theta^(-2i/d).
- Attention divides by sqrt(D) instead of sqrt(d). The queries are multiplied by sqrt(D/d) to compensate.
- A norm of queries and keys averages over D values, of which D - d are zero, so its result is larger by sqrt(D/d).
  The queries need that factor. For the keys the weight of the norm is multiplied by sqrt(d/D) to remove the factor.
  Epsilon counts D/d times as much, which is below the rounding of float32.

A partial rotary factor would be simpler, but transformers ignores it for Llama and Qwen3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_mcore.checkpoint.source import Lazy, Source
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights, yarn
from minimind_mcore.models.config import ModelConfig


def pad_heads(source: Source, head_dim: int) -> Source:
    """Return the source with heads of size `head_dim`.

    Raises:
        UserError: the heads cannot be padded to that size.
    """
    config, shapes = source.config, weights.mcore_shapes(padded := padded_config(source.config, head_dim))

    def change(name: str, tensor: Lazy) -> Lazy:
        kind = ".".join(name.split(".")[-2:])
        if kind == "linear_qkv.weight":
            return tensor.map(
                lambda rows: _pad(_scaled_queries(rows, config, head_dim), config, head_dim, 0), shapes[name]
            )
        if kind == "linear_proj.weight":
            return tensor.map(lambda columns: _pad(columns, config, head_dim, 1), shapes[name])
        if kind == "q_layernorm.weight":
            return tensor.map(lambda weight: _pad(weight, config, head_dim, 0), shapes[name])
        if kind == "k_layernorm.weight":
            factor = math.sqrt(config.head_dim / head_dim)
            return tensor.map(lambda weight: _pad(_times(weight, factor), config, head_dim, 0), shapes[name])
        return tensor

    tensors = {name: change(name, tensor) for name, tensor in source.tensors.items()}
    return source.replace(config=padded, tensors=tensors, as_stored=False)


def padded_config(config: ModelConfig, head_dim: int) -> ModelConfig:
    """Return the architecture with padded heads.

    Raises:
        UserError: the heads cannot be padded to that size.
    """
    flag, found = f"--pad-head-dim {head_dim}", config.head_dim
    if config.unpadded_head_dim:
        raise UserError(f"{flag}: the heads are padded already, from {config.unpadded_head_dim} to {found}")
    if head_dim <= found:
        raise UserError(f"{flag}: the model's heads have size {found}, expected a larger size; leave the flag out")
    if head_dim % 2:
        raise UserError(f"{flag}: expected an even number, because RoPE rotates pairs")
    base = config.rope_theta ** (head_dim / found) if head_dim < 64 * found else math.inf
    if base > torch.finfo(torch.float32).max:
        raise UserError(
            f"{flag}: rope_theta {config.rope_theta} of heads of size {found} would become {base:.3g}, which exceeds "
            "float32; pad to a smaller size"
        )
    padded = config.replace(head_dim=head_dim, unpadded_head_dim=found)
    if config.inference_rope_scaling and (
        not yarn.transformers_agrees(found, config.rope_theta)
        or yarn.ramp(found, config.rope_theta) != yarn.ramp(head_dim, padded.rotary_base)
    ):
        raise UserError(f"{flag}: inference_rope_scaling would scale other frequencies in the padded heads than before")
    return padded


def _pad(tensor: Tensor, config: ModelConfig, head_dim: int, axis: int) -> Tensor:
    """Pad each half of each head along an axis."""
    last = tensor.movedim(axis, -1)
    padded = F.pad(last.reshape(*last.shape[:-1], -1, 2, config.head_dim // 2), (0, (head_dim - config.head_dim) // 2))
    return padded.flatten(-3).movedim(-1, axis).contiguous()


def _scaled_queries(rows: Tensor, config: ModelConfig, head_dim: int) -> Tensor:
    """Scale the query rows of the QKV weight by sqrt(D/d). A query norm, if any, does this, and the rows stay."""
    if config.qk_layernorm:
        return rows
    groups = rows.reshape(config.num_kv_heads, -1, config.head_dim, rows.shape[-1])  # query heads, key, value
    queries = _times(groups[:, :-2], math.sqrt(head_dim / config.head_dim))
    return torch.cat([queries, groups[:, -2:]], dim=1).reshape(rows.shape)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.float() * factor).to(tensor.dtype)

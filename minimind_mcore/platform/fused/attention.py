"""Attention: torch's kernels, and a faster one for short sequences on a CPU.

On a CPU `causal_attention` makes matrix products over blocks of queries. At MiniMind's lengths torch's own kernel takes
1.5 times as long, most of it in its backward pass; from about 2000 positions on it is as fast (docs/benchmarks.md), and
needs no memory for the softmax. Here the backward pass finds it kept, less the half above the diagonal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 512  # positions up to which this is worth its memory
BLOCK = 64  # queries; small enough that scores stay in the cache and little above the diagonal is computed


def scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float, dropout: float = 0.0
) -> Tensor:
    """torch's attention, on a kernel that keeps no scores of size queries x keys.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, keys, head_dim]; each serves heads / kv_heads consecutive query heads.
        value: as the key.
        mask: True where a query may look; broadcasts to [batch, heads, queries, keys].
        is_causal: each query sees the keys up to its own position; the mask is None then.
        scale: of the scores.
        dropout: probability.

    Returns:
        [batch, heads, queries, head_dim].
    """
    grouped = key.shape[1] != query.shape[1]
    if grouped and (mask is not None or (query.device.type != "cpu" and query.dtype == torch.float32)):
        # A GPU's memory-efficient kernel, the only one for masks and for fp32, has no grouped heads: with enable_gqa
        # torch falls back to plain products, which keep all scores.
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`softmax(scale q k^T) v`, each position looking at itself and those before it.

    Args:
        query: [sequence, batch, heads, head_dim].
        key: [sequence, batch, kv_heads, head_dim]; each serves heads / kv_heads consecutive query heads.
        value: as the key.
        scale: of the scores.

    Returns:
        [sequence, batch, heads, head_dim].
    """
    out: Tensor = _CausalAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return out


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.shape, ctx.groups, ctx.scale = query.shape, query.shape[2] // key.shape[2], scale
        query, key, value = _by_head(query, ctx.groups), _by_head(key, 1), _by_head(value, 1)
        out = torch.empty_like(query)
        blocks = list(_blocks(key.shape[1], ctx.groups))
        # One tensor for all blocks: freed tensors of many sizes would cut the heap into pieces too small for others.
        weights = query.new_empty(len(query) * sum((rows.stop - rows.start) * end for rows, end in blocks))
        for (rows, end), shares in zip(blocks, _pieces(weights, len(query), blocks), strict=True):
            torch.softmax(_scores(query[:, rows], key[:, :end], scale, ctx.groups), -1, out=shares)
            out[:, rows] = torch.bmm(shares, value[:, :end])
        ctx.save_for_backward(query, key, value, out, weights)
        return _by_position(out, ctx.shape, ctx.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, weights = ctx.saved_tensors
        grad = _by_head(grad, ctx.groups)
        # Row sums of weights times their gradients: the softmax's derivative takes them away.
        inner = (grad * out).sum(-1, keepdim=True)
        query_grad, key_grad, value_grad = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        blocks = list(_blocks(key.shape[1], ctx.groups))
        for (rows, end), shares in zip(blocks, _pieces(weights, len(query), blocks), strict=True):
            value_grad[:, :end] += torch.bmm(shares.mT, grad[:, rows])
            scores_grad = torch.bmm(grad[:, rows], value[:, :end].mT).sub_(inner[:, rows]).mul_(shares)
            query_grad[:, rows] = torch.bmm(scores_grad, key[:, :end])
            key_grad[:, :end] += torch.bmm(scores_grad.mT, query[:, rows])
        kv_shape = (*ctx.shape[:2], -1, ctx.shape[3])
        return (
            _by_position(query_grad.mul_(ctx.scale), ctx.shape, ctx.groups),
            _by_position(key_grad.mul_(ctx.scale), kv_shape, 1),
            _by_position(value_grad, kv_shape, 1),
            None,
        )


def _by_head(x: Tensor, groups: int) -> Tensor:
    """[sequence, batch, kv_heads * groups, d] to [batch * kv_heads, sequence * groups, d]."""
    seq, batch, heads, d = x.shape
    return x.reshape(seq, batch * heads // groups, groups, d).transpose(0, 1).reshape(-1, seq * groups, d)


def _by_position(x: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
    """The inverse of `_by_head`."""
    return x.view(x.shape[0], -1, groups, x.shape[2]).transpose(0, 1).reshape(shape)


def _blocks(sequence: int, groups: int) -> Iterator[tuple[slice, int]]:
    """The rows of a block of queries, and how many keys its last query sees."""
    for start in range(0, sequence, BLOCK):
        end = min(start + BLOCK, sequence)
        yield slice(start * groups, end * groups), end


def _pieces(weights: Tensor, heads: int, blocks: Sequence[tuple[slice, int]]) -> list[Tensor]:
    """The softmax of each block, [heads, rows, keys], as views of a flat tensor."""
    shapes = [(heads, rows.stop - rows.start, end) for rows, end in blocks]
    parts = torch.split(weights, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _scores(query: Tensor, key: Tensor, scale: float, groups: int) -> Tensor:
    """Scaled scores [batch * kv_heads, rows, keys] of a block whose last query sees every key; -inf for later keys."""
    scores = torch.baddbmm(query.new_empty(1), query, key.mT, beta=0, alpha=scale)
    length = query.shape[1] // groups
    scores[:, :, key.shape[1] - length :].masked_fill_(_later(length, groups), float("-inf"))
    return scores


@functools.cache
def _later(length: int, groups: int) -> Tensor:
    """[length * groups, length]: the keys that come after the query of a row, both of one block."""
    return torch.ones(length, length, dtype=torch.bool).triu_(1).repeat_interleave(groups, 0)

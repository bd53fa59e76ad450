"""Attention: torch's kernels, and a faster causal attention for CPUs.

On a CPU `causal_attention` multiplies matrices over blocks of queries. At 340 positions torch's own CPU kernel takes
1.4 times as long in fp32 and 2.8 times in bf16, most of the time in its backward pass (docs/benchmarks.md). Up to
`SHORT` positions the softmax of the forward pass is kept for the backward pass. For longer sequences the backward pass
recomputes the softmax, so no scores of size queries x keys stay in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimind_mcore.platform.fused.elementwise import wide_dtype

SHORT = 512  # positions up to which the softmax is kept for the backward pass


def scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float, dropout: float = 0.0
) -> Tensor:
    """Call torch's attention so that it picks a kernel that does not store scores of size queries x keys.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, keys, head_dim]. Each key head serves heads / kv_heads consecutive query heads.
        value: same shape as the key.
        mask: True where a query may attend. Broadcasts to [batch, heads, queries, keys].
        is_causal: each query attends to the keys up to its own position. The mask must be None.
        scale: factor of the scores.
        dropout: dropout probability.

    Returns:
        [batch, heads, queries, head_dim].
    """
    grouped = key.shape[1] != query.shape[1]
    if grouped and (mask is not None or (query.device.type != "cpu" and query.dtype == torch.float32)):
        # On a GPU only the memory-efficient kernel supports masks and fp32, and this kernel has no grouped heads. With
        # enable_gqa torch falls back to plain matrix products, which store all scores.
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return `softmax(scale q k^T) v`, where each position attends to itself and earlier positions.

    Args:
        query: [sequence, batch, heads, head_dim].
        key: [sequence, batch, kv_heads, head_dim]. Each key head serves heads / kv_heads consecutive query heads.
        value: same shape as the key.
        scale: factor of the scores.

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
        blocks = list(_blocks(query, key, ctx.groups))
        # One buffer for all blocks, because allocating and freeing many sizes would fragment the heap.
        sizes = [len(query) * (rows.stop - rows.start) * end for rows, end in blocks]
        kept = key.shape[1] <= SHORT
        weights = query.new_empty(sum(sizes) if kept else max(sizes))
        buffers = torch.split(weights, sizes) if kept else [weights] * len(sizes)
        for (rows, end), buffer in zip(blocks, buffers, strict=True):
            shares = _softmax(query[:, rows], key[:, :end], scale, ctx.groups, buffer)
            out[:, rows] = torch.bmm(shares, value[:, :end])
        ctx.save_for_backward(query, key, value, *([weights] if kept else []))
        return _by_position(out, ctx.shape, ctx.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        grad = _by_head(grad, ctx.groups)
        query_grad = torch.empty_like(query)
        # Sums over blocks are accumulated in fp32, because bf16 would round after each block.
        key_grad, value_grad = (torch.zeros_like(x, dtype=wide_dtype(x)) for x in (key, value))
        blocks = list(_blocks(query, key, ctx.groups))
        sizes = [len(query) * (rows.stop - rows.start) * end for rows, end in blocks]
        weights = kept[0] if kept else query.new_empty(max(sizes))
        buffers = torch.split(weights, sizes) if kept else [weights] * len(sizes)
        for (rows, end), buffer in zip(blocks, buffers, strict=True):
            if kept:
                shares = buffer.view(len(query), -1, end)
            else:
                shares = _softmax(query[:, rows], key[:, :end], ctx.scale, ctx.groups, buffer)
            value_grad[:, :end] += torch.bmm(shares.mT, grad[:, rows])
            scores_grad = torch.bmm(grad[:, rows], value[:, :end].mT)
            torch.ops.aten._softmax_backward_data.out(scores_grad, shares, -1, query.dtype, grad_input=scores_grad)
            query_grad[:, rows] = torch.bmm(scores_grad, key[:, :end])
            key_grad[:, :end] += torch.bmm(scores_grad.mT, query[:, rows])
        kv_shape = (*ctx.shape[:2], -1, ctx.shape[3])
        return (
            _by_position(query_grad.mul_(ctx.scale), ctx.shape, ctx.groups),
            _by_position(key_grad.mul_(ctx.scale), kv_shape, 1).to(key.dtype),
            _by_position(value_grad, kv_shape, 1).to(value.dtype),
            None,
        )


def _by_head(x: Tensor, groups: int) -> Tensor:
    """Rearrange [sequence, batch, kv_heads * groups, d] to [batch * kv_heads, sequence * groups, d]."""
    seq, batch, heads, d = x.shape
    return x.reshape(seq, batch * heads // groups, groups, d).transpose(0, 1).reshape(-1, seq * groups, d)


def _by_position(x: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
    """Invert `_by_head`."""
    return x.view(x.shape[0], -1, groups, x.shape[2]).transpose(0, 1).reshape(shape)


def block_size(width: int) -> int:
    """Return the number of queries per block, so that their scores (`width` bytes each) fit in the CPU cache.

    A larger block would also compute more scores above the diagonal, which are masked.
    """
    return 128 if width <= 2 else 64


def _blocks(query: Tensor, key: Tensor, groups: int) -> Iterator[tuple[slice, int]]:
    """Yield the rows of each block of queries, and the number of keys that its last query attends to."""
    length, size = key.shape[1], block_size(query.dtype.itemsize)
    for start in range(0, length, size):
        end = min(start + size, length)
        yield slice(start * groups, end * groups), end


def _softmax(query: Tensor, key: Tensor, scale: float, groups: int, buffer: Tensor) -> Tensor:
    """Return the softmax of a block's scaled scores, [batch * kv_heads, rows, keys]. The last query attends to all
    keys.

    Args:
        buffer: flat tensor for the result, at least as large as the result.
    """
    scores = torch.baddbmm(query.new_empty(1), query, key.mT, beta=0, alpha=scale)
    length = query.shape[1] // groups
    scores[:, :, key.shape[1] - length :].masked_fill_(_later(length, groups), float("-inf"))
    return torch.softmax(scores, -1, out=buffer[: scores.numel()].view(scores.shape))


@functools.cache
def _later(length: int, groups: int) -> Tensor:
    """Return the causal mask inside a block, [length * groups, length]: True for keys after the row's query."""
    return torch.ones(length, length, dtype=torch.bool).triu_(1).repeat_interleave(groups, 0)

"""Token permutation and grouped matrix products of a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch

from .precision import wide


def npu_moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: Any = None, padded_mode: bool = False
) -> Any:
    topk = 1 if indices.dim() == 1 else indices.shape[1]
    order = torch.sort(indices.reshape(-1), stable=True)[1]
    place = torch.argsort(order, stable=True).to(torch.int32)
    if num_out_tokens:
        order = order[:num_out_tokens]
    return tokens.index_select(0, torch.div(order, topk, rounding_mode="floor")), place


def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: Any = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
) -> torch.Tensor:
    topk = probs.shape[1] if probs is not None else 1
    idx = sorted_indices.long()
    kept = idx < permuted_tokens.shape[0]
    rows = permuted_tokens.index_select(0, idx.clamp_max(permuted_tokens.shape[0] - 1))
    rows = rows * kept.unsqueeze(-1).to(rows.dtype)
    rows = rows.reshape(-1, topk, permuted_tokens.shape[-1])
    if probs is not None:
        rows = rows * probs.unsqueeze(-1)
    return rows.sum(1).to(permuted_tokens.dtype)


def npu_moe_gating_top_k_softmax(x: torch.Tensor, finished: Any = None, k: int = 1) -> Any:
    p, idx = torch.topk(torch.softmax(wide(x), -1), k, dim=-1)
    return p.to(x.dtype), idx.to(torch.int32), idx.to(torch.int32)


def _group_ends(group_list: Any, group_list_type: int) -> Any:
    sizes = [int(v) for v in (group_list.tolist() if torch.is_tensor(group_list) else group_list)]
    if group_list_type == 0:
        return sizes
    ends, total = [], 0
    for size in sizes:
        total += size
        ends.append(total)
    return ends


def npu_grouped_matmul(
    x: Any,
    weight: Any,
    *,
    bias: Any = None,
    group_list: Any = None,
    split_item: int = 0,
    group_type: int = -1,
    group_list_type: int = 0,
    output_dtype: Any = None,
    **_unused: Any,
) -> Any:
    if len(x) == 1 and group_list is not None:
        ends = _group_ends(group_list, group_list_type)
        if group_type == 2:  # split along the shared axis: one product per group
            a, b = x[0], weight[0]
            start, outs = 0, []
            for end in ends:
                outs.append(a[:, start:end] @ b[start:end])
                start = end
            return [torch.stack(outs)]
        ws = list(weight[0]) if len(weight) == 1 and weight[0].dim() == 3 else list(weight)
        start, outs = 0, []
        for n, (w, end) in enumerate(zip(ws, ends, strict=True)):
            y = x[0][start:end] @ w
            if bias:
                y = y + (bias[0][n] if len(bias) == 1 and bias[0].dim() > 1 else bias[n])
            outs.append(y)
            start = end
        if split_item in (2, 3):
            return [torch.cat(outs, 0)]
        return outs
    return [a @ w + (bias[n] if bias else 0) for n, (a, w) in enumerate(zip(x, weight, strict=True))]


def npu_grouped_matmul_add_(out: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, group_list: Any) -> torch.Tensor:
    ends, start = _group_ends(group_list, 0), 0
    for n, end in enumerate(ends):
        out[n].add_((x[start:end].t() @ dy[start:end]).to(out.dtype))
        start = end
    return out


def npu_groupmatmul_add_fp32(x: torch.Tensor, dy: torch.Tensor, group_list: Any, grad: torch.Tensor) -> None:
    ends = _group_ends(group_list, 0)
    view = grad.view(len(ends), x.shape[-1], dy.shape[-1])
    npu_grouped_matmul_add_(view, x, dy, group_list)

"""Documented limits of the operators: Ascend/op-plugin, docs/zh/custom_APIs/torch_npu (2026-08)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LENGTH_AXIS = {"SBH": 0, "BSH": 1, "BSND": 1, "BNSD": 2, "TND": 0}
_COMPRESSED = (2, 3, 4)  # sparse modes with a mask of 2048 x 2048 for sequences of any length
_NO_LIMIT = 2147483647


@functools.cache
def _triangle() -> torch.Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def _attention(q: Any, k: Any, v: Any, heads: int, layout: str, mask: Any, mode: int, ends: Any) -> Iterator[str]:
    """Yield violations of the limits that training and inference share."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in _FLOATS):
        yield f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected float16, bfloat16 or float32, the same for all"
    if layout not in _LENGTH_AXIS:
        yield f"layout {layout}; expected {', '.join(_LENGTH_AXIS)}"
        return
    if not 1 <= heads <= 256:
        yield f"{heads} heads; expected 1 to 256"
    size = q.shape[-1] // (heads if layout in ("BSH", "SBH") else 1)
    if not 1 <= size <= 768:
        yield f"head size {size}; expected 1 to 768"
    if mask is None and mode != 0:
        yield f"sparse_mode {mode} without atten_mask: a device then attends to everything"
    if mask is not None and mask.dtype not in (torch.bool, torch.uint8):
        yield f"atten_mask of {mask.dtype}; expected bool or uint8"
    if mask is not None and mode in _COMPRESSED:
        if tuple(mask.shape[-2:]) != (2048, 2048):
            yield f"sparse_mode {mode} with atten_mask of {tuple(mask.shape)}; expected 2048 x 2048"
        elif not torch.equal(mask.bool().view(-1, 2048, 2048)[0], _triangle()):
            yield f"sparse_mode {mode}: atten_mask is not the triangle above the diagonal"
    lengths = (q.shape[_LENGTH_AXIS[layout]], k.shape[_LENGTH_AXIS[layout]])
    if mask is not None and mode in (0, 1) and layout != "TND" and tuple(mask.shape[-2:]) != lengths:
        yield f"sparse_mode {mode} with atten_mask of {tuple(mask.shape)} for {lengths[0]} x {lengths[1]} positions"
    if layout == "TND" and (ends is None or len(ends) > 1024):
        yield f"TND with {'no' if ends is None else len(ends)} sequence ends; expected 1 to 1024"


def _fusion_attention(
    query: Any, key: Any, value: Any, head_num: int, input_layout: str, pse: Any = None, padding_mask: Any = None,
    atten_mask: Any = None, scale: float = 1.0, keep_prob: float = 1.0, pre_tockens: int = _NO_LIMIT,
    next_tockens: int = _NO_LIMIT, inner_precise: int = 0, prefix: Any = None, actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None, sparse_mode: int = 0, **more: Any,
) -> Iterator[str]:  # fmt: skip
    yield from _attention(query, key, value, head_num, input_layout, atten_mask, sparse_mode, actual_seq_qlen)
    if not 0 < keep_prob <= 1:
        yield f"keep_prob {keep_prob}; expected more than 0, at most 1"
    before, after = more.get("pre_tokens", pre_tockens), more.get("next_tokens", next_tockens)
    if sparse_mode == 0 and atten_mask is not None and input_layout != "TND":
        shown = ~atten_mask.bool()
        i = torch.arange(shown.shape[-2]).unsqueeze(1)
        j = torch.arange(shown.shape[-1]).unsqueeze(0)
        if bool((shown & ((j < i - before) | (j > i + after))).any()):
            yield f"sparse_mode 0: pre_tockens {before} and next_tockens {after} hide what atten_mask shows"


def _attention_grad(
    query: Any, key: Any, value: Any, dy: Any, head_num: int, input_layout: str, **more: Any
) -> Iterator[str]:
    mask, mode, ends = more.get("atten_mask"), more.get("sparse_mode", 0), more.get("actual_seq_qlen")
    yield from _attention(query, key, value, head_num, input_layout, mask, mode, ends)


def _infer_attention(query: Any, key: Any, value: Any, **more: Any) -> Iterator[str]:
    heads = more.get("num_query_heads", more.get("num_heads", 1))
    ends = more.get("actual_seq_qlen", more.get("actual_seq_lengths"))
    mask, mode = more.get("atten_mask"), more.get("sparse_mode", 0)
    yield from _attention(query, key, value, heads, more.get("input_layout", "BSH"), mask, mode, ends)


_NORMS = {(x, gamma) for x in _FLOATS for gamma in (x, torch.float32)}


def _rms_norm(input: Any, gamma: Any, epsilon: float = 1e-6) -> Iterator[str]:
    if (input.dtype, gamma.dtype) not in _NORMS:
        yield f"input {input.dtype}, gamma {gamma.dtype}; expected the input's dtype or float32 for gamma"
    if input.shape[-gamma.dim() :] != gamma.shape:
        yield f"gamma {tuple(gamma.shape)} for input {tuple(input.shape)}"


def _swiglu(input: Any, dim: int = -1) -> Iterator[str]:
    if input.dtype not in _FLOATS:
        yield f"input of {input.dtype}"
    if not input.is_contiguous():
        yield "input is not contiguous"
    if input.numel() == 0:
        yield f"input is empty: {tuple(input.shape)}"
    if input.shape[dim] % 2:
        yield f"axis {dim} of {tuple(input.shape)} cannot be halved"


def _rotary(x: Any, cos: Any, sin: Any, *_mode: Any, **_more: Any) -> Iterator[str]:
    if x.dim() not in (3, 4) or x.shape[-1] % 2 or x.shape[-1] >= 896:
        yield f"input {tuple(x.shape)}; expected 3 or 4 axes, the last even and below 896"
    if x.dim() == 4 and max(x.shape[1:3]) >= 1000:
        yield f"input {tuple(x.shape)}; expected less than 1000 sequences and heads"
    if not cos.dtype == sin.dtype == x.dtype:
        yield f"cos {cos.dtype}, sin {sin.dtype}, input {x.dtype}; expected the same dtype"
    if x.numel() == 0:
        yield f"input is empty: {tuple(x.shape)}"


def _grouped_matmul(x: Any, weight: Any, *, group_list: Any = None, **_more: Any) -> Iterator[str]:
    for tensor in (*x, *weight):
        if tensor.dtype not in _FLOATS:
            yield f"a tensor of {tensor.dtype}"
        if tensor.shape[-1] >= 65536:
            yield f"inner axis of {tensor.shape[-1]}; expected less than 65536"
    if torch.is_tensor(group_list) and group_list.dtype != torch.int64:
        yield f"group_list of {group_list.dtype}; expected int64"
    if x[0].numel() == 0:
        yield f"x is empty: {tuple(x[0].shape)}"


RULES: dict[str, Callable[..., Iterator[str]]] = {
    "npu_fusion_attention": _fusion_attention,
    "npu_fusion_attention_v2": _fusion_attention,
    "npu_fusion_attention_grad": _attention_grad,
    "npu_fused_infer_attention_score": _infer_attention,
    "npu_fused_infer_attention_score_v2": _infer_attention,
    "npu_prompt_flash_attention": _infer_attention,
    "npu_rms_norm": _rms_norm,
    "npu_swiglu": _swiglu,
    "npu_rotary_mul": _rotary,
    "npu_rotary_position_embedding": _rotary,
    "npu_grouped_matmul": _grouped_matmul,
}

"""Attention in the layouts of the device: SBH, BSH, BSND, BNSD and TND."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .precision import wide


def npu_scaled_masked_softmax(
    x: torch.Tensor, mask: torch.Tensor, scale: float = 1.0, fixed_triu_mask: bool = False
) -> torch.Tensor:
    y = wide(x) * scale
    if fixed_triu_mask:
        mask = torch.ones(x.shape[-2], x.shape[-1], dtype=torch.bool).triu(1)
    y = y.masked_fill(mask.bool(), -10000.0)
    return torch.softmax(y, dim=-1).to(x.dtype)


def _to_bnsd(t: torch.Tensor, layout: str, heads: int) -> Any:
    if layout == "BNSD":
        return t
    if layout == "BSND":
        return t.transpose(1, 2)
    if layout == "BSH":
        b, s, h = t.shape
        return t.reshape(b, s, heads, h // heads).transpose(1, 2)
    if layout == "SBH":
        s, b, h = t.shape
        return t.reshape(s, b, heads, h // heads).permute(1, 2, 0, 3)
    raise ValueError(f"attention layout {layout} is not emulated")


def _all_to_bnsd(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: str, heads: int, kv_heads: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value in (B, N, S, D); how many key heads there are is told by their width unless it is given."""
    if layout in ("BSH", "SBH") and not kv_heads:
        kv_heads = key.shape[-1] // (query.shape[-1] // heads)
    return _to_bnsd(query, layout, heads), _to_bnsd(key, layout, kv_heads), _to_bnsd(value, layout, kv_heads)


def _from_bnsd(t: torch.Tensor, layout: str) -> Any:
    if layout == "BNSD":
        return t.contiguous()
    if layout == "BSND":
        return t.transpose(1, 2).contiguous()
    b, n, s, d = t.shape
    if layout == "BSH":
        return t.transpose(1, 2).reshape(b, s, n * d)
    return t.permute(2, 0, 1, 3).reshape(s, b, n * d)  # SBH


def _blocked(
    q: torch.Tensor, k: torch.Tensor, sparse_mode: int, atten_mask: Any, pre_tokens: int, next_tokens: int
) -> Any:
    """True where a key may NOT be seen, or None; broadcastable to (B, N, Sq, Skv), as q and k are (B, N, S, D).

    Without a mask a device attends to every key, whatever the sparse mode is. The masks of modes 2, 3 and 4 are
    triangles of 2048 x 2048 (`_rules` checks them), which the device moves along the diagonal.
    """
    if atten_mask is None:
        return None
    sq, skv = q.shape[2], k.shape[2]
    i = torch.arange(sq).unsqueeze(1)
    j = torch.arange(skv).unsqueeze(0)
    if sparse_mode == 0:
        band = (j < i - pre_tokens) | (j > i + next_tokens)
        m = atten_mask.bool()
        return m[..., :sq, :skv] | band
    if sparse_mode == 1:
        return atten_mask.bool()[..., :sq, :skv]
    if sparse_mode == 2:  # causal, aligned at the upper left
        return j > i
    if sparse_mode == 3:  # causal, aligned at the lower right
        return j > i + (skv - sq)
    if sparse_mode == 4:  # band, aligned at the lower right
        shift = skv - sq
        return (j < i + shift - pre_tokens) | (j > i + shift + next_tokens)
    raise ValueError(f"sparse_mode {sparse_mode} is not emulated")


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, pse: Any, blocked: Any, pse_type: int) -> torch.Tensor:
    s = torch.matmul(q, k.transpose(-1, -2))
    if pse is not None and pse_type == 0:
        s = (s + pse) * scale
    elif pse is not None:
        s = s * scale + pse
    else:
        s = s * scale
    if blocked is not None:
        s = s.masked_fill(blocked, float("-inf"))
    return s


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    blocked: Any,
    pse: Any,
    pse_type: int,
    keep_prob: float,
) -> Any:
    """(B, N, S, D) attention with grouped keys; returns output, row maxima, row sums."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    qw, kw, vw = wide(q), wide(k), wide(v)
    s = _scores(qw, kw, scale, None if pse is None else wide(pse), blocked, pse_type)
    top = s.detach().amax(-1, keepdim=True)
    top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    p = e / total.clamp_min(torch.finfo(e.dtype).tiny)
    if keep_prob < 1.0:
        p = F.dropout(p, 1.0 - keep_prob, training=True)
    return torch.matmul(p, vw).to(q.dtype), top.detach(), total.detach()


def _seq_bounds(actual: Any) -> Iterator[Any]:
    ends = [int(x) for x in (actual.tolist() if torch.is_tensor(actual) else actual)]
    start = 0
    for end in ends:
        yield start, end
        start = end


def _each_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, qlen: Any, kvlen: Any, attend: Any
) -> Any:
    """Attention inside each sequence of tokens that lie one after another (TND)."""
    outs: list[torch.Tensor] = []
    tops: list[torch.Tensor] = []
    totals: list[torch.Tensor] = []
    for (q0, q1), (k0, k1) in zip(_seq_bounds(qlen), _seq_bounds(kvlen), strict=True):
        if q1 == q0:
            continue
        parts = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query[q0:q1], key[k0:k1], value[k0:k1]))
        for part, found in zip(attend(*parts), (outs, tops, totals), strict=True):
            found.append(part[0].transpose(0, 1))
    out = torch.cat(outs, 0)
    if out.shape[0] < query.shape[0]:  # rows past the last sequence are zero
        out = F.pad(out, (0, 0, 0, 0, 0, query.shape[0] - out.shape[0]))
    return out, torch.cat(tops, 0), torch.cat(totals, 0)


def _answer(out: torch.Tensor, top: torch.Tensor, total: torch.Tensor) -> Any:
    """What the operator returns: the row maxima and sums eightfold, a softmax that is not kept, a random state."""
    shape = [*top.shape[:-1], 8]
    return (
        out,
        top.expand(shape).contiguous().float(),
        total.expand(shape).contiguous().float(),
        torch.empty(0),
        0,
        0,
        0,
    )


def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: Any = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Any = None,
    pse_type: int = 1,
    **_unused: Any,
) -> Any:
    if prefix is not None or sink is not None:
        raise NotImplementedError("prefix and sink attention are not emulated")
    if input_layout == "TND":

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            blocked = _blocked(q, k, sparse_mode, atten_mask, pre_tockens, next_tockens)
            return _attend(q, k, v, scale, blocked, None, pse_type, keep_prob)

        return _answer(*_each_sequence(query, key, value, actual_seq_qlen, actual_seq_kvlen, attend))
    q, k, v = _all_to_bnsd(query, key, value, input_layout, head_num)
    blocked = _blocked(q, k, sparse_mode, atten_mask, pre_tockens, next_tockens)
    out, top, total = _attend(q, k, v, scale, blocked, pse, pse_type, keep_prob)
    return _answer(_from_bnsd(out, input_layout), top, total)


def npu_fusion_attention_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    query_rope: Any = None,
    key_rope: Any = None,
    **kwargs: Any,
) -> Any:
    if query_rope is not None:
        query = torch.cat((query, query_rope), dim=-1)
        key = torch.cat((key, key_rope), dim=-1)
    return npu_fusion_attention(
        query, key, value, head_num, input_layout, pre_tockens=pre_tokens, next_tockens=next_tokens, **kwargs
    )


def npu_fusion_attention_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dy: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: Any = None,
    softmax_max: Any = None,
    softmax_sum: Any = None,
    softmax_in: Any = None,
    attention_in: Any = None,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    seed: int = 0,
    offset: int = 0,
    numels: int = 0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    **_unused: Any,
) -> Any:
    """Gradients under given row maxima and sums (which may span more keys than these)."""
    if input_layout == "TND":
        raise NotImplementedError("npu_fusion_attention_grad in TND layout is not emulated")
    q, k, v = map(wide, _all_to_bnsd(query, key, value, input_layout, head_num))
    g = wide(_to_bnsd(dy, input_layout, head_num))
    o = wide(_to_bnsd(attention_in, input_layout, head_num))
    groups = q.shape[1] // k.shape[1]
    kr = k.repeat_interleave(groups, dim=1)
    vr = v.repeat_interleave(groups, dim=1)
    blocked = _blocked(q, k, sparse_mode, atten_mask, pre_tockens, next_tockens)
    s = _scores(q, kr, scale_value, pse, blocked, 1)
    p = torch.exp(s - softmax_max[..., :1]) / softmax_sum[..., :1]
    dv = torch.matmul(p.transpose(-1, -2), g)
    dp = torch.matmul(g, vr.transpose(-1, -2))
    ds = p * (dp - (g * o).sum(-1, keepdim=True)) * scale_value
    dq = torch.matmul(ds, kr)
    dk = torch.matmul(ds.transpose(-1, -2), q)
    if groups > 1:
        b, n, sk, d = k.shape
        dk = dk.reshape(b, n, groups, sk, d).sum(2)
        dv = dv.reshape(b, n, groups, sk, v.shape[-1]).sum(2)
    back = zip((dq, dk, dv), (query, key, value), strict=True)
    return (*(_from_bnsd(grad.to(like.dtype), input_layout) for grad, like in back), None)


def npu_fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    input_layout: str = "BSH",
    pse_shift: Any = None,
    atten_mask: Any = None,
    softmax_scale: float = 1.0,
    sparse_mode: int = 0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    return_softmax_lse: bool = False,
    **_unused: Any,
) -> Any:
    kv_heads = num_key_value_heads or num_query_heads
    q, k, v = _all_to_bnsd(query, key, value, input_layout, num_query_heads, kv_heads)
    blocked = _blocked(q, k, sparse_mode, atten_mask, pre_tokens, next_tokens)
    out, top, total = _attend(q, k, v, softmax_scale, blocked, pse_shift, 1, 1.0)
    return _from_bnsd(out, input_layout), (top + torch.log(total))


def npu_fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_heads: int = 1,
    num_key_value_heads: int = 0,
    scale: float = 1.0,
    **kw: Any,
) -> Any:
    return npu_fused_infer_attention_score_v2(
        query, key, value, num_query_heads=num_heads, num_key_value_heads=num_key_value_heads, softmax_scale=scale, **kw
    )


def npu_prompt_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_heads: int = 1,
    num_key_value_heads: int = 0,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    **kw: Any,
) -> Any:
    return npu_fused_infer_attention_score_v2(
        query,
        key,
        value,
        num_query_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        softmax_scale=scale_value,
        input_layout=input_layout,
        **kw,
    )[0]


npu_incre_flash_attention = npu_prompt_flash_attention

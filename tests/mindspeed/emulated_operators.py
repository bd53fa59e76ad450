"""The stand-in's operators against plain PyTorch, and what it refuses. tests/unit/test_emulation.py runs this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.cpp_extension as cpp_extension
import torch_npu  # pyright: ignore[reportMissingImports]
from torch_npu import _strict  # pyright: ignore[reportMissingImports]

torch.manual_seed(0)
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def close(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    g = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat_interleave(g, 1), v.repeat_interleave(g, 1), attn_mask=mask)


def heads(t: torch.Tensor, n: int) -> torch.Tensor:
    s, b, h = t.shape
    return t.reshape(s, b, n, h // n).permute(1, 2, 0, 3)


def test_causal_attention_in_sbh_with_grouped_keys() -> None:
    s, b, n, kv, d = 17, 2, 8, 4, 16
    q = torch.randn(s, b, n * d, requires_grad=True)
    k = torch.randn(s, b, kv * d, requires_grad=True)
    v = torch.randn(s, b, kv * d, requires_grad=True)
    keep = torch.ones(s, s, dtype=torch.bool).tril()
    want = reference(heads(q, n), heads(k, kv), heads(v, kv), keep)
    want = want.permute(2, 0, 1, 3).reshape(s, b, n * d)
    g = torch.randn_like(want)
    grads = torch.autograd.grad(want, (q, k, v), g)
    full = ~keep
    for mode, mask in ((0, full), (1, full), (2, TRIANGLE), (3, TRIANGLE), (4, TRIANGLE)):
        got = torch_npu.npu_fusion_attention(
            q, k, v, n, "SBH", atten_mask=mask, scale=d**-0.5, pre_tockens=1048576, next_tockens=0, sparse_mode=mode
        )
        close(got[0], want)
        for x, y in zip(torch.autograd.grad(got[0], (q, k, v), g), grads, strict=True):
            close(x, y)
        manual = torch_npu.npu_fusion_attention_grad(
            q,
            k,
            v,
            g,
            n,
            "SBH",
            atten_mask=mask,
            softmax_max=got[1],
            softmax_sum=got[2],
            attention_in=got[0],
            scale_value=d**-0.5,
            pre_tockens=1048576,
            next_tockens=0,
            sparse_mode=mode,
        )
        for x, y in zip(manual[:3], grads, strict=True):
            close(x, y)


@pytest.mark.parametrize("mode", range(5))
def test_no_mask_means_full_attention(mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_strict, "MODE", "report")  # a device computes this without a word
    q = torch.randn(1, 4, 9, 8)
    got = torch_npu.npu_fusion_attention(q, q, q, 4, "BNSD", scale=8**-0.5, next_tockens=0, sparse_mode=mode)[0]
    close(got, reference(q, q, q))


def test_every_layout_of_grouped_keys_in_training_and_in_inference() -> None:
    b, s, n, kv, d = 2, 7, 4, 2, 8
    q, k, v = torch.randn(b, n, s, d), torch.randn(b, kv, s, d), torch.randn(b, kv, s, d)
    want = reference(q, k, v)
    layouts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "BNSD": lambda t: t,
        "BSND": lambda t: t.transpose(1, 2),
        "BSH": lambda t: t.transpose(1, 2).flatten(2),
        "SBH": lambda t: t.permute(2, 0, 1, 3).flatten(2),
    }
    for name, laid in layouts.items():
        given = [laid(t) for t in (q, k, v)]
        close(torch_npu.npu_fusion_attention(*given, n, name, scale=d**-0.5)[0], laid(want))
        close(torch_npu.npu_fusion_attention_v2(*given, n, name, scale=d**-0.5)[0], laid(want))
        heads = {"num_key_value_heads": kv, "input_layout": name}
        out, lse = torch_npu.npu_fused_infer_attention_score(*given, num_heads=n, scale=d**-0.5, **heads)
        close(out, laid(want))
        close(lse[..., 0], (q @ k.repeat_interleave(n // kv, 1).mT * d**-0.5).logsumexp(-1))
        close(torch_npu.npu_prompt_flash_attention(*given, num_heads=n, scale_value=d**-0.5, **heads), laid(want))


def test_packed_sequences_do_not_see_each_other() -> None:
    ends, n, d = [5, 6, 13], 2, 8
    q = torch.randn(16, n, d)
    got = torch_npu.npu_fusion_attention(
        q,
        q,
        q,
        n,
        "TND",
        atten_mask=TRIANGLE,
        scale=d**-0.5,
        sparse_mode=4,
        pre_tockens=1048576,
        next_tockens=0,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
    )[0]
    start = 0
    for end in ends:
        x = q[start:end].transpose(0, 1).unsqueeze(0)
        keep = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        close(got[start:end], reference(x, x, x, keep)[0].transpose(0, 1))
        start = end
    assert got[13:].abs().sum() == 0


def test_rms_norm_and_its_backward() -> None:
    x = torch.randn(3, 5, 16, requires_grad=True)
    w = torch.randn(16, requires_grad=True)
    y, rstd = torch_npu.npu_rms_norm(x, w, 1e-6)
    close(y, F.rms_norm(x, (16,), w, 1e-6))
    g = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    mx, mw = torch_npu.npu_rms_norm_backward(g, x, w, rstd)
    close(mx, dx)
    close(mw, dw)


def test_swiglu_and_its_backward() -> None:
    x = torch.randn(4, 12, requires_grad=True)
    y = torch_npu.npu_swiglu(x)
    close(y, F.silu(x[:, :6]) * x[:, 6:])
    g = torch.randn_like(y)
    close(torch_npu.npu_swiglu_backward(g, x), torch.autograd.grad(y, x, g)[0])


def test_rotary_modes() -> None:
    x = torch.randn(7, 1, 2, 8)
    f = torch.randn(7, 1, 1, 4)
    half = torch.cat((f, f), -1)
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(f), f)
    close(torch_npu.npu_rotary_mul(x, half.cos(), half.sin()), torch.cat((z.real, z.imag), -1))
    pair = f.repeat_interleave(2, -1)
    z = torch.view_as_complex(x.reshape(7, 1, 2, 4, 2)) * torch.polar(torch.ones_like(f), f)
    close(
        torch_npu.ops.compiled.npu_rotary_position_embedding(x, pair.cos(), pair.sin(), 1),
        torch.view_as_real(z).flatten(-2),
    )


def test_adam_w_step() -> None:
    p = torch.nn.Parameter(torch.randn(5))
    opt = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    var, m, v = p.detach().clone(), torch.zeros(5), torch.zeros(5)
    for step in range(3):
        g = torch.randn(5)
        p.grad = g.clone()
        opt.step()
        torch_npu.npu_apply_adam_w(
            0.9**step, 0.95**step, 1e-2, 0.1, 0.9, 0.95, 1e-8, g, None, False, False, out=(var, m, v)
        )
    close(var, p.detach())


def test_token_permute_round_trip() -> None:
    tokens = torch.randn(6, 4)
    idx = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0], [1, 2]])
    probs = torch.rand(6, 2)
    rows, place = torch_npu.npu_moe_token_permute(tokens, idx)
    close(rows, tokens[torch.sort(idx.reshape(-1), stable=True)[1] // 2])
    close(torch_npu.npu_moe_token_unpermute(rows, place, probs), tokens * probs.sum(1, keepdim=True))


def test_device_names_mean_cpu() -> None:
    assert torch.zeros(2, device="npu").device.type == "cpu"
    assert torch.device("npu:3").type == "cpu" and isinstance(torch.device("cpu"), torch.device)
    assert torch.zeros(1).to("npu").type() == "torch.npu.FloatTensor"
    with torch.device("meta"):
        assert torch.empty(2).is_meta


def compiled(name: str) -> Any:
    """The operators of one of the modules that MindSpeed compiles."""
    return cpp_extension.load(name=name, sources=[])


def test_the_parts_of_a_ring_join_to_the_whole() -> None:
    n, d = 2, 8
    q, k, v = (torch.randn(6, 3, n * d) for _ in range(3))
    want = torch_npu.npu_fusion_attention(q, k, v, n, "SBH", scale=d**-0.5)
    halves = zip(k.chunk(2), v.chunk(2), strict=True)
    parts = [torch_npu.npu_fusion_attention(q, *half, n, "SBH", scale=d**-0.5)[:3] for half in halves]
    got = compiled("npu_ring_attention_update").npu_ring_attention_update(*parts[0], *parts[1])
    for found, expected in zip(got, want, strict=False):
        close(found, expected)


def test_compiled_adam_w_is_torchs() -> None:
    p = torch.nn.Parameter(torch.randn(5))
    opt = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    var, m, v = p.detach().clone(), torch.zeros(5), torch.zeros(5)
    for step in range(1, 4):
        p.grad = torch.randn(5)
        opt.step()
        hyper = (torch.tensor(float(step)), 1e-2, 0.9, 0.95, 0.1, 1e-8, False, False)
        compiled("npu_apply_fused_adamw_v2").npu_apply_fused_adamw_v2(var, p.grad, m, v, m, *hyper)
    close(var, p.detach())


def test_two_tensors_share_their_memory() -> None:
    source, target = torch.zeros(4), torch.ones(2, dtype=torch.bfloat16)
    compiled("algorithm").reuse_data_ptr(target, source, 2)  # behind two elements of two bytes
    target.copy_(torch.tensor([0.0, 2.0]))
    assert source.tolist() == [0, 2, 0, 0]  # the upper half of a float is a bfloat16


Q = torch.randn(4, 1, 16)
SQUARE = TRIANGLE[:4, :4]


def attend(**options: Any) -> Callable[[], Any]:
    """A call of attention over four positions, with these arguments too."""
    return lambda: torch_npu.npu_fusion_attention(Q, Q, options.pop("value", Q), 2, "SBH", **options)


@pytest.mark.parametrize(("call", "message"), [
    (attend(sparse_mode=2), "sparse_mode 2 without atten_mask"),
    (attend(sparse_mode=3, atten_mask=SQUARE), "expected 2048 x 2048"),
    (attend(sparse_mode=2, atten_mask=~TRIANGLE), "not the triangle"),
    (attend(atten_mask=TRIANGLE[:4, :3]), r"\(4, 3\) for 4 x 4"),
    (attend(atten_mask=SQUARE.int()), "expected bool or uint8"),
    (attend(atten_mask=~SQUARE, next_tockens=0, pre_tockens=1), "hide what atten_mask shows"),
    (attend(value=Q.bfloat16()), "the same for all"),
    (attend(sink=Q), "no argument sink"),
    (attend(inner_precise="high"), "torch_npu takes int"),
    (lambda: torch_npu.npu_fusion_attention_v2(Q, Q, Q, 2, "SBH", sparse_mode=4), "sparse_mode 4 without atten_mask"),
    (lambda: torch_npu.npu_rms_norm(Q.bfloat16(), Q[0, 0].half()), "gamma"),
    (lambda: torch_npu.npu_swiglu(Q, -1, 1), "3 positional arguments"),
    (lambda: torch_npu.npu_swiglu(Q.transpose(0, 2)), "not contiguous"),
    (lambda: torch_npu.npu_swiglu(Q[:0]), "empty"),
    (lambda: torch_npu.npu_rotary_mul(Q, Q.bfloat16(), Q), "the same dtype"),
    (lambda: torch_npu.npu_moe_token_unpermute(Q), "sorted_indices is missing"),
])  # fmt: skip
def test_what_a_device_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(_strict.Violation, match=message):
        call()


def test_operators_of_mindspeed_are_none_of_torch_npu() -> None:
    for name in ("npu_rotary_position_embedding", "npu_matmul_add_fp32", "npu_groupmatmul_add_fp32"):
        assert not hasattr(torch_npu, name)


def test_reductions_that_hccl_has_not() -> None:
    torch.distributed.init_process_group("hccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    host = torch.distributed.new_group([0], backend="gloo")
    try:
        with pytest.raises(_strict.Violation, match="float64"):
            torch.distributed.all_reduce(torch.ones(2, dtype=torch.float64))
        with pytest.raises(_strict.Violation, match="BAND"):
            torch.distributed.all_reduce(torch.ones(2, dtype=torch.int32), op=torch.distributed.ReduceOp.BAND)
        torch.distributed.all_reduce(torch.ones(2, dtype=torch.float64), group=host)
        torch.distributed.all_reduce(torch.ones(2), op=torch.distributed.ReduceOp.AVG)
    finally:
        torch.distributed.destroy_process_group()

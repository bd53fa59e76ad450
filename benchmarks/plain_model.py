"""The baseline of the benchmarks: MiniMind's model in plain PyTorch modules.

Attention repeats the key-value heads; a key-value cache is concatenated every step, and one new token attends to
it by two matrix products. A mixture of experts loops over its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_mcore.models.config import ModelConfig

Cache = list[tuple[Tensor, Tensor]]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).type_as(x)


class Experts(nn.Module):
    """MiniMind's mixture: the experts run one after the other, each on its tokens."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        assert c.moe is not None
        self.moe = c.moe
        self.router = nn.Linear(c.hidden_size, c.moe.num_experts, bias=False)
        self.experts = nn.ModuleList(Mlp(c.hidden_size, c.moe.ffn_hidden_size) for _ in range(c.moe.num_experts))
        self.shared = Mlp(c.hidden_size, c.moe.shared_ffn_hidden_size) if c.moe.shared_ffn_hidden_size else None
        self.aux_loss = torch.zeros(())

    # The number of tokens of an expert varies, so torch.compile skips this method.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.router(tokens).softmax(-1, dtype=torch.float32)
        weights, chosen = scores.topk(self.moe.topk, dim=-1)
        if self.moe.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, rows, (expert(tokens[rows]) * weights[rows, places, None]).to(out.dtype))
        load = F.one_hot(chosen, self.moe.num_experts).float().mean((0, 1))
        self.aux_loss = (load * scores.mean(0)).sum() * self.moe.num_experts * self.moe.aux_loss_coeff
        return (out if self.shared is None else out + self.shared(tokens)).view_as(x)


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        h, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.mlp = Experts(c) if c.moe else Mlp(h, c.ffn_hidden_size)
        self.q, self.k = nn.Linear(h, q, bias=False), nn.Linear(h, kv, bias=False)
        self.v, self.o = nn.Linear(h, kv, bias=False), nn.Linear(q, h, bias=False)
        self.norm1, self.norm2 = RMSNorm(h, c.norm_eps), RMSNorm(h, c.norm_eps)
        head: Callable[[], nn.Module] = lambda: RMSNorm(c.head_dim, c.norm_eps) if c.qk_layernorm else nn.Identity()  # noqa: E731
        self.q_norm, self.k_norm = head(), head()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Any) -> tuple[Tensor, Any]:
        out, present = self.attention(self.norm1(x), cos, sin, past)
        x = x + out
        return x + self.mlp(self.norm2(x)), present

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, past: Any) -> tuple[Tensor, Any]:
        batch, seq, _ = x.shape
        q = rotate(self.q_norm(self.q(x).view(batch, seq, -1, self.c.head_dim)), cos, sin)
        k = rotate(self.k_norm(self.k(x).view(batch, seq, -1, self.c.head_dim)), cos, sin)
        v = self.v(x).view(batch, seq, -1, self.c.head_dim)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        present = (k, v)
        repeats = self.c.num_heads // self.c.num_kv_heads
        q, k, v = (t.transpose(1, 2) for t in (q, repeat(k, repeats), repeat(v, repeats)))
        if seq > 1:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = F.softmax((q @ k.transpose(-2, -1)) / self.c.head_dim**0.5, dim=-1) @ v
        return self.o(out.transpose(1, 2).reshape(batch, seq, -1)), present


def repeat(x: Tensor, times: int) -> Tensor:
    batch, seq, heads, size = x.shape
    return x[:, :, :, None, :].expand(batch, seq, heads, times, size).reshape(batch, seq, heads * times, size)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class PlainModel(nn.Module):
    """A MiniMind in plain PyTorch. `positions` is the maximum sequence length."""

    cos: Tensor
    sin: Tensor

    def __init__(self, c: ModelConfig, positions: int) -> None:
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        # Not torch's N(0, 1): logits of that size make most softmax probabilities denormal, and a CPU multiplies
        # matrices of denormal numbers at a third of its speed.
        for parameter in (p for p in self.parameters() if p.dim() > 1):
            nn.init.normal_(parameter, std=0.02)
        frequencies = c.rope_theta ** -(torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        angles = torch.outer(torch.arange(positions).float(), frequencies).repeat(1, 2)[:, None, :]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Return the logits of ids that follow the cached ones, and the extended cache."""
        start = cache[0][0].shape[1] if cache else 0
        x = self.embedding(ids)
        cos, sin = (t[start : start + ids.shape[1]] for t in (self.cos, self.sin))
        presents = []
        for number, layer in enumerate(self.layers):
            x, present = layer(x, cos, sin, cache[number] if cache else None)
            presents.append(present)
        return self.head(self.norm(x)), presents

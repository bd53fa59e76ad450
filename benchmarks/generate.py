"""Generation against a plain PyTorch loop.

    python benchmarks/generate.py                                   # minimind2_small and minimind3, fp32
    python benchmarks/generate.py --model minimind2_small --rounds 5

The plain loop is MiniMind's own way of generating: modules of its own, a key-value cache that is concatenated
every step, attention by two matrix products, top-k and top-p on all logits. The other side is what
`inference.py` runs. Both have random weights of the same sizes and sample 50 of the likeliest tokens at
temperature 0.85, never stopping. Each side has the machine to itself, in a process of its own, in turn;
medians of the rounds and their ratio are printed, and how a batch does against its prompts one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_mcore.models.config import ModelConfig

Cache = list[tuple[Tensor, Tensor]]
TEMPERATURE, TOP_K, TOP_P = 0.85, 50, 0.95


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).type_as(x)


class Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        h, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        sizes = {"q": (h, q), "k": (h, kv), "v": (h, kv), "o": (q, h)}
        sizes |= {"gate": (h, c.ffn_hidden_size), "up": (h, c.ffn_hidden_size), "down": (c.ffn_hidden_size, h)}
        for name, (rows, columns) in sizes.items():
            self.add_module(name, nn.Linear(rows, columns, bias=False))
        self.norm1, self.norm2 = RMSNorm(h, c.norm_eps), RMSNorm(h, c.norm_eps)
        head: Callable[[], nn.Module] = lambda: RMSNorm(c.head_dim, c.norm_eps) if c.qk_layernorm else nn.Identity()  # noqa: E731
        self.q_norm, self.k_norm = head(), head()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Any) -> tuple[Tensor, Any]:
        out, present = self.attention(self.norm1(x), cos, sin, past)
        x = x + out
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h)), present

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
    """A dense MiniMind in plain PyTorch."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)
        frequencies = c.rope_theta ** -(torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        angles = torch.outer(torch.arange(c.max_position_embeddings).float(), frequencies).repeat(1, 2)[:, None, :]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        start = cache[0][0].shape[1] if cache else 0
        x = self.embedding(ids)
        cos, sin = (t[start : start + ids.shape[1]] for t in (self.cos, self.sin))
        presents = []
        for number, layer in enumerate(self.layers):
            x, present = layer(x, cos, sin, cache[number] if cache else None)
            presents.append(present)
        return self.head(self.norm(x)), presents

    @torch.inference_mode()
    def generate(self, ids: Tensor, tokens: int) -> Tensor:
        cache = None
        for _ in range(tokens):
            logits, cache = self(ids if cache is None else ids[:, -1:], cache)
            ids = torch.cat([ids, sample(logits[:, -1] / TEMPERATURE)], dim=-1)
        return ids


def sample(logits: Tensor) -> Tensor:
    logits[logits < torch.topk(logits, TOP_K)[0][..., -1, None]] = -float("inf")
    ordered, order = torch.sort(logits, descending=True)
    drop = torch.cumsum(torch.softmax(ordered, dim=-1), dim=-1) > TOP_P
    drop[..., 1:], drop[..., 0] = drop[..., :-1].clone(), 0
    logits[drop.scatter(1, order, drop)] = -float("inf")
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)

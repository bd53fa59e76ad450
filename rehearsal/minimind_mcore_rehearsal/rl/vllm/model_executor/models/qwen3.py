"""Llama, Qwen3 and Qwen3-MoE with vLLM's parameter names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..layers.fused_moe.layer import FusedMoE
from ..layers.linear import MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear, parts
from ..layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding


class RMSNorm(torch.nn.Module):
    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def turn(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of x [batch, heads, positions, head_dim], by halves."""
    d, s = x.shape[-1], x.shape[-2]
    angles = torch.arange(s).float()[:, None] / theta ** (torch.arange(0, d, 2).float() / d)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Attention(torch.nn.Module):
    def __init__(self, c: Any, dtype: torch.dtype, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.kv = c.num_attention_heads // parts(), c.num_key_value_heads // parts()
        self.dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.theta = getattr(c, "rope_theta", None) or c.rope_parameters["rope_theta"]
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        self.qkv_proj = QKVParallelLinear(c.hidden_size, heads * self.dim, dtype)
        self.o_proj = RowParallelLinear(c.num_attention_heads * self.dim, c.hidden_size, dtype)
        if qk_norm:
            self.q_norm = RMSNorm(self.dim, c.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(self.dim, c.rms_norm_eps, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        split = self.qkv_proj(x).split([n * self.dim for n in (self.heads, self.kv, self.kv)], -1)
        q, k, v = (t.view(b, s, -1, self.dim).transpose(1, 2) for t in split)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = turn(q, self.theta), turn(k, self.theta)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv)
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))


class FeedForward(torch.nn.Module):
    def __init__(self, c: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(c.hidden_size, 2 * c.intermediate_size, dtype)
        self.down_proj = RowParallelLinear(c.intermediate_size, c.hidden_size, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Mixture(torch.nn.Module):
    def __init__(self, c: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.topk, self.normalize = c.num_experts_per_tok, c.norm_topk_prob
        self.gate = ReplicatedLinear(c.hidden_size, c.num_experts, dtype)
        self.experts = FusedMoE(c.num_experts, c.hidden_size, c.moe_intermediate_size, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probabilities = self.gate(x).float().softmax(-1)
        best, which = probabilities.topk(self.topk, -1)
        if self.normalize:
            best = best / best.sum(-1, keepdim=True)
        return self.experts(x, torch.zeros_like(probabilities).scatter(-1, which, best))


class Layer(torch.nn.Module):
    def __init__(self, c: Any, dtype: torch.dtype, qk_norm: bool, moe: bool) -> None:
        super().__init__()
        self.self_attn = Attention(c, dtype, qk_norm)
        self.mlp = Mixture(c, dtype) if moe else FeedForward(c, dtype)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(torch.nn.Module):
    def __init__(self, c: Any, dtype: torch.dtype, qk_norm: bool, moe: bool) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(c.vocab_size, c.hidden_size, dtype)
        self.start_layer, self.end_layer = 0, c.num_hidden_layers
        self.layers = torch.nn.ModuleList(Layer(c, dtype, qk_norm, moe) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)


class LlamaForCausalLM(torch.nn.Module):
    qk_norm, moe = False, False

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config, dtype, self.qk_norm, self.moe)
        if not config.tie_word_embeddings:
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, positions, vocabulary]."""
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        head = self.lm_head if hasattr(self, "lm_head") else self.model.embed_tokens
        return head.logits(self.model.norm(x))[..., : self.config.vocab_size]


class Qwen3ForCausalLM(LlamaForCausalLM):
    qk_norm = True


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    qk_norm, moe = True, True

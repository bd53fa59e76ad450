"""Run the blocks of a transformers model with less overhead than its own `forward`.

decoder = Decoder(model)
cache = Cache(batch=2, padding=[0, 3])
    logits = decoder(ids, cache)            # [2, vocabulary], at the last position
    logits = decoder(next_ids, cache)       # one token further

At MiniMind's sizes a token takes a few milliseconds, so the overhead around the matrix products matters. Here q, k
and v are one matrix product, and so are gate and up. On a CPU the weights are packed once for all products
(`platform/fused/linear.py`). The cache is preallocated instead of concatenated at each step. A norm is one call.
Grouped query heads read the key-value heads without copies. Works for Llama, Qwen3, Qwen2-MoE and Qwen3-MoE, whose
modules have the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_mcore.platform.fused.attention import scaled_dot_product
from minimind_mcore.platform.fused.linear import Linear

MIN_GROWTH = 128  # minimum number of positions by which a cache grows


class Window(NamedTuple):
    """Positions of the tokens in one call of the decoder.

    Attributes:
        cos, sin: rotary tables of the new positions, [batch or 1, tokens, 1, head_dim]. The first half of the sines is
            negated (`Decoder.rotary`).
        mask: cached positions that each query may attend to, broadcast to [batch, heads, tokens, positions]. None: all
            positions for one token, the causal mask for several.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None


class KeyValues(Protocol):
    """The interface of a cache: `open` before the layers, `store` in each layer, `close` after the layers."""

    def open(self, decoder: Decoder, tokens: int) -> Window:
        """Reserve positions for `tokens` new tokens in each row."""
        ...

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [batch, tokens, kv_heads, head_dim].

        Returns:
            Keys and values to attend to, [batch, kv_heads, positions, head_dim].
        """
        ...

    def close(self) -> None:
        """Count the tokens that were stored."""


class Cache:
    """Keys and values of all positions so far.

    Args:
        batch: number of sequences.
        padding: number of padding positions at the left of each sequence.
    """

    def __init__(self, batch: int, padding: Sequence[int] | None = None) -> None:
        self.batch = batch
        self.length = self.stop = 0
        self.padding = list(padding) if padding and any(padding) else None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.visible: Tensor | None = None  # [batch, 1, 1, capacity], only with padding
        self.cos = self.sin = torch.empty(0)

    @property
    def capacity(self) -> int:
        """Number of allocated positions."""
        return self.keys[0].shape[2] if self.keys else 0

    def open(self, decoder: Decoder, tokens: int) -> Window:
        """Reserve positions for `tokens` new tokens in each row."""
        self._reserve(decoder, tokens)
        self.stop = self.length + tokens
        cos, sin = (table[:, self.length : self.stop, None] for table in (self.cos, self.sin))
        return Window(cos, sin, self._mask(tokens))

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions of a layer, and return all its positions so far."""
        for table, new in ((self.keys[layer], keys), (self.values[layer], values)):
            table[:, :, self.length : self.stop] = new.transpose(1, 2)
        return self.keys[layer][:, :, : self.stop], self.values[layer][:, :, : self.stop]

    def close(self) -> None:
        """Count the tokens that were stored."""
        self.length = self.stop

    def _mask(self, tokens: int) -> Tensor | None:
        """Return the mask, [batch or 1, 1, tokens, stop], or None if the causal mask suffices."""
        if tokens == 1 or (self.length == 0 and self.visible is None):
            return None if self.visible is None else self.visible[..., : self.stop]
        here = torch.arange(self.stop, device=self.cos.device)
        causal = here <= here[self.length :, None]
        if self.visible is None:
            return causal[None, None]
        # Padding attends to itself, because the softmax over an empty set is NaN.
        return (causal & self.visible[..., : self.stop]) | (here == here[self.length :, None])

    def _reserve(self, decoder: Decoder, tokens: int) -> None:
        """Allocate more positions."""
        if self.length + tokens <= self.capacity:
            return
        capacity = max(2 * self.capacity, self.length + tokens + MIN_GROWTH)
        like = decoder.weight
        for tables in (self.keys, self.values):
            grown = [like.new_empty(self.batch, decoder.kv_heads, capacity, decoder.head_dim) for _ in decoder.layers]
            for old, new in zip(tables, grown, strict=False):
                new[:, :, : self.length] = old[:, :, : self.length]
            tables[:] = grown
        positions = torch.arange(capacity, device=like.device)[None]
        if self.padding is not None:
            padding = torch.tensor(self.padding, device=like.device)[:, None]
            self.visible = (positions >= padding)[:, None, None]
            positions = (positions - padding).clamp(min=0)
        self.cos, self.sin = decoder.rotary(positions)

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows` [sequences], which may repeat a number."""
        self.batch = len(rows)
        for tables in (self.keys, self.values):
            tables[:] = [table.index_select(0, rows) for table in tables]
        if self.visible is None or self.padding is None:
            return
        self.padding = [self.padding[row] for row in rows.tolist()]
        self.visible = self.visible.index_select(0, rows)
        self.cos, self.sin = (table.index_select(0, rows) for table in (self.cos, self.sin))


class Decoder:
    """Runs a model step by step.

    Args:
        model: a transformers model. Its q, k, v, gate and up become views of the joined weights.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.layers = [_Layer(layer) for layer in model.model.layers]
        self.head = Linear(model.lm_head.weight)

    @property
    def weight(self) -> Tensor:
        """The embedding [vocabulary, hidden], which has the model's device and dtype."""
        weight: Tensor = self.model.model.embed_tokens.weight
        return weight

    def pack(self) -> None:
        """Pack the weights again after they were changed in place."""
        for product in [self.head, *(product for layer in self.layers for product in layer.products)]:
            product.pack()

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [batch, tokens, head_dim] of positions [batch, tokens], for `x * cos + swapped * sin`.

        `swapped` has the second half of x before the first, so the first half of the sines is negated.
        """
        cos, sin = self.model.model.rotary_emb(self.weight, positions)
        left, right = sin.chunk(2, dim=-1)
        return cos, torch.cat((-left, right), dim=-1)

    def __call__(self, ids: Tensor, cache: KeyValues, last: Tensor | None = None) -> Tensor:
        """Return the logits [batch, vocabulary] after `ids` [batch, tokens], and add `ids` to the cache.

        Args:
            ids: new tokens of each sequence.
            cache: cache of the earlier tokens.
            last: index of each sequence's last token in `ids`, [batch]. None: the last column.
        """
        window = cache.open(self, ids.shape[1])
        x = self.model.model.embed_tokens(ids)
        for number, layer in enumerate(self.layers):
            x = layer.project(self._attend(layer, layer.norm1(x), window, cache, number), added=x)
            x = layer.mlp(layer.norm2(x), added=x)
        cache.close()
        norm = self.model.model.norm
        x = x[:, -1] if last is None else x[torch.arange(len(last), device=x.device), last]
        return self.head(_norm(x, norm.weight, norm.variance_epsilon))

    def _attend(self, layer: _Layer, x: Tensor, window: Window, cache: KeyValues, number: int) -> Tensor:
        """Return the attention output of a layer, [batch, tokens, heads * head_dim]."""
        batch, tokens, _ = x.shape
        cos, sin, mask = window
        both = self.heads + self.kv_heads
        qkv = layer.qkv(x).view(batch, tokens, -1, self.head_dim)
        qk = layer.norm_heads(qkv[:, :, :both], self.heads)
        left, right = qk.chunk(2, dim=-1)
        qk = torch.addcmul(qk * cos, torch.cat((right, left), dim=-1), sin)
        keys, values = cache.store(number, qk[:, :, self.heads :], qkv[:, :, both:])
        if tokens == 1:  # the query heads of a key-value head become several queries of one head
            q = qk[:, 0, : self.heads].view(batch, self.kv_heads, -1, self.head_dim)
            return scaled_dot_product(q, keys, values, mask, False, self.scale).reshape(batch, 1, -1)
        q = qk[:, :, : self.heads].transpose(1, 2)
        out = scaled_dot_product(q, keys, values, mask, mask is None, self.scale)
        return out.transpose(1, 2).reshape(batch, tokens, -1)


class _Layer:
    """The weights of one block in the form that the decoder uses."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self.norms = [(n.weight, n.variance_epsilon) for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.q_norm, self.k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self.project = _joined(attention.o_proj)
        self.products = [self.qkv, self.project]
        self.experts = None if hasattr(layer.mlp, "gate_proj") else layer.mlp
        if self.experts is None:
            self.gate_up, self.down = _joined(layer.mlp.gate_proj, layer.mlp.up_proj), _joined(layer.mlp.down_proj)
            self.products += [self.gate_up, self.down]

    def norm1(self, x: Tensor) -> Tensor:
        """Normalize the input of the attention."""
        return _norm(x, *self.norms[0])

    def norm2(self, x: Tensor) -> Tensor:
        """Normalize the input of the MLP."""
        return _norm(x, *self.norms[1])

    def norm_heads(self, qk: Tensor, heads: int) -> Tensor:
        """Normalize queries and keys, if the model has such norms."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        q = _norm(qk[:, :, :heads], self.q_norm.weight, self.q_norm.variance_epsilon)
        k = _norm(qk[:, :, heads:], self.k_norm.weight, self.k_norm.variance_epsilon)
        return torch.cat((q, k), dim=2)

    def mlp(self, x: Tensor, added: Tensor) -> Tensor:
        """Add the output of SwiGLU, or of the experts, to `added`."""
        if self.experts is not None:
            out = self.experts(x)
            routed: Tensor = out[0] if isinstance(out, tuple) else out  # transformers 4 also returns router logits
            return added + routed
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up), added)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _joined(*layers: Any) -> Linear:
    """Join the weights and biases of linear layers with the same input. The layers become views of the result."""
    joined: list[Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        whole = None if parts[0] is None else torch.cat([part.data for part in parts])
        if whole is not None:
            for part, block in zip(parts, torch.split(whole, [len(p) for p in parts]), strict=True):
                part.data = block
        joined.append(whole)
    weight, bias = joined
    assert weight is not None
    return Linear(weight, bias)

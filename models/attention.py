"""Core attention: the fastest attention kernel of the device, with the arguments of megatron-core's core attention.

On a GPU torch's kernels run. On an NPU CANN's fused operator runs. On a CPU `causal_attention` runs for whole
sequences without dropout, packing or a given mask, and torch's kernels run otherwise. No scores of size
sequence x sequence stay in memory. The exception is a CPU with up to 512 positions: `causal_attention` then keeps the
part of the softmax on and below the diagonal for its backward pass. Recomputing that part would be slower.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.platform import ascend
from minimind_mcore.platform.fused.attention import causal_attention, scaled_dot_product

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class SDPACoreAttention(MegatronModule):  # type: ignore[misc]
    """Replace megatron-core's `DotProductAttention` (0.12 and 0.16), which stores all scores.

    Raises:
        UserError: on construction, for context parallelism or sliding windows, which are not supported.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise UserError(
                f"--context-parallel-size {config.context_parallel_size} is not supported by this attention, which "
                "keeps a whole sequence on one rank; use 1, or MindSpeed's attention on an NPU"
            )
        if getattr(config, "window_size", None) is not None:
            raise UserError("sliding-window attention is not supported: MiniMind attends to the whole sequence")
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Compute attention.

        Args:
            query: [sequence, batch, heads, head_dim] with the heads of this tensor-parallel rank. A packed
                batch has no batch axis: [tokens, heads, head_dim].
            key: like the query, with its own length and fewer key-value heads.
            value: like the key.
            attention_mask: True where a query must not attend, in a shape that broadcasts to
                [batch, 1, query, key]. None: no mask, or the causal mask for a causal type. With type `causal` a
                given mask replaces the causal mask, as in megatron-core.
            attn_mask_type: overrides the type of the constructor.
            attention_bias: not supported.
            packed_seq_params: `cu_seqlens_q` [sequences + 1] of a packed batch, in tokens. The tensor must be on
                the CPU: every layer reads its values, and each read of a tensor on the device would synchronize.

        Returns:
            [sequence, batch, heads * head_dim], or [tokens, heads * head_dim].
        """
        if attention_bias is not None:
            raise UserError("attention_bias is not supported: MiniMind has no biases")
        mask_type = attn_mask_type or self.attn_mask_type
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params, mask_type)
        if attention_mask is None and mask_type in _CAUSAL and query.shape[0] == key.shape[0] and ascend.operators():
            return self._fused(query, key, value)
        if attention_mask is None and mask_type in _CAUSAL and self._plain_on_cpu(query, key):
            return causal_attention(query, key, value, self.scale).flatten(2)
        # [s, b, n, d] -> [b, n, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask, is_causal = self._mask(query, key, attention_mask, mask_type)
        out = self._attend(query, key, value, mask, is_causal)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _plain_on_cpu(self, query: Tensor, key: Tensor) -> bool:
        dropout = self.dropout if self.training else 0.0
        plain = query.dtype in (torch.float32, torch.bfloat16) and dropout == 0.0
        return plain and query.device.type == "cpu" and 1 < query.shape[0] == key.shape[0]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        with self._rng(dropout):
            return scaled_dot_product(query, key, value, mask, is_causal, self.scale, dropout)

    def _mask(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None, mask_type: AttnMaskType
    ) -> tuple[Tensor | None, bool]:
        """Return the mask in torch's convention (True: may attend), and whether it is the plain causal mask."""
        length, keys = query.shape[2], key.shape[2]
        if attention_mask is None:
            if mask_type not in _CAUSAL or length == 1:
                return None, False
            if length == keys:
                return None, True
            return _causal_mask(length, keys, query.device), False
        allowed = ~attention_mask
        if mask_type == AttnMaskType.padding_causal and length > 1:
            allowed = allowed & _causal_mask(length, keys, query.device)
        return allowed, False

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: Any, mask_type: AttnMaskType) -> Tensor:
        """Compute attention within each packed sequence, so that no attention crosses a boundary.

        CANN's operator takes all sequences in one call. torch's kernels need one call per sequence.
        """
        out, ends = [], packed.cu_seqlens_q.tolist()
        if mask_type in _CAUSAL and ascend.operators():
            return self._fused(query, key, value, ends[1:])
        for start, end in itertools.pairwise(ends):
            q, k, v = (x[None, start:end].transpose(1, 2) for x in (query, key, value))
            out.append(self._attend(q, k, v, None, mask_type in _CAUSAL).transpose(1, 2)[0].flatten(1))
        return torch.cat(out)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, ends: list[int] | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        with self._rng(dropout):
            return ascend.causal_attention(query, key, value, self.scale, dropout, ends)

    def _rng(self, dropout: float) -> AbstractContextManager[None]:
        """Return the context that selects the random stream of the dropout.

        The ranks of tensor parallelism hold different heads, so each rank draws its dropout from its own stream.
        """
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        context: AbstractContextManager[None] = tracker.fork()
        return context


def _causal_mask(length: int, keys: int, device: torch.device) -> Tensor:
    """Return [length, keys], in which the last query attends to every key."""
    return torch.ones(length, keys, dtype=torch.bool, device=device).tril(keys - length)

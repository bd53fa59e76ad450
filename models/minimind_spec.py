"""The layer of every MiniMind model, as a megatron-core spec.

    --spec minimind_mcore.models.minimind_spec layer_spec

The spec consists of small classes that read the `TransformerConfig` when the layer is built: qk-norm or none, dense MLP
or mixture of experts, shared expert or none. One constant therefore serves all models, without global arguments and
without Transformer Engine, in plain megatron-core (0.12.1, 0.16.1), Megatron-LM and MindSpeed-LLM. Never import this
module from a package's `__init__`, because MindSpeed must patch megatron-core first. Under MindSpeed the norm,
attention
and router are MindSpeed's, so that its fused kernels run. The norm after the last layer is not part of a layer:
`device.setup()` makes megatron-core build `Norm` there too (`platform/patches.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from minimind_mcore.models.attention import SDPACoreAttention
from minimind_mcore.models.moe import MiniMindRouter, StraightThroughRouter, build_moe
from minimind_mcore.platform import ascend
from minimind_mcore.platform.fused.norm import Norm


class QKNorm:
    """The norm of each query head and key head, or no norm."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        return Norm(config, hidden_size, eps) if config.qk_layernorm else IdentityOp()


class CoreAttention:
    """torch's attention, MindSpeed's under MindSpeed, or Transformer Engine's if requested."""

    def __new__(cls, config: TransformerConfig, **kwargs: Any) -> Any:
        if ascend.active():
            return DotProductAttention(config=config, **kwargs)
        if getattr(config, "transformer_impl", "local") == "transformer_engine":
            from megatron.core.extensions.transformer_engine import TEDotProductAttention

            return TEDotProductAttention(config=config, **kwargs)
        return SDPACoreAttention(config=config, **kwargs)


class FeedForward:
    """The dense MLP, or the mixture of experts."""

    def __new__(cls, config: TransformerConfig, **kwargs: Any) -> Any:
        if config.num_moe_experts:
            return build_moe(config, None if ascend.active() else MiniMindRouter)
        if "ffn_hidden_size" in inspect.signature(MLP.__init__).parameters:
            kwargs["ffn_hidden_size"] = config.ffn_hidden_size  # 0.16.1 warns if the value is left to its default
        return MLP(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear), **kwargs)


class StraightThroughFeedForward(FeedForward):
    """The mixture of experts with router weight `straight_through`, whatever the config has.

    MindSpeed-LLM's config has no such field, and MindSpeed-LLM rejects unknown flags, so the layer spec selects the
    rule.
    """

    def __new__(cls, config: TransformerConfig, **kwargs: Any) -> Any:
        router = StraightThroughRouter if ascend.active() else MiniMindRouter
        return build_moe(config, router)


layer_spec = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=Norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=CoreAttention,
                linear_proj=RowParallelLinear,
                q_layernorm=QKNorm,
                k_layernorm=QKNorm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        pre_mlp_layernorm=Norm,
        mlp=FeedForward,
        mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
    ),
)

straight_through_layer_spec = ModuleSpec(
    module=TransformerLayer,
    submodules=dataclasses.replace(layer_spec.submodules, mlp=StraightThroughFeedForward),  # pyright: ignore[reportArgumentType]
)

"""Convert a `ModelConfig` to megatron-core's `TransformerConfig`, and build the `GPTModel`.

This module imports megatron-core: call `minimind_mcore.platform.device.setup()` first.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from minimind_mcore.models import yarn

if TYPE_CHECKING:
    from minimind_mcore.models.config import ModelConfig, RouterWeight


@dataclass
class MiniMindTransformerConfig(TransformerConfig):  # type: ignore[misc]
    """megatron-core's config with one more field for MiniMind."""

    router_weight: RouterWeight = "normalized"
    """How the experts' scores become the weights of their outputs; see `MoEConfig`."""


_FIELDS = {field.name for field in dataclasses.fields(MiniMindTransformerConfig)}


def transformer_config(config: ModelConfig, **overrides: Any) -> MiniMindTransformerConfig:
    """Return megatron-core's configuration of a model. `overrides` replace its fields."""
    fields: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "qk_layernorm": config.qk_layernorm,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Megatron's default dispatcher refuses variable sequence lengths, even in a model without experts.
        "moe_token_dispatcher_type": "alltoall",
    }
    if "transformer_impl" in _FIELDS:  # in 0.12.1 this is only a flag
        fields["transformer_impl"] = "local"
    if moe := config.moe:
        fields |= {
            "num_moe_experts": moe.num_experts,
            "moe_ffn_hidden_size": moe.ffn_hidden_size,
            "moe_router_topk": moe.topk,
            "moe_router_pre_softmax": moe.topk == 1 or not moe.norm_topk_prob,
            "router_weight": moe.router_weight or "normalized",
            "moe_router_load_balancing_type": moe.load_balancing,
            "moe_aux_loss_coeff": moe.aux_loss_coeff,
            "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        }
    return MiniMindTransformerConfig(**fields | overrides)


def build_gpt_model(
    config: ModelConfig,
    core_config: TransformerConfig,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    parallel_output: bool = True,
) -> GPTModel:
    """Build this rank's shard of the model (one chunk with virtual pipeline stages).

    Args:
        config: the architecture.
        core_config: result of `config.transformer_config(...)`.
        pre_process: the chunk has the embedding.
        post_process: the chunk has the final norm and the output layer.
        vp_stage: number of the chunk on this rank. megatron-core 0.12.1 reads it from its global state.
        parallel_output: keep the logits split over the vocabulary, as the parallel loss needs them.
    """
    from minimind_mcore.models.minimind_spec import layer_spec

    stage: dict[str, Any] = {}
    if vp_stage is not None and hasattr(core_config, "pipeline_model_parallel_layout"):
        stage["vp_stage"] = vp_stage
    model = GPTModel(
        core_config,
        layer_spec,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
        **stage,
    )
    if config.inference_rope_scaling:
        # megatron-core 0.12.1 implements YaRN only for multi-head latent attention.
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary.inv_freq * rotary.inv_freq.new_tensor(yarn.factors(config.head_dim, config.rope_theta))
    return model

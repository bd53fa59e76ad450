"""MiniMind's mixture of experts on megatron-core.

MiniMind's router differs from megatron-core's only in the weight of a single expert. minimind-3 sends a token to one
expert and divides the weight by itself, so that the weight is exactly 1 (model_minimind.py, `norm_topk_prob`). Then
only the auxiliary loss trains the router. `straight_through` keeps the weight of 1 and gives the router the gradient of
the score. All else is megatron-core's: the softmax, the auxiliary losses over micro-batches and sequences (in any
layout, and in its log), and the dispatch.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from minimind_mcore.errors import UserError


class MiniMindRouter(TopKRouter):  # type: ignore[misc]
    """Top-k router with the three rules of `MoEConfig.router_weight`."""

    config: Any  # `CoreConfig`

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: [sequence, batch, experts], of this rank's tokens.
            args: a padding mask, in 0.16.1.
            kwargs: a padding mask, in 0.16.1.

        Returns:
            Weights [tokens, experts], zero for experts that are not chosen, and the choice as booleans.
        """
        probs, routing_map = super().routing(logits, *args, **kwargs)
        if self.config.router_weight == "straight_through":
            probs = straight_through(probs, routing_map)
        # Without pre-softmax, megatron-core's softmax over the chosen logits has already normalized.
        elif self.config.router_weight == "normalized" and self.config.moe_router_pre_softmax:
            # 1e-20 as in upstream: it vanishes in float32, and the best k probabilities of a softmax never sum to zero.
            probs = probs / (probs.sum(dim=-1, keepdim=True) + 1e-20)
        return probs, routing_map


class StraightThroughRouter(TopKRouter):  # type: ignore[misc]
    """Router whose weights have the value 1 and the gradient of the scores, for MindSpeed-LLM.

    The parent router must return the scores: `--moe-router-pre-softmax` without `--norm-topk-prob`.
    """

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probs, routing_map = super().routing(logits, *args, **kwargs)
        return straight_through(probs, routing_map), routing_map


def straight_through(scores: Tensor, routing_map: Tensor) -> Tensor:
    """Return weights of exactly 1 where `routing_map` is set and 0 elsewhere, with the gradient of `scores`.

    Args:
        scores: [tokens, experts], zero for experts that are not chosen.
        routing_map: [tokens, experts], the choice as booleans.
    """
    # s - s is 0 in every dtype, so the sum is exactly 0 or 1. The other order, (1 - s) + s, would round.
    return routing_map.to(scores.dtype) + (scores - scores.detach())


def build_moe(config: TransformerConfig, router: type[TopKRouter] | None) -> MoELayer:
    """Build the mixture of experts of one layer.

    Args:
        config: config with `num_moe_experts` and the other settings.
        router: class of the router. None if the platform's own router computes the same function.
    """
    spec: Any = get_moe_module_spec(
        use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    if router is None:
        return MoELayer(config, spec.submodules)
    if config.moe_grouped_gemm and router is MiniMindRouter:
        raise UserError("--moe-grouped-gemm is not supported here: leave it out (on an NPU MindSpeed has it)")
    if hasattr(spec.submodules, "router"):
        spec.submodules.router = router
        return MoELayer(config, spec.submodules)
    layer = MoELayer(config, spec.submodules)
    layer.router = router(config)  # the spec of 0.12.1 has no field for the router
    return layer


def collect_aux_losses(micro_batches: int) -> dict[str, float]:
    """Return the auxiliary losses logged since the last call, and reset them. Collective.

    megatron-core's own `track_moe_metrics` needs a tensorboard writer to return values, and in 0.12.1 it
    reports the losses of one data-parallel rank for all.

    Args:
        micro_batches: number of micro-batches that each rank has run since the last call.

    Returns:
        By megatron-core's name ("load_balancing_loss", in 0.16.1 also "seq_load_balancing_loss"):
        the mean over layers, micro-batches and data-parallel ranks, without the coefficient.
    """
    where: Any = moe_utils if hasattr(moe_utils, "get_moe_layer_wise_logging_tracker") else parallel_state
    losses = {}
    for name, entry in where.get_moe_layer_wise_logging_tracker().items():
        values: Tensor = entry["values"]  # [layers], zero for layers of other pipeline stages
        dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
        if entry.get("reduce_group") is not None:  # the ranks that have parts of the same sequences
            dist.all_reduce(values, group=entry["reduce_group"])
        replicas: Any = parallel_state.get_data_parallel_group()
        dist.all_reduce(values, group=replicas)
        losses[name] = float(values.mean()) / micro_batches / dist.get_world_size(replicas)
        values.zero_()
    return losses

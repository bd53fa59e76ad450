"""MiniMind's mixture of experts on megatron-core.

Its router differs from megatron-core's in one thing: minimind-3 sends a token to one expert and
divides the weight by itself, so that it is exactly 1 (model_minimind.py, `norm_topk_prob`). Then
only the auxiliary loss trains the router. The rest is megatron-core's own: the softmax, the
auxiliary losses over micro-batches and sequences (under any layout, and in its log), the dispatch.
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
    """Top-k router that can normalise the weights after a softmax over all experts."""

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: [sequence, batch, experts], of this rank's tokens.
            args: a padding mask, in 0.16.1.
            kwargs: the same.

        Returns:
            Weights [tokens, experts], zero for experts not chosen, and the choice as booleans.
        """
        probs, routing_map = super().routing(logits, *args, **kwargs)
        # Without pre-softmax megatron-core's softmax over the chosen logits has normalised already.
        if self.config.moe_router_pre_softmax and getattr(self.config, "norm_topk_prob", True):
            # 1e-20 as upstream: it vanishes in float32, and no softmax's best k sum to zero.
            probs = probs / (probs.sum(dim=-1, keepdim=True) + 1e-20)
        return probs, routing_map


def build_moe(config: TransformerConfig, *, own_router: bool) -> MoELayer:
    """The mixture of experts of one layer, as `config` describes it.

    Args:
        config: with `num_moe_experts` and so on.
        own_router: route with `MiniMindRouter`; False where the platform's router knows how.
    """
    spec = get_moe_module_spec(
        use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    if not own_router:
        return MoELayer(config, spec.submodules)
    if config.moe_grouped_gemm:
        raise UserError("--moe-grouped-gemm is not supported here: leave it out (on an NPU MindSpeed has it)")
    if hasattr(spec.submodules, "router"):
        spec.submodules.router = MiniMindRouter
        return MoELayer(config, spec.submodules)
    layer = MoELayer(config, spec.submodules)
    layer.router = MiniMindRouter(config)  # 0.12.1 takes no router in its spec
    return layer


def collect_aux_losses(micro_batches: int) -> dict[str, float]:
    """The auxiliary losses logged since the last call, which it forgets. All ranks must call it.

    megatron-core's own `track_moe_metrics` needs a tensorboard writer to answer, and that of 0.12.1
    reports one data-parallel rank's losses for all.

    Args:
        micro_batches: that each rank has run since the last call.

    Returns:
        By megatron-core's name ("load_balancing_loss", in 0.16.1 also "seq_load_balancing_loss"):
        the mean over layers, micro-batches and data-parallel ranks, without the coefficient.
    """
    where: Any = moe_utils if hasattr(moe_utils, "get_moe_layer_wise_logging_tracker") else parallel_state
    losses = {}
    for name, entry in where.get_moe_layer_wise_logging_tracker().items():
        values: Tensor = entry["values"]  # [layers], zero for those of other pipeline stages
        dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
        if entry.get("reduce_group") is not None:  # the ranks that hold parts of the same sequences
            dist.all_reduce(values, group=entry["reduce_group"])
        replicas = parallel_state.get_data_parallel_group()
        dist.all_reduce(values, group=replicas)
        losses[name] = float(values.mean()) / micro_batches / dist.get_world_size(replicas)
        values.zero_()
    return losses

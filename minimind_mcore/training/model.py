"""This rank's part of the model, wrapped for mixed precision and data parallelism."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import device
from minimind_mcore.platform.fused import compiled

if TYPE_CHECKING:
    from minimind_mcore.training.job import Job


def _leave(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def core_config(args: argparse.Namespace, layout: ParallelLayout, model: ModelConfig | None = None) -> Any:
    """megatron-core's `TransformerConfig` for a validated command line; of another `model` in place of its own."""
    overrides: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.tp,
        "sequence_parallel": args.sequence_parallel,
        "params_dtype": args.params_dtype,
        "pipeline_dtype": args.params_dtype,
        "bf16": args.bf16,
        "fp16": args.fp16,
        "attention_dropout": args.attention_dropout,
        "hidden_dropout": args.hidden_dropout,
        "init_method_std": args.init_method_std,
        "variable_seq_lengths": args.variable_seq_lengths,
        "calculate_per_token_loss": args.calculate_per_token_loss,
        "overlap_p2p_comm": layout.vpp is not None and args.overlap_p2p_comm,
        "batch_p2p_comm": not (layout.vpp is not None and args.overlap_p2p_comm),
        # A stage frees its output once it is sent: its memory is not needed for the backward pass.
        "deallocate_pipeline_outputs": True,
        "recompute_granularity": args.recompute_granularity,
        "recompute_method": args.recompute_method,
        "recompute_num_layers": args.recompute_num_layers,
        # Where Apex is missing, by minimind_mcore.platform.fused.
        "gradient_accumulation_fusion": True,
        "bias_activation_fusion": True,
        # Fusions that need Transformer Engine or a compiler.
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        # `initialize` sets every weight; megatron-core's own pass marks what is split over ranks.
        "init_method": _leave,
        "output_layer_init_method": _leave,
    }
    if args.transformer_impl == "transformer_engine":
        overrides["transformer_impl"] = _transformer_engine()
    if args.num_experts:
        overrides |= {
            "moe_z_loss_coeff": args.moe_z_loss_coeff,
        }
    return (model or ModelConfig.from_args(args)).transformer_config(**overrides)


def _transformer_engine() -> str:
    """The name of that implementation, where it can be had."""
    if importlib.util.find_spec("transformer_engine") is None or device.current().kind != "cuda":
        raise UserError(
            "--transformer-impl transformer_engine: Transformer Engine is not installed, or has no device here; "
            "use --transformer-impl local"
        )
    return "transformer_engine"


def build_model(args: argparse.Namespace, layout: ParallelLayout, job: Job) -> list[Any]:
    """Build, initialise and wrap the chunks of this rank (one, or `layout.vpp` of them), for training.

    The weights depend on `--seed` and their names only: every layout starts from the same model. The
    job may change it before it is wrapped.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    chunks = build_chunks(args, layout, job)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        use_distributed_optimizer=args.use_distributed_optimizer,
        bucket_size=args.ddp_bucket_size or max(40_000_000, 1_000_000 * layout.dp),
    )
    # Only the first chunk of a rank overlaps its reduction bucket by bucket, as Megatron does.
    return [
        DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=i > 0 or not args.overlap_grad_reduce)
        for i, chunk in enumerate(chunks)
    ]


def build_chunks(args: argparse.Namespace, layout: ParallelLayout, job: Job) -> list[Any]:
    """The chunks of this rank, initialised, in the run's precision; not wrapped for data parallelism."""
    from megatron.core import parallel_state
    from megatron.core.transformer.module import Float16Module

    from minimind_mcore.models.core_config import build_gpt_model
    from minimind_mcore.models.init import initialize

    model_config, config = ModelConfig.from_args(args), core_config(args, layout)
    stages = layout.vpp or 1
    first = parallel_state.get_pipeline_model_parallel_rank() == 0
    last = parallel_state.get_pipeline_model_parallel_rank() == layout.pp - 1
    chunks: list[Any] = []
    for stage in range(stages):
        if layout.vpp:
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        chunk = build_gpt_model(
            model_config,
            config,
            pre_process=first and stage == 0,
            post_process=last and stage == stages - 1,
            vp_stage=stage if layout.vpp else None,
        )
        chunks.append(chunk.to(device.current().torch_device))
    initialize(chunks, model_config, scheme=args.minimind_init or "megatron", seed=args.seed, std=args.init_method_std)
    job.prepare_model(chunks, layout)
    # The hooks that gather weights within a forward pass would be traced.
    if compiled.usable() and not args.overlap_param_gather:
        compiled.compile_layers(chunks)
    if args.params_dtype != torch.float32:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    return chunks


@contextlib.contextmanager
def weights_gathered(args: argparse.Namespace, model: list[Any]) -> Iterator[None]:
    """Inside, every rank holds all its weights: `--overlap-param-gather` otherwise gathers them in the next step."""
    overlapped = model if args.overlap_param_gather else []
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    yield
    for chunk in overlapped:
        chunk.enable_forward_pre_hook()

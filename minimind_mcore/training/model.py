"""This rank's shard of the model, wrapped for mixed precision and data parallelism."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import fields_from
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import device
from minimind_mcore.platform.fused import compiled
from minimind_mcore.training.config import TrainConfig

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    from minimind_mcore.training.job import Job


def _leave(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def core_config(config: TrainConfig, layout: ParallelLayout, model: ModelConfig) -> TransformerConfig:
    """Return megatron-core's `TransformerConfig` of a model for a layout and the settings of a run."""
    overrides: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.tp,
        # Megatron also ignores --sequence-parallel at TP=1.
        "sequence_parallel": config.parallel.sequence_parallel and layout.tp > 1,
        "params_dtype": config.precision.params_dtype,
        "pipeline_dtype": config.precision.params_dtype,
        "bf16": config.precision.bf16,
        "fp16": config.precision.fp16,
        "attention_dropout": config.model.attention_dropout,
        "hidden_dropout": config.model.hidden_dropout,
        "init_method_std": config.model.init_method_std,
        "variable_seq_lengths": config.data.variable_seq_lengths,
        "calculate_per_token_loss": config.optimizer.calculate_per_token_loss,
        "overlap_p2p_comm": layout.vpp is not None and config.parallel.overlap_p2p_comm,
        "batch_p2p_comm": not (layout.vpp is not None and config.parallel.overlap_p2p_comm),
        # A stage frees its output after sending it, because the backward pass does not need the values.
        "deallocate_pipeline_outputs": True,
        "recompute_granularity": config.model.recompute_granularity,
        "recompute_method": config.model.recompute_method,
        "recompute_num_layers": config.model.recompute_num_layers,
        # Without Apex, minimind_mcore.platform.fused provides the kernel.
        "gradient_accumulation_fusion": True,
        "bias_activation_fusion": True,
        # These fusions need Transformer Engine or a compiler.
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        # `initialize` sets every weight. megatron-core's own initialization only marks the weights that ranks shard.
        "init_method": _leave,
        "output_layer_init_method": _leave,
    }
    if config.model.transformer_impl == "transformer_engine":
        overrides["transformer_impl"] = _transformer_engine()
    if config.model.num_experts:
        overrides["moe_z_loss_coeff"] = config.model.moe_z_loss_coeff
    return model.transformer_config(**overrides)


def _transformer_engine() -> str:
    """Return "transformer_engine".

    Raises:
        UserError: Transformer Engine is not installed, or there is no CUDA device.
    """
    if importlib.util.find_spec("transformer_engine") is None or device.current().kind != "cuda":
        raise UserError(
            "--transformer-impl transformer_engine: Transformer Engine is not installed, or there is no CUDA device; "
            "use --transformer-impl local"
        )
    return "transformer_engine"


def build_model(config: TrainConfig, job: Job) -> list[MegatronModule]:
    """Build, initialize and wrap the chunks of this rank (one, or `config.layout.vpp` chunks) for training.

    The weights depend only on `--seed` and their names, so every layout starts with the same model. The job may
    change the model before it is wrapped.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    chunks = build_chunks(config, job)
    ddp = DistributedDataParallelConfig(
        **fields_from(DistributedDataParallelConfig, vars(config.parallel)),
        grad_reduce_in_fp32=config.precision.accumulate_allreduce_grads_in_fp32,
        bucket_size=config.parallel.ddp_bucket_size or max(40_000_000, 1_000_000 * config.layout.dp),
    )
    # Only a rank's first chunk overlaps its gradient reduction bucket by bucket, as in Megatron.
    return [
        DistributedDataParallel(
            chunk.config, ddp, chunk, disable_bucketing=i > 0 or not config.parallel.overlap_grad_reduce
        )
        for i, chunk in enumerate(chunks)
    ]


def build_chunks(config: TrainConfig, job: Job) -> list[MegatronModule]:
    """Build and initialize the chunks of this rank in the run's precision, without the data-parallel wrapper."""
    from megatron.core import parallel_state
    from megatron.core.transformer.module import Float16Module

    from minimind_mcore.models.core_config import build_gpt_model
    from minimind_mcore.models.init import initialize

    model, layout = config.architecture, config.layout
    core = core_config(config, layout, model)
    stages = layout.vpp or 1
    first = parallel_state.get_pipeline_model_parallel_rank() == 0
    last = parallel_state.get_pipeline_model_parallel_rank() == layout.pp - 1
    built: list[GPTModel] = []
    for stage in range(stages):
        if layout.vpp:
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        chunk = build_gpt_model(
            model,
            core,
            pre_process=first and stage == 0,
            post_process=last and stage == stages - 1,
            vp_stage=stage if layout.vpp else None,
        )
        built.append(chunk.to(device.current().torch_device))
    initialize(
        built,
        model,
        scheme=config.model.minimind_init or "megatron",
        seed=config.data.seed,
        std=config.model.init_method_std,
    )
    job.prepare_model(built)
    # The compiler would trace the hooks that gather weights during a forward pass.
    if compiled.usable() and not config.parallel.overlap_param_gather:
        compiled.compile_layers(built)
    half = config.precision.params_dtype != torch.float32
    return [Float16Module(core, chunk) if half else chunk for chunk in built]


@contextlib.contextmanager
def weights_gathered(config: TrainConfig, model: Sequence[MegatronModule]) -> Iterator[None]:
    """Make every rank hold all its weights within the context.

    `--overlap-param-gather` delays the all-gather of updated weights to the next forward pass. Until then a rank has
    new values only in its own shard of the distributed optimizer.
    """
    overlapped = model if config.parallel.overlap_param_gather else []
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()  # pyright: ignore[reportCallIssue]  (DistributedDataParallel)
    yield
    for chunk in overlapped:
        chunk.enable_forward_pre_hook()  # pyright: ignore[reportCallIssue]

"""The parallel layout of a run, and the checks that a command line must pass before anything is built."""

from __future__ import annotations

import argparse
import dataclasses
import logging

import torch

from minimind_mcore import log
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.errors import UserError, require
from minimind_mcore.inputs import ranges
from minimind_mcore.models.config import ModelConfig

logger = logging.getLogger(__name__)


def validate(args: argparse.Namespace, world_size: int) -> ParallelLayout:
    """Check a parsed command line, and set the values that follow from it, under Megatron's names.

    Raises:
            UserError: values contradict each other, the model, or the number of processes.
    """
    for name, wrong in ranges.problems(args):  # a namespace of another parser may be out of range
        raise UserError(f"--{name.replace('_', '-')}: {wrong}")
    model = ModelConfig.from_args(args)
    layout = _layout(args, world_size)
    _check_model(model, layout, args)
    _fill_batch(args, layout)
    _fill_schedule(args)
    _fill_precision(args)
    _fill_recompute(args)
    args.world_size = world_size
    args.data_parallel_size = layout.dp
    args.virtual_pipeline_model_parallel_size = layout.vpp
    args.transformer_pipeline_model_parallel_size = layout.pp
    args.kv_channels = model.head_dim
    args.ffn_hidden_size = model.ffn_hidden_size
    args.sequence_parallel = args.sequence_parallel and layout.tp > 1
    require(
        args.seq_length % layout.tp == 0 or not args.sequence_parallel,
        f"--sequence-parallel: --seq-length {args.seq_length} is not a multiple of "
        f"--tensor-model-parallel-size {layout.tp}",
    )
    return layout


def _layout(args: argparse.Namespace, world_size: int) -> ParallelLayout:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, ep = args.context_parallel_size, args.expert_model_parallel_size
    require(
        cp == 1,
        f"--context-parallel-size {cp}: the scaled-dot-product attention in use keeps a whole sequence on one "
        "rank; expected 1. Sequences of MiniMind's length do not need it",
    )
    require(
        world_size % (tp * pp) == 0,
        f"{world_size} processes cannot be split into TP={tp} x PP={pp}: expected a multiple of {tp * pp}",
    )
    dp = world_size // (tp * pp)
    require(ep == 1 or args.num_experts is not None, f"--expert-model-parallel-size {ep} needs a model with experts")
    require(
        dp % ep == 0,
        f"--expert-model-parallel-size {ep} does not divide the {dp} data-parallel ranks of TP={tp} PP={pp} "
        f"on {world_size} processes",
    )
    vpp = _virtual_stages(args, pp)
    return dataclasses.replace(ParallelLayout.from_args(args), world_size=world_size, vpp=vpp)


def _virtual_stages(args: argparse.Namespace, pp: int) -> int | None:
    per_stage = args.num_layers_per_virtual_pipeline_stage
    if per_stage is None:
        return None
    require(pp > 1, "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size 2 or more")
    require(
        args.overlap_p2p_comm or pp > 2,
        "--no-overlap-p2p-communication with virtual stages and PP=2: megatron-core then mixes up activations and "
        "gradients, as the next rank is the previous one; leave it out",
    )
    layers = args.num_layers // pp
    require(
        layers % per_stage == 0,
        f"--num-layers-per-virtual-pipeline-stage {per_stage} does not divide the {layers} layers of a stage",
    )
    if layers == per_stage:
        log.warn_once(
            logger,
            f"--num-layers-per-virtual-pipeline-stage {per_stage} (VPP): found all {layers} layers of a stage, so the "
            "pipeline is not virtual. For a virtual pipeline give fewer layers than a stage has",
        )
    return int(layers // per_stage) if layers > per_stage else None


def _check_model(model: ModelConfig, layout: ParallelLayout, args: argparse.Namespace) -> None:
    divisions = [
        ("--num-layers", model.num_layers, "PP", layout.pp),
        ("--num-attention-heads", model.num_heads, "TP", layout.tp),
        ("--num-query-groups", model.num_kv_heads, "TP", layout.tp),
        ("--ffn-hidden-size", model.ffn_hidden_size, "TP", layout.tp),
        ("--padded-vocab-size", model.vocab_size, "TP", layout.tp),
    ]
    if model.moe:
        divisions.append(("--num-experts", model.moe.num_experts, "EP", layout.ep))
        require(
            layout.tp == 1 or args.sequence_parallel,
            "experts with tensor parallelism need --sequence-parallel (megatron-core refuses otherwise)",
        )
    for flag, value, name, size in divisions:
        require(value % size == 0, f"{flag} {value} is not a multiple of {name}={size}")
    require(
        args.seq_length is not None and args.seq_length <= model.max_position_embeddings,
        f"--seq-length: found {args.seq_length}, expected at most --max-position-embeddings "
        f"{model.max_position_embeddings}",
    )


def _fill_batch(args: argparse.Namespace, layout: ParallelLayout) -> None:
    require(bool(args.micro_batch_size), "--micro-batch-size is missing")
    step = args.micro_batch_size * layout.dp
    args.global_batch_size = args.global_batch_size or step
    require(
        args.global_batch_size % step == 0,
        f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size "
        f"{args.micro_batch_size} x DP {layout.dp} = {step}",
    )
    args.num_microbatches = args.global_batch_size // step
    require(
        layout.vpp is None or args.num_microbatches % layout.pp == 0,
        f"interleaved pipeline: {args.num_microbatches} micro-batches are not a multiple of PP={layout.pp}; "
        f"change --global-batch-size",
    )


def _fill_schedule(args: argparse.Namespace) -> None:
    require(
        not (args.train_iters and args.train_samples), "--train-iters and --train-samples say the same thing: give one"
    )
    if args.train_samples:
        args.train_iters = args.train_samples // args.global_batch_size
    require(bool(args.train_iters), "--train-iters is missing (or --train-samples)")
    require(args.lr is not None, "--lr is missing")
    require(args.min_lr <= args.lr, f"--min-lr {args.min_lr} is above --lr {args.lr}")
    args.lr_decay_iters = args.lr_decay_iters or args.train_iters
    if args.lr_warmup_fraction is not None:
        require(args.lr_warmup_iters == 0, "--lr-warmup-fraction and --lr-warmup-iters: give one")
        args.lr_warmup_iters = int(args.lr_warmup_fraction * args.lr_decay_iters)
    require(
        args.lr_warmup_iters < args.lr_decay_iters,
        f"--lr-warmup-iters {args.lr_warmup_iters} leaves nothing of the {args.lr_decay_iters} iterations",
    )
    require(not args.save_interval or bool(args.save), "--save-interval needs --save, the directory of checkpoints")
    require(
        args.lr_decay_style != "WSD" or bool(args.lr_wsd_decay_iters),
        "--lr-decay-style WSD needs --lr-wsd-decay-iters, the length of its last phase",
    )
    require(
        not (args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler),
        "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler contradict each other: give one",
    )
    _fill_weight_decay(args)


def _fill_weight_decay(args: argparse.Namespace) -> None:
    start, end = args.start_weight_decay, args.end_weight_decay
    require((start is None) == (end is None), "--start-weight-decay and --end-weight-decay: give both, or neither")
    if args.weight_decay_incr_style == "constant":
        require(start == end, "--start-weight-decay differs from --end-weight-decay: give --weight-decay-incr-style")
        args.start_weight_decay = args.end_weight_decay = args.weight_decay if start is None else start
    else:
        require(
            start is not None, f"--weight-decay-incr-style {args.weight_decay_incr_style} needs --start-weight-decay"
        )


def _fill_precision(args: argparse.Namespace) -> None:
    require(not (args.bf16 and args.fp16), "--bf16 and --fp16: give one")
    args.params_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    # As in Megatron, gradients of bf16 weights are summed in fp32.
    args.accumulate_allreduce_grads_in_fp32 = args.accumulate_allreduce_grads_in_fp32 or args.bf16
    if args.overlap_param_gather:
        require(args.use_distributed_optimizer, "--overlap-param-gather needs --use-distributed-optimizer")
        require(args.overlap_grad_reduce, "--overlap-param-gather needs --overlap-grad-reduce")


def _fill_recompute(args: argparse.Namespace) -> None:
    if args.recompute_activations:
        args.recompute_granularity = "selective"
    if args.recompute_granularity == "full":
        require(bool(args.recompute_method), "--recompute-granularity full needs --recompute-method uniform or block")
        args.recompute_num_layers = args.recompute_num_layers or 1

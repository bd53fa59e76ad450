"""Megatron's flags are the interface.

The parser knows every flag of MindSpeed-LLM's programs (`inputs/flags.py`). What the native engine does with a flag is
one of three things: it implements the flag (perhaps for some values only), it ignores the flag without effect (a kernel
of another device, say; these are named once in the log), or it refuses the flag because ignoring it would change what
is trained.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from minimind_mcore.checkpoint import unpickling
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import Parser, build_parser, flag_table, unused
from minimind_mcore.inputs.ranges import flag_type
from minimind_mcore.inputs.splits import parse_split
from minimind_mcore.models.config import (
    LAYER_SPEC,
    NO_EXPERTS,
    ROUTER_WEIGHTS,
    STRAIGHT_THROUGH_SPEC,
    named_router_weight,
    set_router_weight,
)

# dest names, grouped as Megatron groups its arguments
IMPLEMENTED = frozenset(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention num_query_groups
    max_position_embeddings position_embedding_type use_rotary_position_embeddings rotary_base
    make_vocab_size_divisible_by padded_vocab_size vocab_size normalization norm_epsilon swiglu add_bias_linear
    untie_embeddings_and_output_weights qk_layernorm attention_dropout hidden_dropout init_method_std spec
    transformer_impl

    num_experts moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size
    n_shared_experts first_k_dense_replace moe_router_load_balancing_type moe_router_topk
    moe_router_pre_softmax moe_router_score_function moe_aux_loss_coeff moe_z_loss_coeff norm_topk_prob

    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
    num_layers_per_virtual_pipeline_stage sequence_parallel use_distributed_optimizer overlap_grad_reduce
    overlap_param_gather ddp_bucket_size distributed_timeout_minutes overlap_p2p_comm distributed_backend

    deterministic_mode micro_batch_size global_batch_size seq_length train_iters train_samples eval_iters eval_interval
    seed bf16 fp16 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis
    accumulate_allreduce_grads_in_fp32 calculate_per_token_loss
    recompute_activations recompute_granularity recompute_method recompute_num_layers

    optimizer lr min_lr lr_decay_style lr_decay_iters lr_warmup_fraction lr_warmup_iters lr_warmup_init
    lr_wsd_decay_style lr_wsd_decay_iters weight_decay start_weight_decay end_weight_decay weight_decay_incr_style
    clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum override_opt_param_scheduler
    use_checkpoint_opt_param_scheduler

    data_path train_data_path valid_data_path test_data_path split data_cache_path num_workers mmap_bin_files
    reset_position_ids reset_attention_mask eod_mask_loss dataloader_type num_dataset_builder_threads
    tokenizer_type tokenizer_name_or_path tokenizer_model

    save save_interval no_save_optim no_save_rng load no_load_optim no_load_rng finetune ckpt_step ckpt_format
    exit_on_missing_checkpoint exit_interval exit_duration_in_mins

    log_interval log_num_zeros_in_grad tensorboard_dir wandb_project wandb_exp_name wandb_save_dir use_wandb

    pre_tockens next_tockens sparse_mode attention_mask_type optimizer_selection

    pretrained_checkpoint
    """.split()
)

# Of these posttrain_gpt.py knows the meaning, and pretrain_gpt.py has no use.
POSTTRAIN = frozenset(
    """
    stage is_instruction_dataset is_pairwise_dataset no_shuffle no_pad_to_seq_lengths variable_seq_lengths
    pad_to_multiple_of neat_pack

    lora_target_modules lora_r lora_alpha lora_load

    dpo_beta dpo_loss_type dpo_label_smoothing pref_ftx ref_model
    """.split()
)

# Accepted because leaving them out changes nothing that is trained here: kernels and memory tricks of an
# NPU, fusions of a CUDA build, and switches for what the native engine does anyway.
NO_EFFECT = frozenset(
    """
    use_fused_rmsnorm use_fused_swiglu use_fused_rotary_pos_emb use_flash_attn use_fusion_attn_v2 shape_order
    use_fused_ring_attention_update use_fused_moe_token_permute_and_unpermute moe_token_dispatcher_type
    moe_permutation_async_comm moe_alltoall_overlap_comm moe_allgather_overlap_comm moe_permute_fusion
    moe_zero_memory swap_attention smart_swap swap_optimizer reuse_fp32_param optimization_level
    use_ascend_coc use_ascend_mc2 gemm_gradient_accumulation_fusion npu_deterministic
    jit_compile hccl_group_buffer hccl_group_buffer_adaptive hccl_op_mode disable_gloo_group
    recompute_activation_function recompute_norm optimize_send_recv_comm ai_framework
    context_parallel_algo

    attention_backend attention_softmax_in_fp32 masked_softmax_fusion bias_gelu_fusion
    bias_swiglu_fusion bias_dropout_fusion apply_rope_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl
    gradient_accumulation_fusion async_tensor_model_parallel_allreduce no_persist_layer_norm
    align_grad_reduce align_param_gather scatter_gather_tensors_in_pipeline create_attention_mask_in_dataloader
    local_rank lazy_mpu_init check_for_nan_in_loss_and_grad use_cpu_initialization
    perform_initialization manual_gc manual_gc_interval manual_gc_eval enable_gloo_process_groups
    log_timers_to_tensorboard log_memory_to_tensorboard log_validation_ppl_to_tensorboard log_world_size_to_tensorboard
    log_loss_scale_to_tensorboard timing_log_level timing_log_option tensorboard_queue_size log_progress
    logging_level enable_one_logger ckpt_fully_parallel_save ckpt_fully_parallel_load
    empty_unused_memory_level tokenizer_not_use_fast exit_signal_handler log_throughput log_params_norm
    tensorboard_log_interval
    """.split()
)

# Of post-training: how raw data is converted, which is done before; how LoRA is computed and saved.
POSTTRAIN_NO_EFFECT = frozenset(
    """
    handler_name prompt_type prompt_type_path enable_thinking cut_max_seqlen
    lora_fusion lora_ckpt_filter lora_register_forward_hook
    """.split()
)

# Of these flags the native engine has some values only; the others would train something else.
VALUES: dict[str, tuple[Any, ...]] = {
    "spec": (None, LAYER_SPEC, STRAIGHT_THROUGH_SPEC),
    "dataloader_type": (None, "single"),
    "tokenizer_type": (None, "PretrainedFromHF", "HuggingFaceTokenizer"),
    "moe_router_score_function": ("softmax",),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "none"),
    "moe_layer_freq": (1, -1),  # MindSpeed-LLM's -1, like its two below, means experts in every layer
    "first_k_dense_replace": (None, 0, -1),
    "sparse_mode": (0, 1, 2, 3),  # 4 and more are bands, and not causal attention
    "pre_tockens": (1048576, 65536, 2147483647),
    "next_tockens": (0,),
    "attention_mask_type": ("causal", "general"),
    "optimizer_selection": ("fused_adamw", "fused_torch_adamw"),
    "ckpt_format": ("torch", "torch_dist"),
}


STAGES = ("sft", "dpo", "reason", "distill")
DPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo")


def _add_native_flags(parser: argparse.ArgumentParser) -> None:
    """The few flags that neither Megatron nor MindSpeed-LLM has."""
    group = parser.add_argument_group("minimind", "flags of this kit; MindSpeed-LLM does not know them")
    group.add_argument("--output-dir", help="metrics.jsonl, loss.png, report.html (default: beside --save)")
    group.add_argument(
        "--keep-last", type=flag_type("keep_last"), metavar="N", help="keep only the N newest checkpoints"
    )
    group.add_argument(
        "--minimind-init",
        choices=("normal", "torch"),
        help="MiniMind's initialisation instead of Megatron's: normal is minimind-3's, torch MiniMind2's",
    )
    group.add_argument(
        "--reshard",
        action="store_true",
        help="load a torch checkpoint of another layout: its weights and place in the schedule, not its optimizer",
    )
    unpickling.add_trust_flag(group)
    group.add_argument("--decay-all", action="store_true", help="weight decay on norms too, as MiniMind does")
    group.add_argument(
        "--lr-at-iteration-end",
        action="store_true",
        help="use the schedule's value at the end of an iteration, as MiniMind does, not at its beginning",
    )
    add_router_weight(group)
    group.add_argument("--swanlab-project", default="", help="log to this SwanLab project")
    group.add_argument("--log-file", help="also write what is printed to this file")
    group.add_argument(
        "--verify-data",
        action="store_true",
        help="compare all tokens with the checksums of their conversion; by default 64 MiB of each .bin file",
    )
    group.add_argument("--dry-run", action="store_true", help="validate everything, print the plan, train nothing")
    group.add_argument("--data-pending", action="store_true", help="with --dry-run: the data is yet to be converted")


def add_router_weight(group: argparse._ActionsContainer) -> None:
    """Add the model flag that neither Megatron nor MindSpeed-LLM has."""
    group.add_argument(
        "--router-weight",
        choices=ROUTER_WEIGHTS,
        help="how the experts' scores become weights (default: the rule of the loaded weights; for new training "
        "straight_through with one expert per token, else as --norm-topk-prob and --moe-router-pre-softmax say)",
    )


def _add_posttrain_flags(parser: Parser) -> None:
    """What posttrain_gpt.py has beyond MindSpeed-LLM's: stages and losses of MiniMind, and their settings."""
    parser.set_choices("stage", STAGES)
    parser.set_choices("dpo_loss_type", DPO_LOSSES)
    group = parser.add_argument_group("post-training", "flags of this kit; MindSpeed-LLM does not know them")
    group.add_argument("--reference-live", action="store_true", help="run --ref-model in every step, cache nothing")
    group.add_argument(
        "--gamma-beta-ratio",
        type=flag_type("gamma_beta_ratio"),
        default=1.4,
        help="SimPO's target margin, as a multiple of 1 / beta",
    )
    group.add_argument("--teacher-model", help="to distil: an HF directory or a directory of checkpoints")
    for name, default, what in (
        ("alpha", 0.5, "weight of the labels' loss; the rest is KL"),
        ("temperature", 1.5, "of both distributions in the KL"),
    ):
        group.add_argument(f"--distill-{name}", type=flag_type(f"distill_{name}"), default=default, help=what)


@functools.cache
def kit_flags() -> tuple[str, ...]:
    """The flags that this kit's training programs have and MindSpeed-LLM's do not."""
    parser = build_parser()
    _add_native_flags(parser)
    _add_posttrain_flags(parser)
    return tuple(f for action in parser._actions for f in action.option_strings if f not in flag_table())


def parse(argv: Sequence[str], posttrain: bool = False) -> argparse.Namespace:
    """Parse a command line of pretrain_gpt.py, or of posttrain_gpt.py.

    Returns:
        A namespace with every flag of Megatron and MindSpeed-LLM (checkpoints carry it, as theirs do)
        and ours; `no_effect` lists the given flags that do nothing here.

    Raises:
        UserError: an unknown flag, a value of the wrong type, or a flag that is not implemented here.
    """
    parser = build_parser(prog="posttrain_gpt.py" if posttrain else "pretrain_gpt.py")
    _add_native_flags(parser)
    if posttrain:
        _add_posttrain_flags(parser)
    args, given = parser.parse(argv)
    table = flag_table()
    implemented = IMPLEMENTED | POSTTRAIN if posttrain else IMPLEMENTED
    no_effect = NO_EFFECT | POSTTRAIN_NO_EFFECT if posttrain else NO_EFFECT
    refused = unused(given, implemented | no_effect)
    if refused and all(table[f]["dest"] in POSTTRAIN | POSTTRAIN_NO_EFFECT for f in refused):
        raise UserError(f"{', '.join(refused)}: for posttrain_gpt.py, not for pretraining")
    if refused:
        raise UserError(
            f"{', '.join(refused)}: known to {table[refused[0]]['source']}, not implemented by the native engine; "
            "leave it out, or run it on an NPU with BACKEND=mindspeed-llm"
        )
    args.no_effect = unused(given, implemented)
    _refuse_values(args)
    if args.split is not None:
        parse_split(args.split)
    fill_model(args)
    if args.router_weight and not args.num_experts:
        raise UserError(NO_EXPERTS)
    if args.num_experts and (rule := named_router_weight(args)):
        set_router_weight(args, rule)
    if "--transformer-impl" not in given:  # Megatron's default needs Transformer Engine
        args.transformer_impl = "local"
    return args


def _refuse_values(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a value that `VALUES` does not have."""
    flags = {record["dest"]: flag for flag, record in flag_table().items()}
    for dest, supported in VALUES.items():
        found = getattr(args, dest)
        if found not in supported:
            choices = ", ".join(" ".join(v) if isinstance(v, list) else str(v) for v in supported if v is not None)
            raise UserError(f"{flags[dest]}: found {found}, the native engine has {choices}")


def fill_model(args: argparse.Namespace) -> None:
    """What some flags of the model say through others, as Megatron and MindSpeed-LLM read them."""
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    if args.vocab_size is not None and args.padded_vocab_size is None:
        unit = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        args.padded_vocab_size = -(-args.vocab_size // unit) * unit
    if args.n_shared_experts is not None and args.moe_shared_expert_intermediate_size is None:
        width = args.moe_ffn_hidden_size or args.ffn_hidden_size
        args.moe_shared_expert_intermediate_size = args.n_shared_experts * width

"""Translate a command line for MindSpeed-LLM's training programs, and find flags that would give a wrong result there.

Each message says what is wrong and why. The defects D1 to D9 are those of docs/ascend.md, all in 26.1.0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from minimind_mcore.arguments import DPO_LOSSES, STAGES, fill_model
from minimind_mcore.checkpoint import unpickling
from minimind_mcore.checkpoint.files import is_converted
from minimind_mcore.errors import UserError, problems_of
from minimind_mcore.inputs.flags import (
    TRUST_FLAG,
    build_parser,
    given_flags,
    kit_flags,
    refuse_unknown_training_flags,
)
from minimind_mcore.inputs.splits import parse_split
from minimind_mcore.mindspeed import checkpoints
from minimind_mcore.models.config import (
    LAYER_SPEC,
    NO_EXPERTS,
    ROUTER_WEIGHTS,
    STRAIGHT_THROUGH_SPEC,
    RouterWeight,
    default_router_weight,
    named_router_weight,
    router_weight_flags,
    straight_through_needs_one,
)
from minimind_mcore.preprocess.blends import parse_blend
from minimind_mcore.preprocess.check import quick_check
from minimind_mcore.preprocess.indexed import datasets_at
from minimind_mcore.preprocess.tokenizer_files import tokenizer_json
from minimind_mcore.storage import require_writable
from minimind_mcore.validation import validate

# What MindSpeed-LLM does instead of this kit's flags.
INSTEAD = {
    "--minimind-init": "it starts with Megatron's initial weights, whose standard deviation falls with the depth",
    "--lr-at-iteration-end": "its schedule lags MiniMind's by one iteration",
    "--decay-all": "its norms have no weight decay",
    "--keep-last": "it keeps every checkpoint",
    "--log-file": "it only prints its log",
    "--output-dir": "it draws no curves",
}
# Flags with another name, or with an additional flag, in releases before 26.1.0.
OLDER_NAMES = {
    "--no-pad-to-seq-lengths": ["--variable-seq-lengths"],
    "--neat-pack": ["--neat-pack", "--reset-position-ids"],
}
# Load balancing types with which MindSpeed-LLM's router returns the softmax scores of the chosen experts.
STRAIGHT_THROUGH_BALANCING = ("aux_loss", "seq_aux_loss", "softmax_topk", "none")
# Layouts that only MindSpeed-LLM has. Their arithmetic is not checked.
ITS_LAYOUTS = (
    "num_layer_list", "expert_tensor_parallel_size", "moe_tp_extend_ep", "tp_2d", "schedules_method", "use_torch_fsdp2",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
    "num_virtual_stages_per_pipeline_rank", "rampup_batch_size",
)  # fmt: skip


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into MindSpeed-LLM's flags and the names of this kit's own flags.

    Raises:
        UserError: a flag is unknown to both.
    """
    refuse_unknown_training_flags(argv)
    ours = kit_flags()
    foreign = [flag for flag in given_flags(argv) if flag in ours]
    return without_flags(argv, *foreign), foreign


def without_flags(argv: Sequence[str], *names: str) -> list[str]:
    """Return a command line without these flags and their values."""
    kept: list[str] = []
    keep = True
    for word in argv:
        if word.startswith("--"):
            keep = word.split("=", 1)[0] not in names
        if keep:
            kept.append(word)
    return kept


def given_router_weight(argv: Sequence[str]) -> RouterWeight | None:
    """Return the value of the last `--router-weight` of a command line.

    Raises:
        UserError: the rule is unknown.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--router-weight")
    given = parser.parse_known_args(list(argv))[0].router_weight
    if given not in (None, *ROUTER_WEIGHTS):
        raise UserError(f"--router-weight: found {given!r}, expected one of {', '.join(ROUTER_WEIGHTS)}")
    return given  # type: ignore[no-any-return]


def complete(program: str, argv: Sequence[str], processes: int = 1, hosts: int = 1) -> tuple[list[str], list[str]]:
    """Return the flags that make `program` do what this kit's command line `argv` asks for, and remarks for the user.

    Args:
        program: pretrain_gpt.py or posttrain_gpt.py.
        argv: flags of Megatron, MindSpeed-LLM and this kit.
        processes: number of processes of the job, on all hosts.
        hosts: number of hosts of the job.

    Raises:
        UserError: a flag or value is unknown, would silently give a wrong result, or would fail after a
            minute (a layout that does not divide, a checkpoint that is missing or belongs to another model).
    """
    flags, ours = split_flags(argv)
    if TRUST_FLAG in ours:
        unpickling.trust()
    # flags that only the kit's launcher uses, and flags that `_router_flags` translates
    done_here = "--dry-run --data-pending --weights-pending --verify-data --router-weight".split()
    ours = [flag for flag in ours if flag not in (*done_here, TRUST_FLAG)]
    remarks = [f"MindSpeed-LLM has no {flag}: {INSTEAD.get(flag, 'left out')}" for flag in ours]
    try:
        args = build_parser(prog=program).parse_args(flags)
    except UserError as error:
        if native := [value for value in (*STAGES, *DPO_LOSSES) if f"invalid choice: '{value}'" in str(error)]:
            raise UserError(f"MindSpeed-LLM has no {native[0]}; BACKEND=native has it ({error})") from error
        raise
    rule = given_router_weight(argv)
    if rule:  # replaces the other router flags, which may then contradict each other
        flags = _router_flags(args, flags, rule)
    problems = [*_model_problems(args, flags), *_data_problems(args), *checkpoints.form_problems(args)]
    problems += _damaged_data(args, "--verify-data" in argv)
    problems = problems or [*_layout_problems(args, processes, argv), *checkpoints.fit_problems(args, hosts)]
    problems = problems or checkpoints.schedule_problems(args)
    if problems:
        raise UserError("\n  ".join(problems))
    if args.num_experts and not rule:
        flags = _router_flags(args, flags, _router_weight(args))
    if args.gradient_accumulation_fusion:
        flags.append("--no-gradient-accumulation-fusion")  # the fusion needs the nnal package and brings no gain here
    if args.use_distributed_optimizer and not (args.bf16 or args.fp16):
        flags = [flag for flag in flags if flag != "--use-distributed-optimizer"]
        remarks.append("left out --use-distributed-optimizer: in fp32 it could not be resumed (Megatron-LM 0.12.1)")
    if args.num_experts and "--moe-token-dispatcher-type" not in given_flags(flags):
        # LoRA supports only this dispatcher, and the default one refuses a sequence-parallel shared expert
        flags += ["--moe-token-dispatcher-type", "alltoall_seq", "--moe-permutation-async-comm"]
    resumed = checkpoints.resumed(args)
    if resumed and is_converted(resumed):
        flags.append("--finetune")
        remarks.append(f"{resumed} has weights and no optimizer: training starts at iteration 0 (--finetune)")
    elif resumed:
        remarks += checkpoints.resume_remarks(args, resumed)
    return flags, remarks


def require_files(flags: Sequence[str]) -> None:
    """Check the files that a job reads and writes, except checkpoints, which `complete` checks.

    Raises:
        UserError: a dataset, tokenizer or template file is missing, or --save is not writable.
    """
    args = build_parser().parse_args(list(flags))
    for prefix in parse_blend(args.data_path or []).prefixes:
        if not datasets_at(prefix):
            raise UserError(
                f"--data-path {prefix}: no {prefix}.idx, and no dataset of instructions or pairs. Convert the data:\n"
                "  bash examples/mcore/minimind/data_convert_minimind_pretrain.sh  # or _instruction, _pairwise"
            )
    if args.tokenizer_name_or_path:
        tokenizer_json(args.tokenizer_name_or_path)
    if args.prompt_type_path and not Path(args.prompt_type_path).is_file():
        raise UserError(f"--prompt-type-path {args.prompt_type_path}: no such file; give configs/templates.json")
    if args.save:
        require_writable(Path(args.save), "give another directory with --save (CKPT_SAVE_DIR)")


def router_weight_of(flags: Sequence[str]) -> RouterWeight:
    """Return the router weight that MindSpeed-LLM computes with these flags."""
    return named_router_weight(vars(build_parser().parse_args(list(flags)))) or "normalized"


def _router_weight(args: argparse.Namespace) -> RouterWeight:
    """Return the router weight of a run whose command line has no `--router-weight`."""
    named = named_router_weight(vars(args)) or checkpoints.loaded_router_weight(args)
    return named or default_router_weight(args.moe_router_topk)


def _router_flags(args: argparse.Namespace, flags: Sequence[str], rule: RouterWeight) -> list[str]:
    """Return the flags that make MindSpeed-LLM compute a router weight, and update `args` accordingly.

    MindSpeed-LLM has flags for `normalized` and `softmax`. For `straight_through` its router returns the
    scores, as for `softmax`, and the layer spec replaces their values (`StraightThroughRouter`).

    Raises:
        UserError: `straight_through` with several experts per token.
    """
    if not args.num_experts:
        raise UserError(NO_EXPERTS)
    if rule == "straight_through" and args.moe_router_topk > 1:
        raise UserError(straight_through_needs_one(args.moe_router_topk))
    named = named_router_weight(vars(args)) or "normalized"
    vars(args).update(router_weight_flags(rule, args.moe_router_topk))
    args.norm_topk_prob = rule == "normalized"
    if named == rule:  # the given flags already compute it
        return list(flags)
    flags = without_flags(flags, "--moe-router-pre-softmax", "--norm-topk-prob", "--spec")
    flags += ["--moe-router-pre-softmax"] * args.moe_router_pre_softmax + ["--norm-topk-prob"] * args.norm_topk_prob
    args.spec = STRAIGHT_THROUGH_SPEC if rule == "straight_through" else LAYER_SPEC
    return [*flags, "--spec", *args.spec]


def spelled(flags: Sequence[str], home: Path) -> list[str]:
    """Return the flags with the names of the MindSpeed-LLM release in `home`."""
    definitions = home / "mindspeed_llm/features_manager/finetune/finetune.py"
    older = definitions.is_file() and "--no-pad-to-seq-lengths" not in definitions.read_text("utf-8")
    return [name for flag in flags for name in (OLDER_NAMES.get(flag, [flag]) if older else [flag])]


def _model_problems(args: argparse.Namespace, flags: Sequence[str]) -> Iterator[str]:
    """Yield problems of flags that would give another model."""
    given = given_flags(flags)
    for flag in ("--attention-dropout", "--hidden-dropout"):
        if flag not in given:
            yield f"{flag} is missing: Megatron's default is 0.1, MiniMind has no dropout; add {flag} 0.0"
    if args.padded_vocab_size is None:
        yield (
            "--padded-vocab-size is missing: the vocabulary would be padded to a multiple of 128 times TP, and no "
            "longer fit the weights; add --padded-vocab-size 6400 --make-vocab-size-divisible-by 1"
        )
    if args.transformer_impl != "local":
        yield (
            f"--transformer-impl {args.transformer_impl}: its layers name their norms differently, so the weights "
            "would not load (D6); add --transformer-impl local"
        )
    if args.num_experts:
        yield from _moe_problems(args, given)


def _moe_problems(args: argparse.Namespace, given: Sequence[str]) -> Iterator[str]:
    """Yield problems of flags of a mixture of experts."""
    balancing, dispatcher = args.moe_router_load_balancing_type, args.moe_token_dispatcher_type
    if args.moe_router_topk == 1 and not args.moe_router_pre_softmax:
        yield "--moe-router-topk 1 needs --moe-router-pre-softmax: a softmax over one expert is always 1"
    if args.norm_topk_prob and args.moe_router_pre_softmax and balancing not in ("aux_loss", "softmax_topk"):
        yield (
            f"--norm-topk-prob is ignored with --moe-router-load-balancing-type {balancing}; "
            "use aux_loss, or leave out --moe-router-pre-softmax, which normalises too"
        )
    if named_router_weight(vars(args)) == "straight_through" and balancing not in STRAIGHT_THROUGH_BALANCING:
        yield (
            f"--router-weight straight_through with --moe-router-load-balancing-type {balancing}: its router computes "
            f"other weights than a softmax; use {', '.join(STRAIGHT_THROUGH_BALANCING)}"
        )
    if args.lora_target_modules and "--moe-token-dispatcher-type" in given and dispatcher != "alltoall_seq":
        yield "LoRA on a mixture of experts needs --moe-token-dispatcher-type alltoall_seq"


def _data_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield problems of flags that would train on other tokens, or let tokens of different samples see each other."""
    if args.split is None and args.data_path:
        yield "--split is missing: Megatron would train on 96.9% of the data; add --split 100,0,0"
    if args.split is not None:
        yield from problems_of(lambda: parse_split(args.split))
    if args.stage is None:
        yield from _blend_problems(args)
    if args.stage == "sft" and args.reset_attention_mask and not args.neat_pack:
        yield (
            "--reset-attention-mask without --neat-pack cuts attention after every <|im_end|>, so that an answer does "
            "not see its question (D8); convert the data with --pack --neat-pack and add --neat-pack"
        )
    if args.neat_pack and not args.reset_attention_mask:
        yield "--neat-pack needs --reset-attention-mask: packed samples would see each other"
    if args.neat_pack and args.micro_batch_size and args.micro_batch_size > 1:
        yield (
            f"--neat-pack with --micro-batch-size {args.micro_batch_size}: in MindSpeed-LLM 26.1.0 the padding of the "
            "first sequence hides where the samples of the next ones end, so that they see each other (D9); use MBS=1 "
            "(--micro-batch-size 1)"
        )
    if args.stage == "dpo" and args.tensor_model_parallel_size > 1:
        yield (
            "DPO at TP > 1: MindSpeed-LLM 26.1.0 leaves the first token of each rank's part of the vocabulary out of "
            "the log-probabilities; use TP=1 (a MiniMind fits on one device), or BACKEND=native"
        )


def _blend_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield problems of blends that Megatron reads differently than the native engine."""
    for flag in ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path"):
        words = getattr(args, flag[2:].replace("-", "_")) or []
        try:
            blend = parse_blend(words, flag)
        except UserError as error:
            yield str(error)
            continue
        if blend.weights is None and len(blend.prefixes) > 1:
            yield (
                f"{flag} has {len(blend.prefixes)} sets and no weights: Megatron would end the run after one pass over "
                "each. Give a weight before each set, such as its number of tokens (the scripts and preprocess_data.py "
                "write them)"
            )


def _damaged_data(args: argparse.Namespace, everything: bool) -> Iterator[str]:
    """Yield problems of the datasets on this host, because MindSpeed-LLM trains on any content of the files."""
    for word in args.data_path or []:
        for prefix in datasets_at(word):
            yield from problems_of(partial(quick_check, prefix, everything=everything))


def _layout_problems(args: argparse.Namespace, processes: int, argv: Sequence[str]) -> Iterator[str]:
    """Yield problems that Megatron reports only after every rank has started: sizes, batches, schedules."""
    if args.context_parallel_size > 1 or any(getattr(args, name) for name in ITS_LAYOUTS):
        return
    checked = argparse.Namespace(**vars(args))
    fill_model(checked)
    if "--data-pending" in argv and not args.train_samples:
        checked.train_iters = args.train_iters or 1
    yield from problems_of(lambda: validate(checked, processes))

"""The command line of training: Megatron's flags.

The parser accepts every flag of MindSpeed-LLM's programs (`inputs/flags.py`). The native engine treats a flag in one of
three ways. It implements the flag, possibly only for some values. Or it ignores the flag because it has no effect, such
as a kernel of another device; ignored flags are logged once. Or it refuses the flag, because ignoring it would change
the training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from minimind_mcore.checkpoint import unpickling
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import (
    Parser,
    add_kit_flags,
    build_parser,
    flag_table,
    support,
    supported_values,
    unused,
)
from minimind_mcore.inputs.splits import parse_split
from minimind_mcore.models.config import NO_EXPERTS, named_router_weight, router_weight_flags

# Dests of flags, from the table in inputs/support.json.
IMPLEMENTED, NO_EFFECT = support("pretrain_gpt.py", "implemented"), support("pretrain_gpt.py", "no effect")
POSTTRAIN, POSTTRAIN_NO_EFFECT = support("posttrain_gpt.py", "implemented"), support("posttrain_gpt.py", "no effect")
STAGES = ("sft", "dpo", "reason", "distill")
DPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo")


def _add_flags(parser: Parser, posttrain: bool) -> None:
    """Add the flags that only this kit has, and the stages and losses of MiniMind."""
    unpickling.add_trust_flag(add_kit_flags(parser, "pretrain_gpt.py"))
    if posttrain:
        parser.set_choices("stage", STAGES)
        parser.set_choices("dpo_loss_type", DPO_LOSSES)
        add_kit_flags(parser, "posttrain_gpt.py")


def training_parser(posttrain: bool) -> Parser:
    """Return the parser of pretrain_gpt.py, or of posttrain_gpt.py."""
    parser = build_parser(prog="posttrain_gpt.py" if posttrain else "pretrain_gpt.py")
    _add_flags(parser, posttrain)
    return parser


def parse(argv: Sequence[str], posttrain: bool = False) -> argparse.Namespace:
    """Parse a command line of pretrain_gpt.py, or of posttrain_gpt.py.

    Returns:
        A namespace with every flag of Megatron and MindSpeed-LLM (stored in checkpoints, as in MindSpeed-LLM) and of
        this kit. `no_effect` lists the given flags that are ignored.

    Raises:
        UserError: a flag is unknown or not implemented, or has a value of the wrong type.
    """
    args, given = training_parser(posttrain).parse(argv)
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
    if args.num_experts and (rule := named_router_weight(vars(args))):
        vars(args).update(router_weight_flags(rule, args.moe_router_topk))
    if "--transformer-impl" not in given:  # Megatron's default needs Transformer Engine
        args.transformer_impl = "local"
    return args


def _refuse_values(args: argparse.Namespace) -> None:
    """Raise a `UserError` for values that the native engine does not support."""
    flags = {record["dest"]: flag for flag, record in flag_table().items()}
    for dest, supported in supported_values().items():
        found = getattr(args, dest)
        if found not in supported:
            choices = ", ".join(" ".join(v) if isinstance(v, list) else str(v) for v in supported if v is not None)
            raise UserError(f"{flags[dest]}: found {found}, the native engine has {choices}")


def fill_model(args: argparse.Namespace) -> None:
    """Set model flags that follow from other flags, as Megatron and MindSpeed-LLM do."""
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    if args.vocab_size is not None and args.padded_vocab_size is None:
        unit = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        args.padded_vocab_size = -(-args.vocab_size // unit) * unit
    if args.n_shared_experts is not None and args.moe_shared_expert_intermediate_size is None:
        width = args.moe_ffn_hidden_size or args.ffn_hidden_size
        args.moe_shared_expert_intermediate_size = args.n_shared_experts * width

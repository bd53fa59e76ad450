"""Whether a checkpoint is one that a run can take: of its model, its layout and its tokenizer.

It is told by the arguments that the checkpoint carries, before anything is built. Training, its dry run, what starts
MindSpeed-LLM and the generator of FusionOne's tasks ask here.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import RouterWeight, named_router_weight
from minimind_mcore.training.sample_order import values_differ

# What must be equal in a checkpoint and on the command line, whatever the layout.
MODEL_ARGS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "num_experts",
    "padded_vocab_size",
    "untie_embeddings_and_output_weights",
    "qk_layernorm",
)


def check_model(args: argparse.Namespace, saved: argparse.Namespace, directory: Path) -> None:
    """Refuse a checkpoint whose model, or tokenizer, is another."""
    absent = object()
    for name in MODEL_ARGS:
        found, expected = getattr(saved, name, absent), getattr(args, name)
        if found is not absent and found is not None and found != expected:
            raise UserError(
                f"{directory}: {name} is {found} there and {expected} on the command line; give the same model flags"
            )
    if args.num_experts:
        topk = getattr(saved, "moe_router_topk", None) or args.moe_router_topk
        check_router(args, topk, named_router_weight(saved), str(directory))
    check_tokenizer(args, getattr(saved, "tokenizer_fingerprint", None), directory)


def other_constants(
    args: argparse.Namespace, saved: argparse.Namespace, directory: Path, overridable: bool = True
) -> str:
    """The warning that Adam's constants differ from the checkpoint's, with both values; empty where they do not.

    They are part of the optimizer's state: a run that resumes takes them from the checkpoint, as Megatron-LM does,
    unless `--override-opt_param-scheduler` says that the command line counts.

    Args:
        args: of the run.
        saved: the checkpoint's.
        directory: of the checkpoint, for the message.
        overridable: False for MindSpeed-LLM, whose flag leaves these values alone.
    """
    names = {"adam_beta1": "--adam-beta1", "adam_beta2": "--adam-beta2", "adam_eps": "--adam-eps"}
    there, here = ({flag: getattr(one, name, None) for name, flag in names.items()} for one in (saved, args))
    differing = list(values_differ({flag: value for flag, value in there.items() if value is not None}, here))
    if args.optimizer != "adam" or args.no_load_optim or not differing:
        return ""
    if overridable and args.override_opt_param_scheduler:
        used = "The run follows the command line"
    else:
        advice = "; --override-opt_param-scheduler follows the command line" if overridable else ""
        used = f"The run follows the checkpoint{advice}"
    return f"warning: {directory}: {'; '.join(differing)}. {used}"


def check_optimizer(args: argparse.Namespace, saved: argparse.Namespace, directory: Path) -> None:
    """Refuse another optimizer, or one whose state is kept in another form."""
    instead = "do the same, or give --no-load-optim to take the weights alone"
    kind = getattr(saved, "optimizer", "adam")
    if kind != args.optimizer:
        raise UserError(f"{directory}: saved with --optimizer {kind}, and the run has {args.optimizer}; {instead}")
    found = bool(getattr(saved, "use_distributed_optimizer", False))
    if found != bool(args.use_distributed_optimizer):
        raise UserError(
            f"{directory}: saved {'with' if found else 'without'} --use-distributed-optimizer, which keeps its state "
            f"in another form; {instead}"
        )


def check_router(args: argparse.Namespace, topk: int, rule: RouterWeight | None, source: str) -> None:
    """Refuse weights whose router computes another function than the command line asks for.

    `normalized` and `straight_through` compute the same function; only their gradients differ.

    Args:
        args: with the flags of the model.
        topk: experts per token of the weights.
        rule: router weight that comes with the weights; None if they name none.
        source: where the weights are, for the message.
    """
    if topk != args.moe_router_topk:
        raise UserError(
            f"{source}: moe_router_topk is {topk} there and {args.moe_router_topk} on the command line; "
            "give the same model flags"
        )
    rule, expected = rule or "normalized", named_router_weight(args) or "normalized"
    if (rule == "softmax") != (expected == "softmax"):
        raise UserError(
            f"{source}: the router weight is {rule} there and {expected} on the command line, which computes another "
            f"function; give --router-weight {rule} (ROUTER_WEIGHT={rule}; in a YAML of reinforcement learning "
            f"norm_topk_prob: {str(rule != 'softmax').lower()})"
        )


def check_layout(args: argparse.Namespace, saved: argparse.Namespace, directory: Path, instead: str) -> None:
    """Refuse a `torch` checkpoint of another layout; `instead` is what to do."""
    found, expected = ParallelLayout.from_args(saved), ParallelLayout.from_args(args)
    if found != expected:
        raise UserError(f"{directory} has the layout {found}, and the run has {expected}; {instead}")


def check_tokenizer(args: argparse.Namespace, found: str | None, path: Path) -> None:
    """Refuse weights that were trained with another tokenizer, where that is known."""
    expected = getattr(args, "tokenizer_fingerprint", None)
    if found and expected and found != expected:
        raise UserError(
            f"{path}: trained with another tokenizer (fingerprint {found[:12]}, the given one's is {expected[:12]}). "
            "MiniMind's tokenizers share a vocabulary size and almost no ids: give the one it was trained with"
        )


def conversion(path: Path | str, kind: str, settings: str) -> str:
    """The command that converts weights, by the kind that names its script (`hf2mcore`, `mcore2mcore`)."""
    words = ["LOAD_DIR=" + shlex.quote(str(path)), *filter(None, [settings])]
    return f"{' '.join(words)} bash examples/mcore/minimind/ckpt_convert_minimind_{kind}.sh"


def layout_settings(args: argparse.Namespace) -> str:
    """TP, PP, VPP and EP of a command line, as that script takes them."""
    layout = ParallelLayout.from_args(args)
    sizes = {"TP": layout.tp, "PP": layout.pp, "EP": layout.ep}
    if layout.layers_per_virtual_stage:
        sizes["VPP"] = layout.layers_per_virtual_stage
    return " ".join(f"{name}={size}" for name, size in sizes.items())

"""Whether a checkpoint is one that a run can take: of its model, its layout and its tokenizer.

It is told by the arguments that the checkpoint carries, before anything is built. Training, its dry run, what starts
MindSpeed-LLM and the generator of FusionOne's tasks ask here.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
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


Flags = Mapping[str, object]  # of a command line, or of a checkpoint, by Megatron's names


def check_model(flags: Flags, saved: Flags, directory: Path, fingerprint: str | None = None) -> None:
    """Refuse a checkpoint whose model, or tokenizer, is another."""
    for name in MODEL_ARGS:
        found, expected = saved.get(name), flags[name]
        if found is not None and found != expected:
            raise UserError(
                f"{directory}: {name} is {found} there and {expected} on the command line; give the same model flags"
            )
    if flags["num_experts"]:
        topk = saved.get("moe_router_topk") or flags["moe_router_topk"]
        check_router(flags, topk, named_router_weight(saved), str(directory))
    check_tokenizer(fingerprint, saved.get("tokenizer_fingerprint"), directory)


def other_constants(flags: Flags, saved: Flags, directory: Path, overridable: bool = True) -> str:
    """The warning that Adam's constants differ from the checkpoint's, with both values; empty where they do not.

    They are part of the optimizer's state: a run that resumes takes them from the checkpoint, as Megatron-LM does,
    unless `--override-opt_param-scheduler` says that the command line counts.

    Args:
        flags: of the run.
        saved: the checkpoint's.
        directory: of the checkpoint, for the message.
        overridable: False for MindSpeed-LLM, whose flag leaves these values alone.
    """
    names = {"adam_beta1": "--adam-beta1", "adam_beta2": "--adam-beta2", "adam_eps": "--adam-eps"}
    there, here = ({flag: one.get(name) for name, flag in names.items()} for one in (saved, flags))
    differing = list(values_differ({flag: value for flag, value in there.items() if value is not None}, here))
    if flags["optimizer"] != "adam" or flags["no_load_optim"] or not differing:
        return ""
    if overridable and flags["override_opt_param_scheduler"]:
        used = "The run follows the command line"
    else:
        advice = "; --override-opt_param-scheduler follows the command line" if overridable else ""
        used = f"The run follows the checkpoint{advice}"
    return f"{directory}: {'; '.join(differing)}. {used}"


def check_optimizer(flags: Flags, saved: Flags, directory: Path) -> None:
    """Refuse another optimizer, or one whose state is kept in another form."""
    instead = "do the same, or give --no-load-optim to take the weights alone"
    kind, own = saved.get("optimizer", "adam"), flags["optimizer"]
    if kind != own:
        raise UserError(f"{directory}: saved with --optimizer {kind}, and the run has {own}; {instead}")
    found = bool(saved.get("use_distributed_optimizer"))
    if found != bool(flags["use_distributed_optimizer"]):
        raise UserError(
            f"{directory}: saved {'with' if found else 'without'} --use-distributed-optimizer, which keeps its state "
            f"in another form; {instead}"
        )


def check_router(flags: Flags, topk: object, rule: RouterWeight | None, source: str) -> None:
    """Refuse weights whose router computes another function than the command line asks for.

    `normalized` and `straight_through` compute the same function; only their gradients differ.

    Args:
        flags: of the run.
        topk: experts per token of the weights.
        rule: router weight that comes with the weights; None if they name none.
        source: where the weights are, for the message.
    """
    own = flags["moe_router_topk"]
    if topk != own:
        raise UserError(
            f"{source}: moe_router_topk is {topk} there and {own} on the command line; give the same model flags"
        )
    rule, expected = rule or "normalized", named_router_weight(flags) or "normalized"
    if (rule == "softmax") != (expected == "softmax"):
        raise UserError(
            f"{source}: the router weight is {rule} there and {expected} on the command line, which computes another "
            f"function; give --router-weight {rule} (ROUTER_WEIGHT={rule}; in a YAML of reinforcement learning "
            f"norm_topk_prob: {str(rule != 'softmax').lower()})"
        )


def check_layout(layout: ParallelLayout, found: ParallelLayout, directory: Path, instead: str) -> None:
    """Refuse a `torch` checkpoint of another layout; `instead` is what to do."""
    expected = dataclasses.replace(layout, world_size=0)  # of a checkpoint, which has no number of processes
    if found != expected:
        raise UserError(f"{directory} has the layout {found}, and the run has {expected}; {instead}")


def check_tokenizer(expected: str | None, found: object, path: Path) -> None:
    """Refuse weights that were trained with another tokenizer, where that is known."""
    if found and expected and found != expected:
        raise UserError(
            f"{path}: trained with another tokenizer (fingerprint {str(found)[:12]}, the given one's is "
            f"{expected[:12]}). MiniMind's tokenizers share a vocabulary size and almost no ids: give the one it "
            "was trained with"
        )


def conversion(path: Path | str, kind: str, settings: str) -> str:
    """The command that converts weights, by the kind that names its script (`hf2mcore`, `mcore2mcore`)."""
    words = ["LOAD_DIR=" + shlex.quote(str(path)), *filter(None, [settings])]
    return f"{' '.join(words)} bash examples/mcore/minimind/ckpt_convert_minimind_{kind}.sh"


def layout_settings(layout: ParallelLayout) -> str:
    """TP, PP, VPP and EP of a layout, as that script takes them."""
    sizes = {"TP": layout.tp, "PP": layout.pp, "EP": layout.ep}
    if layout.layers_per_virtual_stage:
        sizes["VPP"] = layout.layers_per_virtual_stage
    return " ".join(f"{name}={size}" for name, size in sizes.items())

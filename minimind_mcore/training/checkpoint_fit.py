"""Check that a checkpoint fits a run: the same model, layout and tokenizer.

The checks read only the arguments in the checkpoint, before anything is built. Users are training, its dry run, the
launcher of MindSpeed-LLM and the generator of FusionOne tasks.
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

# Flags that must equal the checkpoint's, whatever the layout.
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


Flags = Mapping[str, object]  # flags of a command line or a checkpoint, by Megatron's names


def check_model(flags: Flags, saved: Flags, directory: Path, fingerprint: str | None = None) -> None:
    """Refuse a checkpoint of another model or tokenizer."""
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
    """Return a warning if Adam's constants differ from the checkpoint's, with both values. Empty if they are equal.

    The constants are part of the optimizer's state: a resumed run takes them from the checkpoint, as Megatron-LM does,
    unless `--override-opt_param-scheduler` selects the command line.

    Args:
        flags: flags of the run.
        saved: flags of the checkpoint.
        directory: the checkpoint, for the message.
        overridable: False for MindSpeed-LLM, whose flag does not affect these constants.
    """
    names = {"adam_beta1": "--adam-beta1", "adam_beta2": "--adam-beta2", "adam_eps": "--adam-eps"}
    there, here = ({flag: one.get(name) for name, flag in names.items()} for one in (saved, flags))
    differing = list(values_differ({flag: value for flag, value in there.items() if value is not None}, here))
    if flags["optimizer"] != "adam" or flags["no_load_optim"] or not differing:
        return ""
    if overridable and flags["override_opt_param_scheduler"]:
        used = "The run uses the command line"
    else:
        advice = "; --override-opt_param-scheduler uses the command line" if overridable else ""
        used = f"The run uses the checkpoint{advice}"
    return f"{directory}: {'; '.join(differing)}. {used}"


def check_optimizer(flags: Flags, saved: Flags, directory: Path) -> None:
    """Refuse a checkpoint of another optimizer, or with another format of the optimizer state."""
    instead = "use the same setting, or give --no-load-optim to load only the weights"
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

    `normalized` and `straight_through` compute the same function and differ only in their gradients.

    Args:
        flags: flags of the run.
        topk: experts per token of the weights.
        rule: router weight stored with the weights, or None.
        source: path of the weights, for the message.
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
    """Refuse a `torch` checkpoint of another layout. `instead` tells the user what to do."""
    expected = dataclasses.replace(layout, world_size=0)  # checkpoints have no world size
    if found != expected:
        raise UserError(f"{directory} has the layout {found}, and the run has {expected}; {instead}")


def check_tokenizer(expected: str | None, found: object, path: Path) -> None:
    """Refuse weights that were trained with another tokenizer. Weights without a fingerprint pass."""
    if found and expected and found != expected:
        raise UserError(
            f"{path}: trained with another tokenizer (fingerprint {str(found)[:12]}, but the given tokenizer has "
            f"{expected[:12]}). MiniMind's tokenizers share a vocabulary size and almost no ids: give the tokenizer of "
            "the weights"
        )


def conversion(path: Path | str, kind: str, settings: str) -> str:
    """Return the command that converts weights. `kind` names the script (`hf2mcore`, `mcore2mcore`)."""
    words = ["LOAD_DIR=" + shlex.quote(str(path)), *filter(None, [settings])]
    return f"{' '.join(words)} bash examples/mcore/minimind/ckpt_convert_minimind_{kind}.sh"


def layout_settings(layout: ParallelLayout) -> str:
    """Return TP, PP, VPP and EP of a layout as settings of that script."""
    sizes = {"TP": layout.tp, "PP": layout.pp, "EP": layout.ep}
    if layout.layers_per_virtual_stage:
        sizes["VPP"] = layout.layers_per_virtual_stage
    return " ".join(f"{name}={size}" for name, size in sizes.items())

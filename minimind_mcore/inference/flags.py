"""The command lines of inference.py and evaluation.py: MindSpeed-LLM's flags, and a few of ours.

What the checkpoint itself tells need not be given. A flag of the model is compared with it where it is; those
of the layout and of training say nothing here and are named once.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore import arguments
from minimind_mcore.checkpoint import assumptions, unpickling
from minimind_mcore.checkpoint.files import directory_of
from minimind_mcore.converters.conversion import Conversion
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import add_kit_flags, build_parser, flag_table, support, unused
from minimind_mcore.models.config import ModelConfig

logger = logging.getLogger(__name__)

PROGRAMS = "inference.py, evaluation.py"  # share a row of inputs/support.json
USED, CHECKED = support(PROGRAMS, "implemented"), support(PROGRAMS, "compared")
# Of MindSpeed-LLM's inference: what is always so here, and how it computes with adapters, which are merged here.
NO_EFFECT = arguments.IMPLEMENTED | arguments.NO_EFFECT
NO_EFFECT |= support(PROGRAMS, "no effect")


def parse(
    argv: Sequence[str],
    program: str,
    used: frozenset[str],
    ignored: frozenset[str] = frozenset(),
    **defaults: object,
) -> argparse.Namespace:
    """Parse a command line of one of the programs.

    Args:
        argv: the words.
        program: its name, for messages; a key of inputs/kit_flags.json, which has the flags of this kit.
        used: dests of MindSpeed-LLM's flags that it uses beside those of loading.
        ignored: dests of MindSpeed-LLM's flags that have no effect in it.
        defaults: other defaults of MindSpeed-LLM's flags.

    Returns:
        A namespace; `given` lists the given flags, `no_effect` those that do nothing, which the log names.

    Raises:
        UserError: an unknown flag, a value of the wrong type, or a flag that is not implemented here.
    """
    parser = build_parser(prog=program)
    parser.set_choices("prompt_type", None)
    parser.set_defaults(lora_r=None, lora_alpha=None, **defaults)  # LoRA's are taken from the checkpoint
    group = add_kit_flags(parser, PROGRAMS)
    unpickling.add_trust_flag(group)
    assumptions.add_flags(group, {flag for action in parser._actions for flag in action.option_strings})
    add_kit_flags(parser, program)
    args, given = parser.parse(argv)
    args.given = given
    mine = USED | CHECKED | used
    if refused := unused(args.given, mine | NO_EFFECT | ignored):
        raise UserError(f"{', '.join(refused)}: not implemented by {program} of this kit; leave it out")
    local = getattr(args, "backend", "local") == "local"
    if args.load is None and local:
        raise UserError(
            "--load is missing: the model, a Megatron checkpoint, a Hugging Face directory or a .pth of MiniMind"
        )
    effective = {assumptions.FLAGS[name] for name in (_stated(args) if local else ())}
    args.no_effect = [flag for flag in unused(args.given, mine) if flag not in effective]
    if args.no_effect:
        logger.info(f"without effect here: {', '.join(args.no_effect)}")
    return args


def loading_job(args: argparse.Namespace, default_dtype: str | None) -> Conversion:
    """What to read.

    Raises:
        UserError: two dtypes are asked for.
    """
    asked = {name for name in ("bf16", "fp16") if getattr(args, name)} | ({args.params_dtype} - {None})
    if len(asked) > 1:
        raise UserError(f"{' and '.join(sorted(asked))} are asked for; expected one dtype")
    return Conversion(
        load_dir=_checkpoint(args),
        dtype=asked.pop() if asked else default_dtype,
        hf_cfg_dir=Path(args.hf_cfg_dir) if args.hf_cfg_dir else None,
        lora_load=Path(args.lora_load) if args.lora_load else None,
        lora_r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_modules=tuple(args.lora_target_modules),
        stated=_stated(args),
    )


def _stated(args: argparse.Namespace) -> dict[str, object]:
    """The flags of the model that replace what is assumed for a `.pth` file; `check_model` compares others."""
    found = assumptions.stated(args, args.given)
    # Flags that MindSpeed-LLM does not have, which `check_model` therefore does not know.
    kept = ("inference_rope_scaling", "router_weight")
    return found if Path(args.load).is_file() else {name: value for name, value in found.items() if name in kept}


def _checkpoint(args: argparse.Namespace) -> Path:
    """`--load`, or the iteration of it that `--ckpt-step` names.

    Raises:
        UserError: there is no such iteration.
    """
    if args.ckpt_step is None:
        return Path(args.load)
    found = directory_of(Path(args.load), args.ckpt_step)
    if not found.is_dir():
        raise UserError(f"--ckpt-step {args.ckpt_step}: {args.load} has no {found.name}")
    return found


def check_model(args: argparse.Namespace, config: ModelConfig) -> None:
    """Compare the flags of the model that are given with the model.

    Raises:
        UserError: one says something else.
    """
    table = flag_table()
    checked = {flag: table[flag]["dest"] for flag in args.given if flag in table and table[flag]["dest"] in CHECKED}
    if not checked:
        return
    parser = build_parser()
    add_kit_flags(parser, "pretrain_gpt.py")
    expected = parser.parse_args(config.megatron_flags())
    for flag, dest in checked.items():
        if getattr(args, dest) != getattr(expected, dest):
            found = getattr(args, dest)
            raise UserError(f"{flag}: says {found}, but the model in {args.load} has {getattr(expected, dest)}")


def tokenizer_flag(args: argparse.Namespace) -> str | None:
    """The directory of the tokenizer, where a flag names it."""
    found: str | None = args.tokenizer_name_or_path or args.tokenizer_model
    return found

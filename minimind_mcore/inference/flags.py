"""The command lines of inference.py and evaluation.py: MindSpeed-LLM's flags, and additional flags of this kit.

Values that the checkpoint stores need no flag. Model flags are compared with the checkpoint. Flags of the layout and of
training have no effect here, and are logged once.
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

PROGRAMS = "inference.py, evaluation.py"  # the two programs share a row of inputs/support.json
USED, CHECKED = support(PROGRAMS, "implemented"), support(PROGRAMS, "compared")
# MindSpeed-LLM's inference flags without effect: settings that always hold here, or handling of adapters (merged here).
NO_EFFECT = arguments.IMPLEMENTED | arguments.NO_EFFECT
NO_EFFECT |= support(PROGRAMS, "no effect")


def parse(
    argv: Sequence[str], program: str, used: frozenset[str], ignored: frozenset[str] = frozenset(), **defaults: object
) -> argparse.Namespace:
    """Parse a command line of one of the programs.

    Args:
        argv: words of the command line.
        program: name of the program, a key of inputs/kit_flags.json, which has this kit's flags.
        used: dests of MindSpeed-LLM's flags that the program uses besides the loading flags.
        ignored: dests of MindSpeed-LLM's flags without effect in the program.
        defaults: defaults that replace MindSpeed-LLM's.

    Returns:
        A namespace. `given` lists the given flags, `no_effect` the given flags without effect, which are logged.

    Raises:
        UserError: a flag is unknown or not implemented, or has a value of the wrong type.
    """
    parser = build_parser(prog=program)
    parser.set_choices("prompt_type", None)
    parser.set_defaults(lora_r=None, lora_alpha=None, **defaults)  # rank and alpha come from the checkpoint
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
    """Return the conversion that loads the model.

    Raises:
        UserError: several dtypes are requested.
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
    """Return the model flags that replace assumed values of a `.pth` file. `check_model` compares the others."""
    found = assumptions.stated(args, args.given)
    # `check_model` does not handle these flags, which MindSpeed-LLM lacks.
    kept = ("inference_rope_scaling", "router_weight")
    return found if Path(args.load).is_file() else {name: value for name, value in found.items() if name in kept}


def _checkpoint(args: argparse.Namespace) -> Path:
    """Return `--load`, or its iteration `--ckpt-step`.

    Raises:
        UserError: the iteration does not exist.
    """
    if args.ckpt_step is None:
        return Path(args.load)
    found = directory_of(Path(args.load), args.ckpt_step)
    if not found.is_dir():
        raise UserError(f"--ckpt-step {args.ckpt_step}: {args.load} has no {found.name}")
    return found


def check_model(args: argparse.Namespace, config: ModelConfig) -> None:
    """Check the given model flags against the model.

    Raises:
        UserError: a flag contradicts the model.
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
    """Return the directory of the tokenizer, if a flag names it."""
    found: str | None = args.tokenizer_name_or_path or args.tokenizer_model
    return found

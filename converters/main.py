"""The command lines of convert_ckpt_v2.py and convert_ckpt.py: MindSpeed-LLM's flags, and additional ones.

python convert_ckpt_v2.py --load-model-type hf --save-model-type mg --load-dir minimind-3 --save-dir mcore \\
    --target-tensor-parallel-size 2 --model-type-hf qwen3
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.checkpoint import assumptions, unpickling
from minimind_mcore.checkpoint.layout import ParallelLayout, parse_numbers
from minimind_mcore.converters.conversion import Conversion, run_conversion
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import add_kit_flags, build_parser, fields_from, support
from minimind_mcore.platform.cpu import keep_freed_memory

logger = logging.getLogger(__name__)

V2, V1 = "convert_ckpt_v2.py", "convert_ckpt.py"

_LEGACY = (
    "a Megatron-legacy model: only mcore models are supported, as in current versions of MindSpeed-LLM; give "
    "--use-mcore-models and leave out --load-from-legacy and --save-to-legacy"
)


def main_v2(argv: Sequence[str] | None = None) -> None:
    """Run convert_ckpt_v2.py."""
    keep_freed_memory()  # each tensor reuses the memory of the one before
    args, given = _parse(V2, sys.argv[1:] if argv is None else argv)
    if args.transformer_impl != "local":
        raise UserError(
            "--transformer-impl transformer_engine: its names for norms differ from MiniMind's spec; use local"
        )
    run_conversion(_conversion(args, given, Path(args.save_dir), _first_path(args.hf_cfg_dir, args.hf_dir)))


def main_v1(argv: Sequence[str] | None = None) -> None:
    """Run convert_ckpt.py."""
    keep_freed_memory()
    args, given = _parse(V1, sys.argv[1:] if argv is None else argv)
    if not args.use_mcore_models or args.load_from_legacy or args.save_to_legacy:
        raise UserError(_LEGACY)
    if args.model_type != "GPT":
        raise UserError(f"--model-type {args.model_type}: expected GPT")
    save_dir, hf_cfg_dir = Path(args.save_dir), _first_path(args.hf_cfg_dir, args.hf_dir)
    if args.save_model_type == "hf":
        # In MindSpeed-LLM --save-dir is then the original model, which supplies config and tokenizer.
        if hf_cfg_dir is None and (save_dir / "config.json").is_file():
            hf_cfg_dir = save_dir
        save_dir = save_dir / "mg2hf"
    if args.tokenizer_model and not args.tokenizer_name_or_path:
        tokenizer = Path(args.tokenizer_model)
        args.tokenizer_name_or_path = str(tokenizer.parent if tokenizer.is_file() else tokenizer)
    run_conversion(_conversion(args, given, save_dir, hf_cfg_dir))


def _parse(program: str, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line of one of the programs. Return the arguments and the flags that were given."""
    parser = build_parser(program, prog=program)
    for action in parser._actions:
        if action.dest in ("model_type_hf", "params_dtype", "ckpt_format", "lora_r", "lora_alpha"):
            # MindSpeed-LLM's choices lack values that this kit accepts, such as its model types. Without a default an
            # omitted flag is None, and `Conversion` or the source determines the value.
            action.choices, action.default = None, None
    unpickling.add_trust_flag(add_kit_flags(parser, f"{V2}, {V1}"))
    known = {flag for action in parser._actions for flag in action.option_strings}
    assumptions.add_flags(parser.add_argument_group("model", "values that a .pth file does not hold"), known)
    args, given = parser.parse(argv)
    if refused := [flag for flag in given if flag in support(program, "refused")]:
        raise UserError(f"{', '.join(refused)}: a MiniMind model has no use for this; leave it out")
    if ignored := [flag for flag in given if flag in support(program, "no effect")]:
        logger.info(f"these flags have no effect here: {', '.join(ignored)}")
    return args, given


def _conversion(args: argparse.Namespace, given: Sequence[str], save_dir: Path, hf_cfg_dir: Path | None) -> Conversion:
    """Return the conversion for a command line."""
    list_ = parse_numbers("num_layer_list", args.num_layer_list or "")
    tp = args.target_tensor_parallel_size
    etp = getattr(args, "expert_tensor_parallel_size", None)
    if etp not in (None, tp):
        raise UserError(f"--expert-tensor-parallel-size {etp}: experts are split like the other layers; expected {tp}")
    dense = getattr(args, "first_k_dense_replace", None)
    if dense not in (None, 0, -1):
        raise UserError(f"--first-k-dense-replace {dense}: all layers of a MiniMind have the same type; expected 0")
    changes = {
        "load_dir": Path(args.load_dir),
        "save_dir": save_dir,
        "hf_cfg_dir": hf_cfg_dir,
        "load_type": args.load_model_type if "--load-model-type" in given else None,
        "save_type": "hf" if args.save_model_type == "hf" else "mg",
        "layout": ParallelLayout(
            tp=tp,
            pp=args.target_pipeline_parallel_size,
            ep=args.target_expert_parallel_size,
            layers_per_virtual_stage=args.num_layers_per_virtual_pipeline_stage,
            layers_per_stage=list_ or None,
            noop_layers=parse_numbers("noop_layers", args.noop_layers or ""),
            grouped_experts=args.moe_grouped_gemm,
        ),
        "ckpt_format": args.ckpt_format or "torch",
        "model_type": args.model_type_hf,
        "dtype": args.params_dtype,
        "tokenizer": _first_path(args.tokenizer_name_or_path),
        "vocab_divisible_by": args.make_vocab_size_divisible_by,
        "shard_bytes": int(args.max_shard_size * (1 << 30)),
        "lora_load": _first_path(args.lora_load),
        "lora_modules": tuple(args.lora_target_modules),
        "lora_only": args.save_lora_to_hf,
        "stated": assumptions.stated(args, given),
    }
    return Conversion(**fields_from(Conversion, vars(args)) | changes)


def _first_path(*values: str | None) -> Path | None:
    return next((Path(value) for value in values if value), None)

"""The options of a conversion, and the source, the target and the checks that follow from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minimind_mcore.checkpoint import assumptions, lora
from minimind_mcore.checkpoint.files import iteration_directory
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.megatron import open_adapters
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.checkpoint.padding import pad_heads
from minimind_mcore.checkpoint.source import Source, cast, resize_vocabulary
from minimind_mcore.converters import peft
from minimind_mcore.converters.convert import Result, Target, convert, require_free, require_space
from minimind_mcore.converters.hf import SHARD_BYTES, HFTarget, PthTarget
from minimind_mcore.converters.megatron import MegatronTarget
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.hf_config import hf_model_type
from minimind_mcore.models.presets import PRESETS, get_preset

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
# MindSpeed-LLM's names of the model types, with the names in transformers
MODEL_TYPES = {"llama2": "llama", "qwen3": "qwen3", "qwen3-moe": "qwen3_moe", "qwen2-moe": "qwen2_moe"}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The options of a conversion. A field has the value of its flag, or a default if the flag was not given.

    Reading a model needs no `save_dir`.
    """

    load_dir: Path
    save_dir: Path = Path()
    save_type: str = "hf"
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    load_type: str | None = None
    ckpt_format: str = "torch"
    model_type: str | None = None
    dtype: str | None = None
    format: str = "hf"
    copy_code: bool = False
    pad_head_dim: int | None = None
    hf_cfg_dir: Path | None = None
    tokenizer: Path | None = None
    true_vocab_size: int | None = None
    padded_vocab_size: int | None = None
    vocab_divisible_by: int = 1
    verify: str = "weights"
    dry_run: bool = False
    shard_bytes: int = SHARD_BYTES
    lora_load: Path | None = None
    lora_r: int | None = None
    lora_alpha: float | None = None
    lora_modules: tuple[str, ...] = ()
    lora_only: bool = False
    stated: Mapping[str, object] = field(default_factory=dict)


def run_conversion(conversion: Conversion) -> Result | None:
    """Convert, and log the result.

    A dry run checks the flags and the disk space, writes nothing, and returns None.

    Raises:
        UserError: a flag contradicts the source or the target, the source is damaged, or the output cannot be written.
    """
    unpadded = prepare(conversion, open_model(conversion))
    source = with_padded_heads(conversion, unpadded)
    target = make_target(conversion, source)
    logger.info(f"from  {conversion.load_dir}: {source.kind}, {_name(source.dtype)}, {source.nbytes / 1e6:,.1f} MB")
    logger.info(f"to    {conversion.save_dir}: {target.kind}, {target.nbytes / 1e6:,.1f} MB")
    for line in assumptions.described(conversion.load_dir, source.assumptions):
        logger.info(f"note  {line}")
    if source.dtype == torch.float16:
        logger.info(
            "note  fp16 weights: MiniMind's own tools save fp16 whatever the training precision; "
            "convert from the trainer's checkpoint if more precision matters"
        )
    if conversion.dry_run:
        require_free(conversion.save_dir)
        require_space(conversion.save_dir, target.nbytes)
        print("a dry run: everything is valid, nothing was written", flush=True)
        return None
    probe = None
    if conversion.verify == "logits" and not conversion.lora_only:
        from minimind_mcore.converters.probe import compare_logits

        probe = partial(compare_logits, unpadded, target)
    result = convert(source, target, conversion.save_dir, probe)
    logger.info(f"check {result.tensors} tensors read back, equal; digest of the weights {result.digest}")
    rate = result.nbytes / 1e9 / result.seconds
    logger.info(f"done  {result.path} in {result.seconds:.1f} s ({rate:.2f} GB/s)")
    return result


def _name(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(str(dtype).removeprefix("torch."), str(dtype))


# ------------------------------------------------------------------------------------------------------ source


def open_model(conversion: Conversion) -> Source:
    """Open the source, and check it against the flags.

    Raises:
        UserError: the source contradicts a flag, or is damaged.
    """
    source = open_source(conversion.load_dir, _given_config(conversion.hf_cfg_dir), conversion.stated)
    found = "mg" if source.kind.startswith("Megatron") else "hf"
    if conversion.load_type not in (None, found):
        raise UserError(
            f"--load-model-type {conversion.load_type}: found {source.kind} in {conversion.load_dir}; give {found}"
        )
    check_model_type(conversion.model_type, source.config)
    assumptions.compare(source.config, conversion.stated)
    if conversion.lora_load:
        if conversion.lora_load.is_file():
            adapters, file = lora.open_minimind_adapter(conversion.lora_load, source)
            rank = min(tensor.shape[0] for name, tensor in adapters.items() if ".lora_A." in name)
            training = source.training.replace(lora_alpha=float(rank))  # MiniMind adds B A without scaling
            source = source.replace(adapters=adapters, files=(*source.files, file), training=training)
        else:
            source = open_adapters(_iteration(conversion.lora_load), source)
    return source


def _given_config(folder: Path | None) -> ModelConfig | None:
    if folder is not None and not folder.is_dir():
        raise UserError(f"--hf-cfg-dir {folder}: no such directory")
    has_config = folder is not None and (folder / "config.json").is_file()
    return ModelConfig.from_hf_config(folder) if folder and has_config else None


def _iteration(path: Path) -> Path:
    directory = iteration_directory(path) if path.is_dir() else None
    if directory is None:
        raise UserError(f"--lora-load {path}: expected a Megatron checkpoint with adapters, or MiniMind's LoRA .pth")
    return directory


def check_model_type(name: str | None, config: ModelConfig) -> None:
    """Check `--model-type-hf`, a name of MindSpeed-LLM or MiniMind, against the architecture.

    Raises:
        UserError: they differ, or the name is unknown.
    """
    if name is None:
        return
    found = hf_model_type(config)
    key = name.lower().replace("_", "-")
    if key == "minimind":
        return
    if key in MODEL_TYPES:
        expected = MODEL_TYPES[key]
    elif key.replace("-", "_") in PRESETS or key.startswith("minimind"):
        expected = hf_model_type(get_preset(name))
    else:
        known = ", ".join([*MODEL_TYPES, "minimind", *(n for n in PRESETS if not n.endswith("_tiny"))])
        raise UserError(f"--model-type-hf {name}: not an architecture of MiniMind; expected one of {known}")
    if expected != found:
        raise UserError(f"--model-type-hf {name}: this name means {expected}, but the model is {found}")


def prepare(conversion: Conversion, source: Source) -> Source:
    """Apply the flags that change the source: merge adapters, cast, resize the vocabulary.

    Raises:
        UserError: the weights have no LoRA adapters, the vocabulary size differs, or the dtype is unknown.
    """
    if source.adapters and not conversion.lora_only:
        source = lora.merge(
            lora.require_modules(source, conversion.lora_modules), conversion.lora_r, conversion.lora_alpha
        )
    elif conversion.lora_only or conversion.lora_r is not None or conversion.lora_alpha is not None:
        if not source.adapters:
            raise UserError(
                f"{conversion.load_dir}: found no LoRA adapters there; expected linear_*.lora_A.default.weight"
            )
        source = peft.adapter_source(lora.require_modules(source, conversion.lora_modules))
    if not conversion.lora_only:
        source = resize_vocabulary(source, _rows(conversion, source))
    if conversion.dtype is not None:
        name = DTYPE_NAMES.get(conversion.dtype, conversion.dtype)
        if name not in DTYPES:
            raise UserError(f"--params-dtype {conversion.dtype}: expected one of {', '.join(DTYPES)}")
        source = cast(source, DTYPES[name])
    return source


def with_padded_heads(conversion: Conversion, source: Source) -> Source:
    """Pad the heads of the source to `--pad-head-dim`.

    Raises:
        UserError: the output format cannot hold padded heads, or the heads cannot be padded to that size.
    """
    if (
        conversion.lora_only
        or conversion.save_type != "hf"
        or conversion.format != "hf"
        or conversion.save_dir.suffix == ".pth"
    ):
        source.config.require_unpadded()
        if conversion.pad_head_dim is not None:
            raise UserError(
                f"--pad-head-dim {conversion.pad_head_dim}: only a Hugging Face directory can hold padded heads; give "
                "--save-model-type hf and --format hf, a --save-dir that does not end in .pth, and no --save-lora-to-hf"
            )
    return source if conversion.pad_head_dim is None else pad_heads(source, conversion.pad_head_dim)


def _rows(conversion: Conversion, source: Source) -> int:
    """Return the number of rows of the embedding in the output."""
    rows = source.config.vocab_size
    true = conversion.true_vocab_size
    if true is None and conversion.save_type == "hf" and (given := _given_config(conversion.hf_cfg_dir)):
        true = given.vocab_size
    if true is not None:
        if true > rows:
            raise UserError(f"--true-vocab-size or --hf-cfg-dir: expected {true} rows, but the weights have {rows}")
        rows = true
    if conversion.save_type == "hf":
        return rows
    unit = conversion.vocab_divisible_by * conversion.layout.tp if conversion.vocab_divisible_by > 1 else 1
    padded = conversion.padded_vocab_size or -(-rows // unit) * unit
    if padded < rows:
        raise UserError(f"--padded-vocab-size {padded}: the vocabulary has {rows} rows already")
    return padded


# ------------------------------------------------------------------------------------------------------ target


def make_target(conversion: Conversion, source: Source) -> Target:
    """Create the target.

    Raises:
        UserError: the format cannot hold the model.
    """
    folder = conversion.tokenizer or conversion.hf_cfg_dir
    if conversion.lora_only:
        return peft.PeftTarget(source, conversion.lora_r, conversion.lora_alpha, conversion.hf_cfg_dir)
    if conversion.save_type == "hf":
        if conversion.save_dir.suffix == ".pth":
            return PthTarget(source)
        return HFTarget(
            source,
            native=conversion.format == "minimind",
            folder=folder,
            copy_code=conversion.copy_code,
            shard_bytes=conversion.shard_bytes,
        )
    source = _with_tokenizer(source, folder)
    if conversion.ckpt_format == "torch":
        return MegatronTarget(source, conversion.layout)
    if conversion.ckpt_format == "torch_dist":
        from minimind_mcore.converters.megatron import MegatronDistTarget

        return MegatronDistTarget(source)
    raise UserError(f"--ckpt-format {conversion.ckpt_format}: expected torch or torch_dist")


def _with_tokenizer(source: Source, folder: Path | None) -> Source:
    """Record the tokenizer in the checkpoint, so that training can detect another tokenizer."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return source
    from minimind_mcore.preprocess.tokenize import tokenizer_fingerprint

    fields: dict[str, Any] = {"tokenizer": str(folder.absolute()), "fingerprint": tokenizer_fingerprint(folder)}
    return source.replace(training=source.training.replace(**fields))

"""Load a model for inference from any format that the converters read. Nothing is written.

loaded = load(*open_both(conversion, tokenizer))
loaded.model                            # a transformers model: Llama, Qwen3, Qwen2-MoE or Qwen3-MoE
"""

from __future__ import annotations

import argparse
import functools
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minimind_mcore.checkpoint import assumptions
from minimind_mcore.checkpoint.source import Source
from minimind_mcore.converters.conversion import DTYPE_NAMES, Conversion, open_model, prepare
from minimind_mcore.errors import UserError
from minimind_mcore.inference import flags
from minimind_mcore.inference.decoder import Decoder
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import cpu, device
from minimind_mcore.preprocess import hf_tokenizer
from minimind_mcore.preprocess.tokenize import TokenizerInfo, tokenizer_info

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, and its tokenizer.

    Attributes:
        model: a transformers model on the device, in evaluation mode.
        tokenizer: a transformers tokenizer.
        info: identity of the tokenizer.
        config: the architecture.
        kind: format of the source, for messages.
    """

    model: Any
    tokenizer: Any
    info: TokenizerInfo
    config: ModelConfig
    kind: str

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        found: torch.device = self.model.device
        return found

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The decoder of the model. Created once, because it rearranges the weights."""
        return Decoder(self.model)

    @property
    def dtype(self) -> str:
        """The dtype of the weights: fp32, bf16 or fp16."""
        return DTYPE_NAMES[str(self.model.dtype).removeprefix("torch.")]


def open_both(conversion: Conversion, tokenizer: str | None) -> tuple[Source, TokenizerInfo]:
    """Open a model without reading its weights, and its tokenizer.

    Args:
        conversion: source of the model, with its adapters and dtype; see `converters/conversion.py`.
        tokenizer: directory of the tokenizer. None: the one that the source names or contains.

    Raises:
        UserError: the source is damaged or has another architecture, or the tokenizer is missing or another one.
    """
    source = prepare(conversion, open_model(conversion))
    return source, find_tokenizer(source, tokenizer)


def load(source: Source, info: TokenizerInfo) -> Loaded:
    """Read the weights onto the device.

    Raises:
        UserError: the weights are damaged.
    """
    model = build_model(source).to(device.current().torch_device)
    return Loaded(model, load_tokenizer(info), info, source.config, source.kind)


def default_dtype() -> str | None:
    """Return fp32 on a CPU, where half precision is slower, and None (the dtype of the source) elsewhere."""
    return "fp32" if device.current().kind == "cpu" else None


def build_model(source: Source) -> Any:
    """Return the transformers model with the weights of a source, on the CPU.

    Raises:
        UserError: transformers' model has other tensors.
    """
    model = empty_model(source.config)
    whole = {name: lazy.read() for name, lazy in source.tensors.items()}
    state = weights.mcore_to_hf(whole, source.config, weights.detect_form(model.state_dict()))
    return fill_model(model, state, source.config)


def empty_model(config: ModelConfig) -> Any:
    """Return the transformers model of an architecture, with weights that use no memory and must be replaced."""
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config.hf_config())


def fill_model(model: Any, state: dict[str, torch.Tensor], config: ModelConfig) -> Any:
    """Put weights into the result of `empty_model` without copying them, and return the model ready to run.

    Raises:
        UserError: transformers' model has other tensors.
    """
    import transformers

    if config.tie_embeddings:
        state = state | {"lm_head.weight": state["model.embed_tokens.weight"]}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"transformers {transformers.__version__} has other tensors for this model: {error}") from error
    model.tie_weights()
    # state dicts do not contain its buffers
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config.hf_config())
    return model.requires_grad_(False).eval()


def find_tokenizer(source: Source, given: str | None) -> TokenizerInfo:
    """Find the tokenizer of a model.

    Args:
        source: the model.
        given: `--tokenizer-name-or-path`.

    Raises:
        UserError: the directory lacks a tokenizer, or its tokenizer does not belong to the model.
    """
    beside = source.folder if source.folder and (source.folder / "tokenizer.json").is_file() else None
    path = given or source.training.tokenizer or beside
    if path is None:
        raise UserError(f"{source.path}: names no tokenizer and has none; give its directory, --tokenizer-name-or-path")
    if given is None and not Path(path).exists():
        raise UserError(
            f"{source.path}: its tokenizer, {path}, is no longer there; give its directory, --tokenizer-name-or-path"
        )
    info = tokenizer_info(path)
    expected = source.training.fingerprint
    if expected not in (None, info.fingerprint):
        raise UserError(
            f"the tokenizer {path} has fingerprint {info.fingerprint[:12]}, the model was trained with "
            f"{expected[:12]}: MiniMind's tokenizers share a vocabulary size and almost no ids; give the one that it "
            "was trained with"
        )
    if info.vocab_size > source.config.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {info.vocab_size} ids, the model {source.config.vocab_size}: it is not its own"
        )
    return info


def load_tokenizer(info: TokenizerInfo) -> Any:
    """Load transformers' tokenizer, with the ids of tokenizer.json, which training reads.

    Raises:
        UserError: the tokenizer has no eos, or transformers would produce other ids.
    """
    if info.eos_id is None:
        raise UserError(
            f"the tokenizer {info.path}: its tokenizer_config.json names no eos_token that is in the vocabulary"
        )
    return hf_tokenizer.load_tokenizer(info.path)


def opened(args: argparse.Namespace) -> tuple[Source, TokenizerInfo]:
    """Open the model and the tokenizer of a command line, without reading weights.

    Raises:
        UserError: see `open_both` and `flags.check_model`.
    """
    source, info = open_both(flags.loading_job(args, default_dtype()), flags.tokenizer_flag(args))
    flags.check_model(args, source.config)
    size = source.config.num_parameters() / 1e6
    logger.info(f"model      {args.load}: {source.kind}, {size:.1f}M parameters")
    for line in assumptions.described(args.load, source.assumptions):
        logger.info(line)
    logger.info(f"tokenizer  {info.path} (fingerprint {info.fingerprint[:12]})")
    return source, info


def start(source: Source, info: TokenizerInfo) -> Loaded:
    """Load the model onto the device.

    Raises:
        UserError: see `load`.
    """
    if device.current().kind == "cpu":
        cpu.tune()
    began = time.perf_counter()
    loaded = load(source, info)
    seconds = time.perf_counter() - began
    logger.info(f"loaded     {loaded.dtype} on {device.current().kind} in {seconds:.1f} s")
    return loaded

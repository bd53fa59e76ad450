"""`--verify logits`: run the source model and the output model, and compare the logits.

Weights of Hugging Face and MiniMind run in transformers, Megatron's in megatron-core (one process, on the CPU). Both
run in fp32, so that the comparison shows the weights and not the rounding of attention kernels. The memory holds up to
two copies of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_mcore.checkpoint.source import Lazy, Source
from minimind_mcore.converters.convert import Target
from minimind_mcore.converters.hf import HFTarget
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig

logger = logging.getLogger(__name__)

BATCH, SEQUENCE, SEED = 2, 64, 20240828
# Padded heads use another base of the rotary embedding. Its float32 rounding error grows with the position, so the
# difference is also printed for 2,048 tokens.
PADDED_SEQUENCE, PADDED_LONG = 512, 2048
TOLERANCE = 1e-4  # relative to the largest logit, or to 1 if that is smaller


def compare_logits(source: Source, target: Target, written: Mapping[str, Lazy], root: Path) -> None:
    """Log the largest difference of the logits.

    Raises:
        UserError: the difference exceeds rounding errors.
    """
    config = source.config
    padded = isinstance(target, HFTarget) and target.source.config.unpadded_head_dim != config.unpadded_head_dim
    shape = (1, PADDED_LONG) if padded else (BATCH, SEQUENCE)
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(SEED))

    def of_source() -> Tensor:
        run = megatron_logits if source.kind.startswith("Megatron") else transformers_logits
        return run(config, source.tensors, ids)

    def of_target() -> Tensor:
        if isinstance(target, HFTarget) and target.form == "hf":
            return directory_logits(root, ids)
        run = megatron_logits if target.kind.startswith("Megatron") else transformers_logits
        return run(config, written, ids)

    with torch.no_grad():
        # transformers runs first: once the CPU is Megatron's device, transformers leaves loaded buffers uninitialized.
        if source.kind.startswith("Megatron"):
            found, expected = of_target(), of_source()
        else:
            expected, found = of_source(), of_target()
    if padded:
        difference = (found - expected).abs().max().item()
        logger.info(f"padded heads, {PADDED_LONG:,} tokens: largest difference of the logits {difference:.3g}")
        ids, found, expected = (x[:, :PADDED_SEQUENCE] for x in (ids, found, expected))
    difference = (found - expected).abs().max().item()
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    limit = TOLERANCE * max(1.0, expected.abs().max().item())
    logger.info(
        f"logits of {ids.numel()} tokens: largest difference {difference:.3g}, argmax equal in {100 * same:.1f} %"
    )
    if not difference <= limit:
        raise UserError(
            f"--verify logits: the logits differ by {difference:.3g}, expected at most {limit:.3g}; nothing is written"
        )


def transformers_logits(config: ModelConfig, tensors: Mapping[str, Lazy], ids: Tensor) -> Tensor:
    """Return the logits of the transformers model with these weights."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config.hf_config()).float().eval()
    whole = {name: lazy.read().float() for name, lazy in tensors.items()}
    form = weights.detect_form(model.state_dict())
    state = weights.mcore_to_hf(whole, config, form)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    if set(missing) - tied or unexpected:
        raise UserError(
            f"transformers {transformers.__version__} has other tensors for this model: {missing} {unexpected}"
        )
    logits: Tensor = model(ids).logits
    return logits


def directory_logits(root: Path, ids: Tensor) -> Tensor:
    """Return the logits of the model that transformers loads from a directory."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(root)).float().eval()
    logits: Tensor = model(ids).logits
    return logits


def megatron_logits(config: ModelConfig, tensors: Mapping[str, Lazy], ids: Tensor) -> Tensor:
    """Return the logits of the megatron-core model with these weights."""
    from minimind_mcore.converters.megatron import single_process

    with single_process():
        from megatron.core import tensor_parallel

        from minimind_mcore.models.core_config import build_gpt_model
        from minimind_mcore.models.loading import load_into

        tensor_parallel.model_parallel_cuda_manual_seed(SEED)
        core = config.transformer_config(perform_initialization=False)
        model: Any = build_gpt_model(config, core, parallel_output=False).eval()
        load_into([model], lambda name: tensors[name].read().float())
        positions = torch.arange(ids.shape[1]).expand(*ids.shape)
        logits: Tensor = model(ids, positions, None)
    return logits

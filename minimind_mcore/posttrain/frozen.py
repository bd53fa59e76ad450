"""A model that only answers, of any size: a teacher, or a live reference."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_mcore import device
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.posttrain.sft import run_model
from minimind_mcore.preprocess.tokenize import tokenizer_fingerprint
from minimind_mcore.training import checkpointing
from minimind_mcore.training.checkpoint_torch import NAME
from minimind_mcore.training.layout import Layout
from minimind_mcore.training.model import core_config


class FrozenModel:
    """It is whole on every rank of the last pipeline stage, where the loss is; its tensors are split as the run's are.

    Args:
        args: of the run.
        layout: of the run.
        path: an HF directory, or a directory of checkpoints.

    Raises:
        UserError: nothing there that can be read, or a model of another vocabulary.
    """

    def __init__(self, args: argparse.Namespace, layout: Layout, path: str) -> None:
        from megatron.core import parallel_state

        config, state = read_model(args, Path(path))
        self.model: Any = None
        if parallel_state.get_pipeline_model_parallel_rank() == layout.pp - 1:
            self.model = _build(args, layout, config, state)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], labels: Tensor | None = None) -> Tensor:
        """See `run_model`."""
        return run_model(self.model, batch, labels)


def _build(args: argparse.Namespace, layout: Layout, config: ModelConfig, state: Mapping[str, Tensor]) -> Any:
    from minimind_mcore.models.core_config import build_gpt_model
    from minimind_mcore.models.loading import load_into

    # One stage, whatever the run's pipeline; untied, as megatron-core adds up tied weights over all stages.
    alone = dataclasses.replace(layout, pp=1, vpp=None)
    untied = config.replace(tie_embeddings=False)
    model = build_gpt_model(untied, core_config(args, alone, untied)).to(device.current().torch_device)
    load_into(
        [model], lambda name: state[weights.EMBEDDING if name == weights.OUTPUT and config.tie_embeddings else name]
    )
    return model.to(args.params_dtype).requires_grad_(False).eval()


def read_model(args: argparse.Namespace, path: Path) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The architecture, and the whole megatron-core model. Collective."""
    if (path / "config.json").is_file():
        config, state = _read_hf(path)
        file = path / "tokenizer.json"
        fingerprint = tokenizer_fingerprint(path) if file.is_file() else None
    else:
        directory = checkpointing.choose(path)
        if directory is None:
            raise UserError(f"{path}: found neither config.json of a Hugging Face model nor checkpoints")
        config, state, fingerprint = _read_megatron(directory)
    if config.vocab_size != args.padded_vocab_size:
        raise UserError(f"{path}: a vocabulary of {config.vocab_size}, the run has {args.padded_vocab_size}")
    if fingerprint and fingerprint != args.tokenizer_fingerprint:
        raise UserError(f"{path}: trained with another tokenizer than the run's: their ids mean other text")
    return config, state


def _read_hf(path: Path) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: no .safetensors in it")
    config = ModelConfig.from_hf_config(path)
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    return config, weights.hf_to_mcore(state, config)


def _read_megatron(directory: Path) -> tuple[ModelConfig, Mapping[str, Tensor], str | None]:
    """A `torch` checkpoint of any TP and PP."""
    files = sorted(directory.glob(f"mp_rank_*/{NAME}"))
    loaded = [torch.load(file, map_location="cpu", weights_only=False) for file in files]
    if not loaded or loaded[0]["args"].expert_model_parallel_size > 1 or "model" not in loaded[0]:
        raise UserError(
            f"{directory}: found no torch checkpoint without virtual stages and expert parallelism; convert it to "
            "Hugging Face files (convert_ckpt_v2.py)"
        )
    saved = loaded[0]["args"]
    config, stages = ModelConfig.from_args(saved), int(saved.pipeline_model_parallel_size)
    parts: dict[str, list[Tensor]] = {}
    for i, content in enumerate(loaded):  # mp_rank_TT_PPP: TP first
        first = i % stages * config.num_layers // stages
        for name, tensor in content["model"].items():
            if isinstance(tensor, Tensor):
                parts.setdefault(_whole_name(name, first), []).append(tensor)
    whole = {name: weights.unshard(name, tensors) for name, tensors in parts.items()}
    return config, whole, getattr(saved, "tokenizer_fingerprint", None)


def _whole_name(name: str, first: int) -> str:
    """Layers are numbered from 0 in each stage."""
    words = name.split(".")
    if words[:2] == ["decoder", "layers"]:
        words[2] = str(int(words[2]) + first)
    return ".".join(words)

"""A model that only answers, of any size: a teacher, or a live reference."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_mcore.checkpoint import assumptions
from minimind_mcore.checkpoint.source import Source
from minimind_mcore.errors import UserError
from minimind_mcore.models.weights import EMBEDDING, OUTPUT
from minimind_mcore.platform import device
from minimind_mcore.posttrain.sft import run_model
from minimind_mcore.training import distributed
from minimind_mcore.training.checkpoint_weights import open_weights, read_tensor
from minimind_mcore.training.layout import Layout
from minimind_mcore.training.model import core_config


class FrozenModel:
    """It is whole on every rank of the last pipeline stage, where the loss is; its tensors are split as the run's are.

    Args:
        args: of the run.
        layout: of the run.
        path: weights of Hugging Face, MiniMind or Megatron.

    Raises:
        UserError: nothing there that can be read, or a model of another vocabulary.
    """

    def __init__(self, args: argparse.Namespace, layout: Layout, path: str) -> None:
        from megatron.core import parallel_state

        source = open_weights(args, Path(path))
        if distributed.is_main():
            for line in assumptions.described(path, source.assumptions):
                print(line, flush=True)
        if source.config.vocab_size != args.padded_vocab_size:
            raise UserError(
                f"{path}: a vocabulary of {source.config.vocab_size}, --padded-vocab-size is {args.padded_vocab_size}"
            )
        self.model: Any = None
        if parallel_state.get_pipeline_model_parallel_rank() == layout.pp - 1:
            self.model = _build(args, layout, source)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], labels: Tensor | None = None) -> Tensor:
        """See `run_model`."""
        return run_model(self.model, batch, labels)


def _build(args: argparse.Namespace, layout: Layout, source: Source) -> Any:
    from minimind_mcore.models.core_config import build_gpt_model
    from minimind_mcore.models.loading import load_into

    # One stage, whatever the run's pipeline; untied, as megatron-core adds up tied weights over all stages.
    alone = dataclasses.replace(layout, pp=1, vpp=None)
    untied = source.config.replace(tie_embeddings=False)
    model = build_gpt_model(untied, core_config(args, alone, untied)).to(device.current().torch_device)
    tied = {OUTPUT: EMBEDDING} if source.config.tie_embeddings else {}
    load_into([model], lambda name: read_tensor(source, tied.get(name, name)))
    return model.to(args.params_dtype).requires_grad_(False).eval()

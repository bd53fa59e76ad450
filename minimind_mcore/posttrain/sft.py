"""Supervised fine-tuning, and the reasoning distillation of MiniMind2."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minimind_mcore.posttrain.base import PostTraining, run_model
from minimind_mcore.preprocess.tokenize import load_encoder
from minimind_mcore.training.data import tokenizer_path
from minimind_mcore.training.job import LossFunction, MicroBatch, averaged, token_loss

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


class SFT(PostTraining):
    """The pretraining loss on the tokens with a label."""

    title = "supervised fine-tuning"

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        return run_model(model, batch, labels=batch["labels"]), functools.partial(token_loss, batch["loss_mask"])


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TAG_WEIGHT = 10.0


class Reason(SFT):
    """SFT with weight 10 on every token that is a piece of a tag, wherever the token occurs.

    MiniMind2's vocabulary splits the tags into several pieces, among them `<` and `>`. The weighted sum is divided by
    the unweighted number of labels.
    """

    title = "reasoning distillation"

    @functools.cached_property
    def pieces(self) -> Tensor:
        """The token ids that occur in a tag."""
        tokens, _ = load_encoder(tokenizer_path(self.config.data), backend="tokenizers").encode(list(TAGS))
        return torch.tensor(sorted(set(tokens.tolist())))

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        mask: Tensor = batch["loss_mask"]
        is_piece = torch.isin(batch["labels"], self.pieces.to(mask.device))
        weights = mask * torch.where(is_piece, TAG_WEIGHT, 1.0)

        def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return averaged((losses.float() * weights).sum(), mask.sum())

        return run_model(model, batch, labels=batch["labels"]), loss

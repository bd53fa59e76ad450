"""Supervised fine-tuning, and MiniMind2's reasoning distillation."""

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
    """The loss of pretraining, on the tokens that have a label."""

    title = "supervised fine-tuning"

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        return run_model(model, batch, labels=batch["labels"]), functools.partial(token_loss, batch["loss_mask"])


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TAG_WEIGHT = 10.0


class Reason(SFT):
    """SFT in which every token that is a piece of a tag counts ten times, wherever it stands.

    In MiniMind2's vocabulary the tags are several pieces, `<` and `>` among them. The weighted sum is
    divided by the number of labels without their weights.
    """

    title = "reasoning distillation"

    @functools.cached_property
    def pieces(self) -> Tensor:
        """Token ids of which the tags are made."""
        tokens, _ = load_encoder(tokenizer_path(self.config.data), backend="tokenizers").encode(list(TAGS))
        return torch.tensor(sorted(set(tokens.tolist())))

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        mask: Tensor = batch["loss_mask"]
        is_piece = torch.isin(batch["labels"], self.pieces.to(mask.device))
        weights = mask * torch.where(is_piece, TAG_WEIGHT, 1.0)

        def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return averaged((losses.float() * weights).sum(), mask.sum())

        return run_model(model, batch, labels=batch["labels"]), loss

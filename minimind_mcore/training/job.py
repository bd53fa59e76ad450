"""What a stage of training has of its own: data, loss, what it does to the model. The rest is everyone's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import default_collate

from minimind_mcore.training import data
from minimind_mcore.training.config import TrainConfig

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import MegatronModule

    from minimind_mcore.training.step import Engine


class MicroBatch(TypedDict, total=False):
    """What a forward pass reads: the first four are [sequences, length]; the others are there where a job needs them.

    Attributes:
        index: of each sample in the dataset.
        cu_seqlens: begin of each packed sample, and the end of the last.
        longest: of the packed samples.
        reference: [pairs, 2] log-probabilities of the reference model.
        rows: of reinforcement learning: its own batch.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    index: list[int]
    cu_seqlens: Tensor
    longest: int
    reference: Tensor
    rows: Any


# What megatron-core makes of a model's output: the summed loss, what to divide it by, and what to log.
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def averaged(total: Tensor, number: Tensor, *metrics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result of a `LossFunction`: sums over a micro-batch, and the number of things summed (tokens, pairs).

    megatron-core divides the loss by the number per micro-batch, or once per step under
    `--calculate-per-token-loss`; `step.averages` does the same with all of them for the log.
    """
    sums = [total.detach(), number.float(), *(metric.detach() for metric in metrics)]
    return total, number.to(torch.int), torch.stack(sums)


def measured(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a loss function returns that logs values and has no loss."""
    return values.sum(), torch.ones((), dtype=torch.int, device=values.device), values


def token_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the token losses [mbs, seq] where the mask [mbs, seq] is 1."""
    mask = loss_mask.reshape(-1).float()
    return averaged((losses.reshape(-1).float() * mask).sum(), mask.sum())


class Job:
    """Pretraining. Another stage derives from it and overrides where it differs.

    Attributes:
        title: for reports.
        metrics: names of what the loss function logs beside the loss.
        sequences: that a sample has; 2 for a pair.
    """

    title = "pretraining"
    metrics: tuple[str, ...] = ()
    sequences = 1

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @classmethod
    def check(cls, config: TrainConfig) -> TrainConfig:
        """Refuse flags that this stage cannot follow; return the configuration with what follows from them."""
        return config

    def check_data(self, tokenizer: data.DatasetTokenizer) -> None:
        """Refuse data that is missing, damaged, or not for this stage."""
        data.check_prefixes(self.config, tokenizer)

    def build_datasets(self) -> list[data.MapDataset | None]:
        """Training, validation and test set; None where there is none. Collective."""
        return data.build_datasets(self.config)

    def collate(self, samples: list[dict[str, Any]]) -> MicroBatch:
        """Make a micro-batch of samples, on the CPU."""
        batch: MicroBatch = default_collate(samples)
        return {**batch, "index": [sample["index"] for sample in samples]}

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """Change this rank's GPTModels, initialised but not yet wrapped."""

    def begin(self, engine: Engine, datasets: list[data.MapDataset | None]) -> None:
        """What must be there before the first step; checkpoints are loaded after it. Collective."""

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        """The output of one chunk of the model for a micro-batch, and what makes a loss of the last one's."""
        output = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
        return output, functools.partial(token_loss, batch["loss_mask"])

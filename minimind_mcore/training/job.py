"""The parts of training that differ between stages: data, loss, and changes to the model."""

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
    """The inputs of a forward pass. A job sets only the keys that it reads.

    `tokens`, `labels`, `loss_mask` and `position_ids` are [sequences, length].

    Attributes:
        index: dataset index of each sample.
        cu_seqlens: start of each packed sample, and the end of the last.
        longest: length of the longest packed sample.
        reference: [pairs, 2] log-probabilities of the reference model.
        rows: the micro-batch of a reinforcement learning job.
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


# Function that megatron-core applies to a model's output: returns the summed loss, its divisor, and values to log.
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def averaged(total: Tensor, number: Tensor, *metrics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of a `LossFunction` from sums over a micro-batch and the number of summed items (tokens,
    pairs).

    megatron-core divides the loss of each micro-batch by its number of items. With `--calculate-per-token-loss` it
    divides once per step. `step.averages` divides the loss and the metrics of the log in the same way.
    """
    sums = [total.detach(), number.float(), *(metric.detach() for metric in metrics)]
    return total, number.to(torch.int), torch.stack(sums)


def measured(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of a `LossFunction` that logs values and has no loss."""
    return values.sum(), torch.ones((), dtype=torch.int, device=values.device), values


def token_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average the token losses [mbs, seq] where the mask [mbs, seq] is 1."""
    mask = loss_mask.reshape(-1).float()
    return averaged((losses.reshape(-1).float() * mask).sum(), mask.sum())


class Job:
    """The pretraining job. Other stages derive from it and override what differs.

    Attributes:
        title: name of the stage in reports.
        metrics: names of the values that the loss function logs besides the loss.
        sequences: number of sequences in a sample, 2 for a pair.
    """

    title = "pretraining"
    metrics: tuple[str, ...] = ()
    sequences = 1

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @classmethod
    def check(cls, config: TrainConfig) -> TrainConfig:
        """Refuse flags that this stage does not support, and return the configuration with derived values set."""
        return config

    def check_data(self, tokenizer: data.DatasetTokenizer) -> None:
        """Refuse data that is missing, damaged, or for another stage."""
        data.check_prefixes(self.config, tokenizer)

    def build_datasets(self) -> list[data.MapDataset | None]:
        """Build the training, validation and test set. A set that the run does not need is None. Collective."""
        return data.build_datasets(self.config)

    def collate(self, samples: list[dict[str, Any]]) -> MicroBatch:
        """Collate samples to a micro-batch, on the CPU."""
        batch: MicroBatch = default_collate(samples)
        return {**batch, "index": [sample["index"] for sample in samples]}

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """Modify this rank's GPTModels after initialization and before wrapping."""

    def begin(self, engine: Engine, datasets: list[data.MapDataset | None]) -> None:
        """Prepare the first step. Called before checkpoints are loaded. Collective."""

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        """Run one chunk of the model on a micro-batch. Return its output, and the loss function of the last chunk."""
        output = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
        return output, functools.partial(token_loss, batch["loss_mask"])

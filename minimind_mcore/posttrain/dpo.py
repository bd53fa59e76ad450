"""Direct preference optimization: pairs of a chosen and a rejected answer, with a frozen reference model.

`log p` is the summed log-probability of an answer's labels. `m` is the margin of the policy over the reference:
`(log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))`.

| --dpo-loss-type | loss of a pair                                                        | source                |
|-----------------|-----------------------------------------------------------------------|-----------------------|
| sigmoid         | -log sigmoid(beta m), smoothed by --dpo-label-smoothing                | DPO, arXiv 2305.18290 |
| hinge           | max(0, 1 - beta m)                                                     | SLiC, 2305.10425      |
| ipo             | (m - 1 / (2 beta))^2, log p a mean over the labels                     | IPO, 2310.12036       |
| simpo           | -log sigmoid(beta (m - gamma / beta)), mean log p and no reference     | SimPO, 2405.14734     |

`--pref-ftx` is the weight of an additional SFT loss: the mean negative log-probability of the chosen answer.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from minimind_mcore.errors import require
from minimind_mcore.models.wrappers import unwrap
from minimind_mcore.posttrain import data, reference
from minimind_mcore.posttrain.base import PostTraining, run_model
from minimind_mcore.posttrain.reference import FrozenModel
from minimind_mcore.training.config import ObjectiveSection, TrainConfig
from minimind_mcore.training.data import MapDataset
from minimind_mcore.training.job import LossFunction, MicroBatch, averaged, measured
from minimind_mcore.training.step import Engine

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


class DPO(PostTraining):
    """Preference optimization. A sample is a pair.

    The rows of a micro-batch are all its chosen answers, followed by all its rejected answers.
    """

    title = "preference optimisation"
    metrics = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    sequences = 2
    columns = data.PAIRWISE

    @classmethod
    @override
    def check(cls, config: TrainConfig) -> TrainConfig:
        config = super().check(config)
        live, ref_model = config.objective.reference_live, config.checkpoint.ref_model
        require(not config.data.neat_pack, "--neat-pack: pairwise data is not packed; leave the flag out")
        require(not live or bool(ref_model), "--reference-live needs --ref-model, the weights of the reference model")
        require(
            live or not (ref_model and config.model.lora_target_modules),
            "--ref-model with --lora-target-modules: the base model is the reference; leave --ref-model out, or give "
            "--reference-live",
        )
        require(
            not live or config.objective.dpo_loss_type != "simpo",
            "--reference-live with --dpo-loss-type simpo: simpo has no reference model; leave the flag out",
        )
        return config

    def begin(self, engine: Engine, datasets: list[MapDataset | None]) -> None:
        """Load the live reference model, or compute the reference log-probabilities of every pair of the run."""
        if self.config.objective.reference_live:
            self.reference = FrozenModel(self.config, str(self.config.checkpoint.ref_model))
        elif self.config.objective.dpo_loss_type != "simpo":
            reference.attach(Reference(self.config), engine, datasets)

    def collate(self, samples: list[dict[str, Any]]) -> MicroBatch:
        """Pad both answers of the pairs. `reference` [pairs, 2] has the reference's summed log-probabilities."""
        sides = ("chosen", "rejected")
        tokens = [sample[f"{side}_input_ids"] for side in sides for sample in samples]
        labels = [sample[f"{side}_labels"] for side in sides for sample in samples]
        batch = data.batch_of(tokens, labels, data.padded_length(max(map(len, tokens)), self.config))
        if "reference" in samples[0]:
            batch["reference"] = torch.from_numpy(np.stack([sample["reference"] for sample in samples]))
        return {**batch, "index": [sample["index"] for sample in samples]}

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        if self.config.objective.reference_live and unwrap(model).post_process:
            losses = self.reference(batch, batch["labels"])
            batch["reference"] = pair_log_probs(batch["loss_mask"], losses).t()
        return run_model(model, batch, labels=batch["labels"]), functools.partial(
            pair_loss, self.config.objective, batch
        )


class Reference(DPO):
    """A job without loss that logs the log-probabilities [2, pairs] of a micro-batch."""

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        output = run_model(model, batch, labels=batch["labels"])
        return output, lambda losses: measured(pair_log_probs(batch["loss_mask"], losses))


def pair_log_probs(loss_mask: Tensor, losses: Tensor) -> Tensor:
    """Return [2, pairs] summed log-probabilities of chosen and rejected, from the token losses [2 * pairs, length]."""
    return -(losses.float() * loss_mask).sum(1).view(2, -1)


def pair_loss(objective: ObjectiveSection, batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss, as a `LossFunction`: the mean over pairs. Rewards are beta (log p - log p_ref)."""
    mask = batch["loss_mask"]
    log_probs, lengths = pair_log_probs(mask, losses), mask.sum(1).view(2, -1)
    reference_log_probs = batch["reference"].t() if "reference" in batch else torch.zeros_like(log_probs)
    gained = log_probs - reference_log_probs
    if objective.dpo_loss_type in ("ipo", "simpo"):
        gained = gained / lengths
    total = (preference_losses(objective, gained[0] - gained[1]) - objective.pref_ftx * log_probs[0] / lengths[0]).sum()
    rewards = objective.dpo_beta * gained.detach()
    margins = rewards[0] - rewards[1]
    # torch.tensor would copy from the host and synchronize with the device.
    pairs = torch.full((), len(margins), device=losses.device)
    return averaged(total, pairs, rewards[0].sum(), rewards[1].sum(), (margins > 0).float().sum(), margins.sum())


def preference_losses(objective: ObjectiveSection, margins: Tensor) -> Tensor:
    """Return the losses [pairs] of the module's table, from the margins m [pairs]."""
    beta, smoothing = objective.dpo_beta, objective.dpo_label_smoothing
    if objective.dpo_loss_type == "hinge":
        return torch.relu(1 - beta * margins)
    if objective.dpo_loss_type == "ipo":
        return (margins - 1 / (2 * beta)).square()
    if objective.dpo_loss_type == "simpo":
        margins = margins - objective.gamma_beta_ratio
    return -(1 - smoothing) * F.logsigmoid(beta * margins) - smoothing * F.logsigmoid(-beta * margins)

"""The forward passes and losses of the ranks: log-probabilities, the actor's loss, values and the critic's loss.

Each is a `Job` of the training package, so that megatron-core's schedules run it in any layout.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimind_mcore.models.wrappers import output_only_at, unwrap
from minimind_mcore.posttrain import lora
from minimind_mcore.rl.algorithms.actor import actor_loss
from minimind_mcore.rl.algorithms.losses import aggregate, value_loss
from minimind_mcore.rl.algorithms.masked import masked_mean
from minimind_mcore.rl.algorithms.table import Algorithm
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime import router_replay
from minimind_mcore.rl.runtime.batch import Batch
from minimind_mcore.rl.runtime.vocab_parallel import log_probs_and_entropy
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.job import Job, LossFunction, MicroBatch, averaged, measured

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import MegatronModule


def micro_batch(rows: Batch, unit: int = 1) -> MicroBatch:
    """Return a micro-batch of rows, without their index. The length is padded to a multiple of `unit`."""
    length = -(-rows.tokens.shape[1] // unit) * unit
    rows = rows.cut(length)
    positions = torch.arange(length, device=rows.tokens.device).expand(len(rows), -1)
    return {"rows": rows, "tokens": rows.tokens, "position_ids": positions}


def predicting(rows: Batch) -> tuple[Tensor, Tensor]:
    """Return row and position of the logits that predict each response token, [tokens of all responses] each."""
    row = torch.arange(len(rows), device=rows.tokens.device)[:, None].expand(-1, rows.width)
    inside = rows.mask.bool()
    return row[inside], rows.response_positions[inside] - 1


class ResponseJob(Job):
    """Runs the model on prompts and responses, and selects the outputs that predict the response tokens."""

    def __init__(self, training: TrainConfig, temperature: float = 1.0) -> None:
        super().__init__(training)
        self.temperature = temperature
        self.micro_batches = 1  # number of micro-batches that this rank runs per mini-batch

    def run(self, micro: MicroBatch, model: MegatronModule) -> Tensor:
        """Return the output of one chunk. The last chunk returns [tokens of the responses, outputs]."""
        chunk, rows = unwrap(model), micro["rows"]
        if self.config.model.num_experts:
            self._replay(chunk, rows)
        if not chunk.post_process:
            output: Tensor = model(micro["tokens"], micro["position_ids"], None)
            return output
        # Sequence parallelism splits the positions over the ranks, and the output layer gathers them first.
        early = not chunk.config.sequence_parallel
        row, place = predicting(rows)
        with output_only_at(place * len(rows) + row, chunk) if early else contextlib.nullcontext():
            output = model(micro["tokens"], micro["position_ids"], None)
        return output.flatten(0, 1) if early else output[row, place]

    def _replay(self, chunk: Any, rows: Batch) -> None:
        from megatron.core import parallel_state

        split = self.config.parallel.sequence_parallel
        rank = parallel_state.get_tensor_model_parallel_rank() if split else 0
        router_replay.replay(chunk, rows, rank, self.config.layout.tp if split else 1)

    def log_probs(self, rows: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p and entropy [rows, T] of the responses, 0 after their end, from logits [tokens, vocabulary /
        TP]."""
        from megatron.core import parallel_state

        split = parallel_state.get_tensor_model_parallel_world_size() > 1
        group = parallel_state.get_tensor_model_parallel_group() if split else None
        inside = rows.mask.bool()
        found = log_probs_and_entropy(logits, rows.responses[inside], self.temperature, group)
        logp, entropy = (torch.zeros_like(rows.mask).masked_scatter(inside, values) for values in found)
        return logp, entropy


class LogProbs(ResponseJob):
    """Logs log-probabilities and entropies [2, rows, T]. Has no loss."""

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        output = self.run(batch, model)
        return output, lambda logits: measured(torch.stack(self.log_probs(batch["rows"], logits)))


# `actor_loss` returns these metrics as shares of the mini-batch. All others are means over the micro-batch.
SHARES = ("actor/pg_loss", "actor/kl_loss", "actor/entropy")


class Actor(ResponseJob):
    """The actor's loss.

    Each micro-batch is divided by `total`, the denominator of the mini-batch, or by `tokens`, its number of response
    tokens. The losses and metrics of all micro-batches and data-parallel ranks therefore add up to those of the
    mini-batch, independent of the micro-batch size.
    """

    title = "policy"

    def __init__(self, training: TrainConfig, config: Config, algorithm: Algorithm) -> None:
        sampling, minimind = config.generate.sampling_config, config.minimind
        super().__init__(training, float(sampling.temperature))
        self.algorithm, self.kl_coef, self.entropy_coef = algorithm, algorithm.kl_coef, config.rl.entropy_coeff
        self.tis_cap = minimind.rollout_correction_cap if minimind.rollout_correction == "tis" else None
        self.length, self.replays = sampling.max_tokens, minimind.router_replay
        self.total: Tensor | None = None
        self.tokens: Tensor | None = None
        self.metrics = ("actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy", "rollout/logp_diff")
        self.metrics += ("actor/kl_loss",) if algorithm.kl == "loss" else ()
        self.metrics += ("actor/pg_clipfrac_lower",) if algorithm.dual_clip is not None else ()
        self.metrics += ("actor/tis_weight", "actor/tis_clipfrac") if self.tis_cap is not None else ()

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """Prepare the routers for `minimind.router_replay`. With LoRA: load the weights of the base, add adapters."""
        if self.replays:
            router_replay.attach(chunks)
        if self.config.model.lora_target_modules:
            lora.begin(self.config, chunks)

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        return self.run(batch, model), functools.partial(self.loss, batch["rows"])

    def loss(self, rows: Batch, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss, as a `LossFunction`."""
        logp, entropy = self.log_probs(rows, logits)
        assert rows.advantages is not None
        loss, stats = actor_loss(
            self.algorithm, logp, rows.advantages, rows.mask,
            old_logp=rows.old_logp, ref_logp=rows.ref_logp, rollout_logp=rows.rollout_logp,
            entropy=entropy if self.entropy_coef else entropy.detach(), entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef, tis_cap=self.tis_cap, length=self.length, total=self.total, tokens=self.tokens,
            taught=rows.taught,
        )  # fmt: skip
        apart = torch.zeros_like(logp) if rows.rollout_logp is None else (logp.detach() - rows.rollout_logp).abs()
        stats["rollout/logp_diff"] = masked_mean(apart, rows.mask)
        # megatron-core averages over micro-batches and data-parallel ranks; the factor turns the average into a sum.
        parts = self.micro_batches * self.config.layout.dp
        share = 1.0 / parts if self.tokens is None else rows.mask.sum() / self.tokens
        scaled = [stats[name] * parts * (1.0 if name in SHARES else share) for name in self.metrics]
        return averaged(loss * parts, torch.ones((), device=loss.device), *scaled)


class Values(ResponseJob):
    """The critic: a model with one output, the value of the state before each token."""

    title = "critic"

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """Replace the output layer by a value head."""
        for chunk in chunks:
            if chunk.post_process:
                chunk.output_layer = ValueHead(chunk.config)  # pyright: ignore[reportAttributeAccessIssue]

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        """Log the values [rows, T]."""
        return self.run(batch, model), lambda output: measured(self.values(batch["rows"], output))

    def values(self, rows: Batch, output: Tensor) -> Tensor:
        """Return the values [rows, T], 0 after the end of the responses."""
        return torch.zeros_like(rows.mask).masked_scatter(rows.mask.bool(), output.float().squeeze(-1))


class Critic(Values):
    """The critic's loss."""

    metrics = ("critic/vf_loss", "critic/vf_clipfrac")

    def __init__(self, config: TrainConfig, clip: float) -> None:
        super().__init__(config)
        self.clip = clip
        self.total: Tensor | None = None

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        return self.run(batch, model), functools.partial(self.loss, batch["rows"])

    def loss(self, rows: Batch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss, as a `LossFunction`."""
        assert rows.values is not None and rows.returns is not None
        tokens, stats = value_loss(self.values(rows, output), rows.values, rows.returns, rows.mask, self.clip)
        trained = tokens if rows.taught is None else tokens * rows.taught[:, None]
        loss = aggregate(trained, rows.mask, total=self.total)
        parts = self.micro_batches * self.config.layout.dp
        share = 1.0 / parts if self.total is None else rows.mask.sum() / self.total
        cut = stats["critic/vf_clipfrac"] * parts * share
        return averaged(loss * parts, torch.ones((), device=loss.device), loss * parts, cut)


class ValueHead(torch.nn.Module):
    """One output per position, in place of megatron-core's output layer. Replicated on the tensor-parallel ranks."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        # All values start at 0, so that the first advantages are the rewards.
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=torch.float32))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, weight: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        """[length, rows, 1] from [length (/ TP), rows, hidden]."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        values = torch.nn.functional.linear(hidden.float(), self.weight.float())
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None

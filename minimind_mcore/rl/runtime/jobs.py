"""What the ranks compute with a model: log-probabilities, the actor's loss, values and the critic's loss.

Each is a `Job` of the training package: megatron-core's schedules run it in any layout.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimind_mcore.models.wrappers import unwrap
from minimind_mcore.rl.algorithms.actor import actor_loss
from minimind_mcore.rl.algorithms.losses import aggregate, value_loss
from minimind_mcore.rl.algorithms.masked import masked_mean
from minimind_mcore.rl.algorithms.table import Algorithm
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime.batch import Batch
from minimind_mcore.rl.runtime.vocab_parallel import log_probs_and_entropy
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.job import Job, LossFunction, MicroBatch, averaged, measured

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import MegatronModule


def micro_batch(rows: Batch, unit: int = 1) -> MicroBatch:
    """What the schedules pass on for some rows, without their index; their length is made a multiple of `unit`."""
    length = -(-rows.tokens.shape[1] // unit) * unit
    rows = rows.cut(length)
    positions = torch.arange(length, device=rows.tokens.device).expand(len(rows), -1)
    return {"rows": rows, "tokens": rows.tokens, "position_ids": positions}


@contextlib.contextmanager
def _only(places: Tensor, layer: Any, picks: bool) -> Iterator[None]:
    """Inside, an output layer sees only some of the positions: those of [length * rows] that `places` lists."""

    def pick(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # megatron-core has [length, rows, hidden]
        return (inputs[0].flatten(0, 1).index_select(0, places).unsqueeze(1), *inputs[1:])

    handle = layer.register_forward_pre_hook(pick) if picks else None
    yield
    if handle is not None:
        handle.remove()


def predicting(rows: Batch) -> tuple[Tensor, Tensor]:
    """Row and position of what predicts each token of the responses, [tokens of all responses] each."""
    row = torch.arange(len(rows), device=rows.tokens.device)[:, None].expand(-1, rows.width)
    inside = rows.mask.bool()
    return row[inside], rows.places[inside] - 1


class ResponseJob(Job):
    """Runs the model on prompts and responses, and takes what it says before each token of the responses."""

    def __init__(self, training: TrainConfig, temperature: float = 1.0) -> None:
        super().__init__(training)
        self.temperature = temperature
        self.micro_batches = 1  # of this rank's part of the present mini-batch

    def run(self, micro: MicroBatch, model: MegatronModule) -> Tensor:
        """The output of one chunk; of the last one [tokens of the responses, outputs]."""
        chunk, rows = unwrap(model), micro["rows"]
        if not chunk.post_process:
            output: Tensor = model(micro["tokens"], micro["position_ids"], None)
            return output
        # Sequence parallelism has cut the positions over the ranks: the layer gathers them first.
        early = not self.config.parallel.sequence_parallel
        row, place = predicting(rows)
        with _only(place * len(rows) + row, chunk.output_layer, early):
            output = model(micro["tokens"], micro["position_ids"], None)
        return output.flatten(0, 1) if early else output[row, place]

    def log_probs(self, rows: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """log p and entropy [rows, T] of the responses, 0 behind their end, from logits [tokens, vocabulary / TP]."""
        from megatron.core import parallel_state

        split = parallel_state.get_tensor_model_parallel_world_size() > 1
        group = parallel_state.get_tensor_model_parallel_group() if split else None
        inside = rows.mask.bool()
        found = log_probs_and_entropy(logits, rows.responses[inside], self.temperature, group)
        logp, entropy = (torch.zeros_like(rows.mask).masked_scatter(inside, values) for values in found)
        return logp, entropy


class LogProbs(ResponseJob):
    """Logs log-probabilities and entropies [2, rows, T], and has no loss."""

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        output = self.run(batch, model)
        return output, lambda logits: measured(torch.stack(self.log_probs(batch["rows"], logits)))


# `actor_loss` returns these as this part's share of the mini-batch. All others are means over this part's tokens.
SHARES = ("actor/pg_loss", "actor/kl_loss", "actor/entropy")


class Actor(ResponseJob):
    """The policy's loss.

    The losses of all micro-batches and data-parallel ranks add up to that of the mini-batch, however it is cut:
    each is divided by `total`, the mini-batch's denominator, or by `tokens`, its number of response tokens. So do the
    metrics.
    """

    title = "policy"

    def __init__(self, training: TrainConfig, config: Config, algorithm: Algorithm) -> None:
        sampling, minimind = config.generate.sampling_config, config.minimind
        super().__init__(training, float(sampling.temperature))
        self.algorithm, self.kl_coef, self.entropy_coef = algorithm, algorithm.kl_coef, config.rl.entropy_coeff
        self.tis_cap = minimind.rollout_correction_cap if minimind.rollout_correction == "tis" else None
        self.length = sampling.max_tokens
        self.total: Tensor | None = None
        self.tokens: Tensor | None = None
        self.metrics = ("actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy", "rollout/logp_diff")
        self.metrics += ("actor/kl_loss",) if algorithm.kl == "loss" else ()
        self.metrics += ("actor/pg_clipfrac_lower",) if algorithm.dual_clip is not None else ()
        self.metrics += ("actor/tis_weight", "actor/tis_clipfrac") if self.tis_cap is not None else ()

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        return self.run(batch, model), functools.partial(self.loss, batch["rows"])

    def loss(self, rows: Batch, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A `LossFunction`."""
        logp, entropy = self.log_probs(rows, logits)
        assert rows.advantages is not None
        loss, stats = actor_loss(
            self.algorithm, logp, rows.advantages, rows.mask,
            old_logp=rows.old_logp, ref_logp=rows.ref_logp, rollout_logp=rows.rollout_logp,
            entropy=entropy if self.entropy_coef else entropy.detach(), entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef, tis_cap=self.tis_cap, length=self.length, total=self.total, tokens=self.tokens,
        )  # fmt: skip
        apart = torch.zeros_like(logp) if rows.rollout_logp is None else (logp.detach() - rows.rollout_logp).abs()
        stats["rollout/logp_diff"] = masked_mean(apart, rows.mask)
        # megatron-core takes the mean over micro-batches and data-parallel ranks.
        parts = self.micro_batches * self.config.layout.dp
        share = 1.0 / parts if self.tokens is None else rows.mask.sum() / self.tokens
        scaled = [stats[name] * parts * (1.0 if name in SHARES else share) for name in self.metrics]
        return averaged(loss * parts, torch.ones((), device=loss.device), *scaled)


class Values(ResponseJob):
    """The critic: a model whose output is one number, the value of what comes before each token."""

    title = "critic"

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """A value head in place of the output layer."""
        for chunk in chunks:
            if chunk.post_process:
                chunk.output_layer = ValueHead(chunk.config)  # pyright: ignore[reportAttributeAccessIssue]

    def forward_step(self, batch: MicroBatch, model: MegatronModule) -> tuple[Tensor, LossFunction]:
        """Logs the values [rows, T]."""
        return self.run(batch, model), lambda output: measured(self.values(batch["rows"], output))

    def values(self, rows: Batch, output: Tensor) -> Tensor:
        """[rows, T], 0 behind the responses' end."""
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
        """A `LossFunction`."""
        assert rows.values is not None and rows.returns is not None
        tokens, stats = value_loss(self.values(rows, output), rows.values, rows.returns, rows.mask, self.clip)
        loss = aggregate(tokens, rows.mask, total=self.total)
        parts = self.micro_batches * self.config.layout.dp
        share = 1.0 / parts if self.total is None else rows.mask.sum() / self.total
        cut = stats["critic/vf_clipfrac"] * parts * share
        return averaged(loss * parts, torch.ones((), device=loss.device), loss * parts, cut)


class ValueHead(torch.nn.Module):
    """One number for each position, in place of megatron-core's output layer; whole on every tensor-parallel rank."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        # A value of 0 everywhere to begin with: the first advantages are the rewards.
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=torch.float32))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, weight: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        """[length, rows, 1] from [length (/ TP), rows, hidden]."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        values = torch.nn.functional.linear(hidden.float(), self.weight.float())
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None

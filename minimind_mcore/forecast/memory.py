"""Memory of one rank in bytes, by purpose.

Weights, gradients and optimizer states are counted exactly, except for alignment. Activations are the tensors that the
backward pass keeps; tests compare them with the tensors that autograd saves. Activations are allocated and freed in
each step, so the allocator reserves more than is live at any time. The ratio is measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.forecast.machines import Machine
from minimind_mcore.inputs.flags import fields_from
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform.fused.attention import SHORT, block_size

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of a rank in training. The fields after `sequences` have the names of Megatron's flags.

    Attributes:
        layout: layout of the run, with its world size.
        sequences: sequences of a sample, 2 for a preference pair.
        reference_live: the ranks of the last pipeline stage also hold the reference model, split only by TP. The
            forecast adds it to every rank.
    """

    model: ModelConfig
    layout: ParallelLayout
    sequences: int = 1
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    num_microbatches: int
    bf16: bool
    fp16: bool
    accumulate_allreduce_grads_in_fp32: bool
    use_distributed_optimizer: bool
    sequence_parallel: bool
    optimizer: str
    sgd_momentum: float
    recompute_granularity: str | None
    lora_target_modules: list[str]
    lora_r: int
    reference_live: bool = False

    @classmethod
    def from_flags(
        cls, flags: Mapping[str, object], layout: ParallelLayout, model: ModelConfig, sequences: int = 1
    ) -> Workload:
        """Return the workload of validated flags."""
        return cls(**fields_from(cls, {**flags, "model": model, "layout": layout, "sequences": sequences}))

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.bf16 or self.fp16 else 4

    @property
    def gradient_width(self) -> int:
        """Bytes of a gradient."""
        return 4 if self.accumulate_allreduce_grads_in_fp32 else self.width

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.seq_length * self.micro_batch_size * self.sequences

    @property
    def trained(self) -> tuple[int, int]:
        """Trained parameters of a rank: those outside the routed experts (or adapters), and those in routed experts."""
        if self.lora_target_modules:
            adapters = (self.lora_r, self.lora_target_modules)
            return self.model.num_adapter_parameters(*adapters, self.layout.tp, self.layout.pp), 0
        return rank_parameters(self.model, self.layout)

    @property
    def shards(self) -> tuple[int, int]:
        """Numbers of ranks that share the optimizer states: outside the routed experts, and in the routed experts."""
        dp = self.layout.dp if self.use_distributed_optimizer else 1
        return dp, max(1, dp // self.layout.ep)


@functools.lru_cache
def rank_parameters(model: ModelConfig, layout: ParallelLayout) -> tuple[int, int]:
    """Return two parameter counts of the largest rank: outside the routed experts, and in the routed experts."""
    shapes = weights.mcore_shapes(model)
    counts: dict[str, list[int]] = {}
    for name, parts in layout.parts(model).items():
        for part in parts:
            size = math.prod(part.shape(name, shapes[name], layout.tp))
            counts.setdefault(part.folder, [0, 0])[".experts." in name] += size
    dense, experts = max(counts.values(), key=sum)
    return dense, experts


def of_training(work: Workload, machine: Machine) -> dict[str, float]:
    """Return the bytes of a rank in training. A teacher is not included."""
    held = sum(rank_parameters(work.model, work.layout))
    dense, experts = work.trained
    stored = dense / work.shards[0] + experts / work.shards[1]
    moments = 8 if work.optimizer == "adam" else 4 if work.sgd_momentum else 0
    reference = work.model.num_parameters() // work.layout.tp * work.width if work.reference_live else 0
    kept, logits = _kept(work, machine)
    fragments = (fragmentation(work, machine) - 1) * (kept + logits)
    copies = _collective_copies(work) if machine.kind == "cpu" else 0.0
    return {
        "weights": (held + (dense if work.lora_target_modules else 0)) * work.width,
        "gradients": (dense + experts) * work.gradient_width,
        "master weights": stored * (4 if work.width == 2 else 0),
        "moments": stored * moments,
        "activations": kept,
        "logits": logits,
        **({"reference": reference} if reference else {}),
        **({"collectives": copies} if copies else {}),
        **({"fragmentation": fragments} if fragments else {}),
    }


def fragmentation(work: Workload, machine: Machine) -> float:
    """Return the bytes that the allocator reserves per byte of activations and logits."""
    if work.model.moe:
        return machine.fragmentation_moe
    return machine.fragmentation if work.layout.tp == 1 else machine.fragmentation_tp


def _collective_copies(work: Workload) -> float:
    """Return the bytes of gloo's copies in a collective over the data-parallel ranks.

    The all-gather of weights copies the rank's shard and the result. Without the distributed optimizer, the all-reduce
    copies the gradients. A group of one rank communicates nothing.
    """
    dp, ep = work.layout.dp, work.layout.ep
    copies = 0.0
    for parameters, ranks in zip(work.trained, (dp, dp // ep), strict=True):
        if ranks > 1:
            gathered = parameters * work.width * (1 + 1 / ranks)
            copies += gathered if work.use_distributed_optimizer else parameters * work.gradient_width
    return copies


def _kept(work: Workload, machine: Machine) -> tuple[float, float]:
    """Return the bytes of activations and of logits on the pipeline stage that needs more.

    The first stage keeps the activations of the most micro-batches. The last stage also has the logits.
    """
    layout, v = work.layout, work.layout.vpp or 1
    layer = layer_activations(work, machine) * work.tokens * work.width
    if work.recompute_granularity == "full":  # each layer keeps only its input, and one layer at a time is recomputed
        again, layer = layer, work.model.hidden_size * work.tokens * work.width
    else:
        again = 0.0
    chunk = layer * work.model.num_layers / (layout.pp * v)
    # Megatron's schedules: 1F1B, and interleaved 1F1B with its warm-up of 2 (p - 1) + (v - 1) p chunks.
    warm_up = layout.pp - 1 if v == 1 else 2 * (layout.pp - 1) + (v - 1) * layout.pp
    first = chunk * min(warm_up + 1, work.num_microbatches * v) + again
    logits = logits_bytes(work, machine)
    if layout.pp == 1:
        return first, logits
    last = chunk * v + again
    return (first, 0.0) if first > last + logits else (last, logits)


def layer_activations(work: Workload, machine: Machine) -> float:
    """Return the number of values per token that the backward pass of one layer keeps on a rank.

    These are the hidden vectors (inputs of norms and products), the projections of attention before and after the
    rotation, the attention's output, and for the MLP gate, up and their product. Experts also keep sorted copies of
    their tokens' hidden vectors.
    """
    model, tp = work.model, work.layout.tp
    heads, groups = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden = machine.hidden_vectors_compiled if compiles(work) else machine.hidden_vectors
    mlp = model.ffn_hidden_size
    if model.moe:
        mlp = model.moe.topk * model.moe.ffn_hidden_size + model.moe.shared_ffn_hidden_size
        hidden += 5 * model.moe.topk
    split = 3.0 * (heads + groups + mlp)
    if machine.kind == "cpu" and work.seq_length <= SHORT:
        # The backward pass keeps the softmax, except for blocks above the diagonal.
        split += model.num_heads * (work.seq_length + block_size(work.width)) / 2
    return hidden * model.hidden_size / (tp if work.sequence_parallel else 1) + split / tp


def compiles(work: Workload) -> bool:
    """Return whether devices that compile layers also do so in this training (platform/fused/compiled.py)."""
    plain = work.model.moe is None and not work.lora_target_modules and not work.recompute_granularity
    return plain and work.layout.tp == 1


def logits_bytes(work: Workload, machine: Machine) -> float:
    """Return the bytes of a micro-batch's logits and their copies in the loss.

    In fp32 the loss and the gradient overwrite the logits: 4 bytes per logit. In half precision a CPU keeps the logits
    and their gradient: 2 + 2 bytes. It converts only a few rows to fp32 at a time (platform/fused/cross_entropy.py).
    Other devices are counted with fp32 copies of both as well: 4 + 4 bytes more. The other numbers of these devices
    were fitted to measured peaks with this count.
    """
    width = 12 if work.width == 2 and machine.kind != "cpu" else 4
    return work.tokens * work.model.vocab_size / work.layout.tp * width


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The rollouts of one step of reinforcement learning, on one device that generates.

    Attributes:
        responses: number of responses that the device generates in a step.
        prompt_length, response_length: maximum lengths in tokens.
        at_once: number of responses that are generated concurrently.
        reference: a rank also holds the reference model.
        updates: number of weight updates in a step.
        apart: the engines have devices of their own.
        copies: copies of the trained weights that a rank keeps, because rollouts may be from
            weights of earlier steps.
    """

    responses: int
    prompt_length: int
    response_length: int
    at_once: int
    reference: bool = True
    updates: int = 1
    apart: bool = False
    copies: int = 0

    @property
    def rows(self) -> int:
        """Number of responses that are generated concurrently."""
        return min(self.responses, self.at_once)


def cache_bytes_per_token(model: ModelConfig, width: int) -> int:
    """Return the bytes of the keys and values of one token."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * width


def of_engine(work: Workload, rollouts: Rollouts) -> dict[str, float]:
    """Return the bytes of a rollout engine and its cache."""
    length = rollouts.prompt_length + rollouts.response_length
    return {
        "rollout engine": work.model.num_parameters() * work.width,
        "KV cache": rollouts.rows * length * cache_bytes_per_token(work.model, work.width),
    }


def of_rl(work: Workload, machine: Machine, rollouts: Rollouts) -> dict[str, float]:
    """Return the bytes of a rank in reinforcement learning, and of its rollout engine if both share the device."""
    length = rollouts.prompt_length + rollouts.response_length
    return {
        **of_training(work, machine),
        "reference": sum(rank_parameters(work.model, work.layout)) * work.width if rollouts.reference else 0,
        **({"copies of weights": rollouts.copies * sum(work.trained) * work.width} if rollouts.copies else {}),
        **({} if rollouts.apart else of_engine(work, rollouts)),
        # Ids and positions (int64), a mask, and log-probabilities of policy, engine and reference, advantages (fp32).
        "rollouts": rollouts.responses * length * (2 * 8 + 1 + 4 * 4),
    }

"""Memory of one rank, in bytes, by what it is for.

Weights, gradients and the optimizer's states are counted exactly, but for alignment. Activations are what a backward
pass keeps; tests compare them with the tensors that autograd saves. They come and go in each step, so the allocator
holds more than is live at a time; that factor is measured.
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
from minimind_mcore.platform.fused.attention import BLOCK, SHORT

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the ranks of a training do. The fields after `sequences` have the names of Megatron's flags.

    Attributes:
        layout: of a run, with its world size.
        sequences: of a sample; 2 for a preference pair.
        reference_live: every rank also holds the whole reference model, cut by TP only.
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
        """Return the workload that validated flags describe."""
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
        """Parameters of a rank that learn: those of the dense part, or adapters, and those of routed experts."""
        if self.lora_target_modules:
            adapters = (self.lora_r, self.lora_target_modules)
            return self.model.num_adapter_parameters(*adapters, self.layout.tp, self.layout.pp), 0
        return rank_parameters(self.model, self.layout)

    @property
    def shards(self) -> tuple[int, int]:
        """Ranks that share the optimizer's states of the dense part, and of the routed experts."""
        dp = self.layout.dp if self.use_distributed_optimizer else 1
        return dp, max(1, dp // self.layout.ep)


@functools.lru_cache
def rank_parameters(model: ModelConfig, layout: ParallelLayout) -> tuple[int, int]:
    """Parameters of the rank that has most: outside the routed experts, and in them."""
    shapes = weights.mcore_shapes(model)
    counts: dict[str, list[int]] = {}
    for name, parts in layout.parts(model).items():
        for part in parts:
            size = math.prod(part.shape(name, shapes[name], layout.tp))
            counts.setdefault(part.folder, [0, 0])[".experts." in name] += size
    dense, experts = max(counts.values(), key=sum)
    return dense, experts


def of_training(work: Workload, machine: Machine) -> dict[str, float]:
    """Bytes of a rank of a training. A teacher comes on top."""
    held = sum(rank_parameters(work.model, work.layout))
    dense, experts = work.trained
    stored = dense / work.shards[0] + experts / work.shards[1]
    moments = 8 if work.optimizer == "adam" else 4 if work.sgd_momentum else 0
    reference = work.model.num_parameters() // work.layout.tp * work.width if work.reference_live else 0
    kept, logits = _kept(work, machine)
    factor = machine.fragmentation_moe if work.model.moe else machine.fragmentation
    fragments = (factor - 1) * (kept + logits)
    return {
        "weights": (held + (dense if work.lora_target_modules else 0)) * work.width,
        "gradients": (dense + experts) * work.gradient_width,
        "master weights": stored * (4 if work.width == 2 else 0),
        "moments": stored * moments,
        "activations": kept,
        "logits": logits,
        **({"reference": reference} if reference else {}),
        **({"fragmentation": fragments} if fragments else {}),
    }


def _kept(work: Workload, machine: Machine) -> tuple[float, float]:
    """Bytes of activations and logits: of the first stage, which has most micro-batches in flight, or of the last."""
    layout, v = work.layout, work.layout.vpp or 1
    layer = layer_activations(work, machine) * work.tokens * work.width
    if work.recompute_granularity == "full":  # each layer keeps its input; one layer at a time is computed again
        again, layer = layer, work.model.hidden_size * work.tokens * work.width
    else:
        again = 0.0
    chunk = layer * work.model.num_layers / (layout.pp * v)
    # Megatron's schedules: 1F1B, and interleaved 1F1B with its warm-up of 2 (p - 1) + (v - 1) p chunks.
    warm_up = layout.pp - 1 if v == 1 else 2 * (layout.pp - 1) + (v - 1) * layout.pp
    first = chunk * min(warm_up + 1, work.num_microbatches * v) + again
    logits = logits_bytes(work)
    if layout.pp == 1:
        return first, logits
    last = chunk * v + again
    return (first, 0.0) if first > last + logits else (last, logits)


def layer_activations(work: Workload, machine: Machine) -> float:
    """Values that the backward pass of one layer keeps, for each token of a rank.

    Hidden vectors (inputs of norms and products), the projections of attention before and after the rotation, its
    output, and of the MLP gate, up and their product. Experts also keep their tokens' hidden vectors, sorted.
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
        # The backward pass keeps the softmax, without the blocks above the diagonal.
        split += heads + model.num_heads * (work.seq_length + BLOCK) / 2
    return hidden * model.hidden_size / (tp if work.sequence_parallel else 1) + split / tp


def compiles(work: Workload) -> bool:
    """Whether a device that compiles layers compiles those of this training (platform/fused/compiled.py)."""
    plain = work.model.moe is None and not work.lora_target_modules and not work.recompute_granularity
    return plain and work.layout.tp == 1


def logits_bytes(work: Workload) -> float:
    """Bytes of the logits of a micro-batch and of what the loss makes of them.

    In fp32 the loss and its gradient are computed in the memory of the logits. In half precision there are the logits
    and their gradient, each in half precision and in fp32.
    """
    return work.tokens * work.model.vocab_size / work.layout.tp * (12 if work.width == 2 else 4)


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The rollouts of one step of reinforcement learning, on one device of those that generate.

    Attributes:
        responses: that the device writes in a step.
        prompt_length, response_length: at most, in tokens.
        at_once: responses that are written together.
        reference: a rank also holds the reference model.
        updates: of the weights in a step.
    """

    responses: int
    prompt_length: int
    response_length: int
    at_once: int
    reference: bool = True
    updates: int = 1

    @property
    def rows(self) -> int:
        """Responses that are written together."""
        return min(self.responses, self.at_once)


def cache_bytes_per_token(model: ModelConfig, width: int) -> int:
    """Bytes of keys and values of one token."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * width


def of_rl(work: Workload, machine: Machine, rollouts: Rollouts) -> dict[str, float]:
    """Bytes of a device of reinforcement learning: policy, reference, rollout engine and its cache, rollouts."""
    length = rollouts.prompt_length + rollouts.response_length
    return {
        **of_training(work, machine),
        "reference": sum(rank_parameters(work.model, work.layout)) * work.width if rollouts.reference else 0,
        "rollout engine": work.model.num_parameters() * work.width,
        "KV cache": rollouts.rows * length * cache_bytes_per_token(work.model, work.width),
        # Ids and positions (int64), a mask, and log-probabilities of policy, engine and reference, advantages (fp32).
        "rollouts": rollouts.responses * length * (2 * 8 + 1 + 4 * 4),
    }

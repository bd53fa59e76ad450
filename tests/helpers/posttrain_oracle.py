"""What the tests of post-training share: the runs they compare, the samples of a run, and the oracle's loss of SFT."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.engine import layout, worst_difference
from helpers.twin import Hyper

STEPS, MICRO_BATCH, BATCH, SEED, SEQUENCE = 10, 2, 4, 1234, 72
MODEL = "minimind3_tiny"
HYPER = Hyper(
    lambda step: 1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step + 1) / STEPS))), 0.01, (0.9, 0.999), lambda p: True
)
FLAGS = {
    "train_iters": STEPS, "micro_batch_size": MICRO_BATCH, "global_batch_size": BATCH, "seq_length": SEQUENCE,
    "lr_at_iteration_end": True, "decay_all": True, "weight_decay": 0.01, "seed": SEED, "init_method_std": 0.05,
}  # fmt: skip
Sample = dict[str, Tensor]
DYNAMIC = {"no_pad_to_seq_lengths": True}
PACKED = {"reset_attention_mask": True, "neat_pack": True}

# name: processes, flags of the layout
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, layout()),
    "TP2": (2, layout(tp=2)),
    "TP2 SP": (2, layout(tp=2, sequence_parallel=True)),
    "PP2": (2, layout(pp=2)),
    "DP2": (2, layout(use_distributed_optimizer=True)),
}


def read_column(prefix: Path, name: str) -> list[Tensor]:
    """The samples of one pair of files, read by the definition of the format."""
    raw = Path(f"{prefix}_packed_{name}_document.idx").read_bytes()
    lengths = np.frombuffer(raw, np.int32, int.from_bytes(raw[18:26], "little"), offset=34)
    numbers = torch.from_numpy(np.fromfile(f"{prefix}_packed_{name}_document.bin", np.int32)).long()
    return list(numbers.split(lengths.tolist()))


def samples_in_order(prefix: Path, *names: str) -> list[Sample]:
    """What a run reads: epochs, each shuffled anew by one generator."""
    columns = {name: read_column(prefix, name) for name in names}
    count, generator, order = len(columns[names[0]]), np.random.RandomState(SEED), []
    while len(order) < STEPS * BATCH:
        epoch = np.arange(count)
        generator.shuffle(epoch)
        order += epoch.tolist()
    return [{n: column[i][:SEQUENCE] for n, column in columns.items()} | {"number": torch.tensor(i)} for i in order]


def in_steps(samples: list[Sample], micro_batch: int = MICRO_BATCH) -> list[list[list[Sample]]]:
    """Micro-batches of each step."""
    micros = [samples[i : i + micro_batch] for i in range(0, STEPS * BATCH, micro_batch)]
    return [micros[i : i + BATCH // micro_batch] for i in range(0, len(micros), BATCH // micro_batch)]


def unpacked(sample: Sample) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of the samples in a packed one."""
    numbers = sample["attention_mask"]
    return [(sample["input_ids"][numbers == n], sample["labels"][numbers == n]) for n in numbers.unique()]


def parts_of(micro: list[Sample]) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of every sample of a micro-batch."""
    return [part for sample in micro for part in unpacked(sample)]


def logits_of(twin: Any, tokens: Tensor) -> Tensor:
    """[length, vocabulary] of one sample."""
    logits: Tensor = twin(tokens[None], use_cache=False).logits[0]
    return logits


def sft_loss(twin: Any, micro: list[Sample], weights_of: Callable[[Tensor], Tensor] = torch.ones_like) -> Any:
    """Mean over the labels of a micro-batch."""
    total, count = torch.zeros(()), 0
    for tokens, labels in parts_of(micro):
        losses = F.cross_entropy(logits_of(twin, tokens)[:-1], labels[1:], reduction="none", ignore_index=-100)
        total = total + (losses * weights_of(labels[1:])).sum()
        count += int((labels[1:] != -100).sum())
    return total / count, torch.zeros(())


def compare(found: Any, expected: tuple[list[float], list[float]], tolerance: float = 1e-4) -> None:
    """Losses within the tolerance, gradient norms too."""
    losses, norms = expected
    differences = worst_difference(found.column(), losses), worst_difference(found.column("grad_norm"), norms)
    print("largest relative difference of losses and gradient norms:", *differences)
    assert len(losses) == STEPS and max(differences) <= tolerance

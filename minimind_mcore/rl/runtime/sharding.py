"""How the rows of a batch are divided over the data-parallel ranks of a model, and into micro-batches.

Rows of a similar length go together, so that little padding is computed. The division depends on the lengths alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind_mcore.rl.algorithms.batches import token_batches
from minimind_mcore.rl.algorithms.losses import Aggregation, denominator
from minimind_mcore.rl.runtime.batch import Batch


@dataclass(frozen=True)
class Budget:
    """Tokens, and rows (None: any number), of a micro-batch under `rl_config.use_dynamic_bsz`."""

    tokens: int
    rows: int | None


@dataclass(frozen=True)
class Division:
    """What a model's layout asks of its micro-batches.

    Attributes:
        ranks: data-parallel ranks.
        together: the number of micro-batches of all ranks is a multiple of this. The ranks run in step, as experts are
            exchanged between them, and virtual stages take groups of the pipeline's size.
        forward: rows of a micro-batch that is measured, or its budget.
        reference: the same where the reference model measures.
        update: rows of a micro-batch that is trained, or its budget.
        aggregation: of the loss.
        seed: of the order of mini-batches.
    """

    ranks: int
    together: int
    forward: int | Budget
    reference: int | Budget
    update: int | Budget
    aggregation: Aggregation
    seed: int


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step.

    Attributes:
        micro_batches: of one rank, rows of its shard.
        rows: responses of all ranks.
        total: the denominator of the loss, of all ranks.
        tokens: that the policy generated, of all ranks.
    """

    micro_batches: list[list[int]]
    rows: int
    total: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Shard:
    """What one data-parallel rank gets of a batch.

    Attributes:
        batch: its rows.
        rows: the number of each in the whole batch; -1 for a copy that fills up a micro-batch.
        mini_batches: in order; a shard that is only measured has one.
        weights: see `Experience.weights`.
    """

    batch: Batch
    rows: list[int]
    mini_batches: list[MiniBatch]
    weights: int | None = None


@dataclass(frozen=True)
class Share:
    """What one rank computed: columns of some rows.

    Attributes:
        rows: their numbers in the batch.
        columns: by name, [rows, T].
    """

    rows: list[int]
    columns: dict[str, Tensor]


def measured(batch: Batch, division: Division) -> list[Shard]:
    """Shards of a batch whose rows are computed once, one for each data-parallel rank."""
    found = []
    for parts in _parts(batch, division, division.forward, copies=True):
        rows = [row for part in parts for row in part]
        ends = [sum(map(len, parts[: number + 1])) for number in range(len(parts))]
        local = [list(range(end - len(part), end)) for part, end in zip(parts, ends, strict=True)]
        some = batch.select(torch.tensor(rows).clamp(min=0))
        found.append(Shard(some, rows, [MiniBatch(local, len(batch), torch.zeros(()), torch.zeros(()))]))
    return found


def trained(batch: Batch, division: Division, orders: Sequence[Tensor], weights: int | None = None) -> list[Shard]:
    """Shards of a batch that is trained on, one for each data-parallel rank.

    Args:
        batch: of a step.
        division: of the model.
        orders: the rows of each mini-batch; see `algorithms.batches.mini_batches`.
        weights: see `Experience.weights`.
    """
    held: list[dict[int, int]] = [{} for _ in range(division.ranks)]  # row of the batch: row of the shard
    steps: list[list[MiniBatch]] = [[] for _ in range(division.ranks)]
    for order in orders:
        mini, whole = batch.select(order), order.tolist()
        total = denominator(mini.mask, division.aggregation)
        for rank, parts in enumerate(_parts(mini, division, division.update, copies=False)):
            local = [[held[rank].setdefault(whole[row], len(held[rank])) for row in part] for part in parts]
            steps[rank].append(MiniBatch(local, len(mini), total, mini.mask.sum()))
    return [
        Shard(batch.select(torch.tensor(list(rows))), list(rows), minis, weights)
        for rows, minis in zip(held, steps, strict=True)
    ]


def _parts(batch: Batch, division: Division, size: int | Budget, copies: bool) -> list[list[list[int]]]:
    """The micro-batches of each rank; with `copies` -1 fills up what the ranks must have in common."""
    tokens, together = batch.lengths.tolist(), division.together
    ordered = sorted(range(len(batch)), key=tokens.__getitem__)
    if isinstance(size, Budget):
        # Without `copies` nothing is filled up: `check.devices` and `validation.validate` check the mini-batches.
        ordered = [-1] * (-len(ordered) % together) + ordered
        found = token_batches([tokens[max(row, 0)] for row in ordered], size.tokens, size.rows, together)
        parts = [[ordered[place] for place in part] for part in found]
        return [parts[rank :: division.ranks] for rank in range(division.ranks)]
    if copies:  # every rank takes every so many-th row, so that the ranks have rows of the same lengths
        ordered = [-1] * (-len(ordered) % (size * together)) + ordered
        shares = [ordered[rank :: division.ranks] for rank in range(division.ranks)]
        return [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [parts[rank :: division.ranks] for rank in range(division.ranks)]

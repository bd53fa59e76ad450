"""Pack several samples into a sequence: --pack and --neat-pack, with the same bytes as MindSpeed-LLM.

    plan = plan_packs(lengths, capacity=seq_length - 1)
    written = write_packed(parts, "attention_mask", plan, prefix, Filling(seq_length, pad_id, neat=True))

Each sequence gets the longest sample that still fits, until none fits (data_handler.py, `_pack_serialize_to_disk`, and
`greedy_knapsack`). One position is always left for padding. With neat packing attention_mask has 1, 2, 3, ... for the
samples of a sequence and 0 for padding, from which training derives block-diagonal attention and positions that
restart per sample. Otherwise the mask is 1 everywhere, and samples attend to each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_mcore.preprocess.indexed import IGNORED, Column, IndexedWriter, Int64s, Written

Prefix = str | os.PathLike[str]
BATCH = 1024


@dataclass(frozen=True)
class Plan:
    """A plan of which samples share a sequence.

    Attributes:
        order: [samples], sample numbers, sequence by sequence.
        sizes: [sequences], number of samples in each.
    """

    order: Int64s
    sizes: Int64s


@dataclass(frozen=True)
class Filling:
    """How sequences are padded: the length, the padding id, and whether the mask has sample numbers."""

    seq_length: int
    pad_id: int
    neat: bool


def plan_packs(lengths: NDArray[Any], capacity: int) -> Plan:
    """Fill sequences greedily: the longest sample that fits first, and the last one of equally long samples.

    Args:
        lengths: [samples], lengths from 1 to `capacity`.
        capacity: maximum number of ids in a sequence.
    """
    left = np.bincount(lengths, minlength=capacity + 1).tolist()
    by_length = np.argsort(lengths, kind="stable").tolist()
    ends = np.cumsum(left).tolist()
    # below[length] leads to the longest available length up to `length`, and ends at 0.
    below = [length if left[length] else length - 1 for length in range(1, capacity + 1)]
    below.insert(0, 0)
    order: list[int] = []
    sizes: list[int] = []

    def longest(room: int) -> int:
        while below[room] != room:
            below[room] = room = below[below[room]]
        return room

    while len(order) < len(lengths):
        room, size = capacity, 0
        while (length := longest(room)) > 0:
            left[length] -= 1
            ends[length] -= 1
            if not left[length]:
                below[length] = length - 1
            order.append(by_length[ends[length]])
            room, size = room - length, size + 1
        sizes.append(size)
    return Plan(np.array(order, np.int64), np.array(sizes, np.int64))


class SamplesOfKey:
    """The samples of one key, of all parts, by number."""

    def __init__(self, prefixes: Sequence[Prefix]) -> None:
        self._parts = [column for column in map(Column, prefixes) if len(column)]
        self.lengths = np.concatenate([np.empty(0, np.int32), *(column.index.lengths for column in self._parts)])
        self._first = np.cumsum([0, *map(len, self._parts)])

    def __getitem__(self, number: int) -> NDArray[Any]:
        part = int(np.searchsorted(self._first, number, "right")) - 1
        return self._parts[part][number - int(self._first[part])]


def write_packed(parts: Sequence[Prefix], key: str, plan: Plan, target: Prefix, filling: Filling) -> Written:
    """Write one key's packed dataset.

    Args:
        parts: prefixes of the samples, in input order.
        key: "input_ids", "attention_mask" or "labels".
        plan: from `plan_packs`.
        target: prefix of the dataset.
            filling: padding of each sequence.
    """
    with IndexedWriter(target) as writer:
        batch: list[NDArray[Any]] = []
        for sequence in _sequences(SamplesOfKey(parts), key, plan, filling):
            batch.append(sequence)
            if len(batch) == BATCH:
                writer.add(np.concatenate(batch), np.full(BATCH, filling.seq_length))
                batch.clear()
        if batch:
            writer.add(np.concatenate(batch), np.full(len(batch), filling.seq_length))
    return writer.written


def _sequences(samples: SamplesOfKey, key: str, plan: Plan, filling: Filling) -> Iterator[NDArray[Any]]:
    paddings = {"input_ids": filling.pad_id, "labels": IGNORED, "attention_mask": 0 if filling.neat else 1}
    position = 0
    for size in plan.sizes:
        sequence = np.full(filling.seq_length, paddings[key], np.int32)
        place = 0
        for number, sample in enumerate(plan.order[position : position + size], 1):
            ids = samples[sample]
            numbered = key == "attention_mask" and filling.neat
            sequence[place : place + len(ids)] = number if numbered else ids
            place += len(ids)
        position += size
        yield sequence

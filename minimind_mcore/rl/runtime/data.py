"""Prompts for reinforcement learning, as preprocess_data.py and MindSpeed-RL write them.

    prompts = PromptDataset("data/grpo_minimind_math", max_prompt_length=512, seed=1234)
    for batch in prompts.batches(64, start=consumed):       # lists of 64 `RLPrompt`, without end
        batch[0].ids, batch[0].columns["labels"], batch[0].record

The files of a prefix (contract: MindSpeed-RL's R1AlpacaStyleInstructionHandler):

    PREFIX_packed_input_ids_document.bin/.idx       the prompt, ids
    PREFIX_packed_labels_document.bin/.idx          the right answer as text, its ids; any other column likewise
    PREFIX_packed_prompts.jsonl                     beside them, from this kit: the record, a line of JSON each
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.documents import parse_object
from minimind_mcore.inputs.splits import parse_split
from minimind_mcore.preprocess.check import quick_check
from minimind_mcore.preprocess.indexed import Column, datasets_at
from minimind_mcore.preprocess.meta import prompts_path
from minimind_mcore.preprocess.tokenize import tokenizer_info
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.rewards.verifiers import VERIFIERS
from minimind_mcore.training.sample_order import data_digest

Ids = NDArray[np.int32]
IDS, MASK = "input_ids", "attention_mask"


@dataclass(frozen=True)
class RLPrompt:
    """One task.

    Attributes:
        index: of the document in the files.
        ids: [tokens] int32, the prompt as the model gets it.
        columns: ids of the other columns by name: `labels`, the right answer, and what else was asked for.
        record: what stands beside it (messages, tools, gt ...); empty where another program made the files.
    """

    index: int
    ids: Ids
    columns: Mapping[str, Ids]
    record: Mapping[str, Any]


class PromptDataset:
    """The prompts of a prefix that are not too long, in an order that the seed decides.

    Args:
        prefix: `data_path`.
        columns: that every prompt must have (`dataset_additional_keys`); None: whichever there are.
        max_prompt_length: longer prompts are left out, and counted.
        seed: of the order, another one in each epoch.
        shuffle: False: the order of the files, in every epoch.
        split: Megatron's, shares of train, valid and test in the order of the files: "100,0,0".
        part: which of the three.
        tokenizer: its fingerprint, to refuse data of another one where the data says whose it is.
        optional: columns that prompts have where the data has them, beside `columns`.

    Attributes:
        columns: names of those that a prompt has.
        too_long: prompts left out.

    Raises:
        UserError: no such prefix, a missing column, damaged files, or no prompt left.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        columns: Sequence[str] | None = ("labels",),
        max_prompt_length: int | None = None,
        seed: int = 1234,
        shuffle: bool = True,
        split: str | None = None,
        part: int = 0,
        tokenizer: str | None = None,
        optional: Sequence[str] = (),
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.seed, self.shuffle = seed, shuffle
        self._limits = {"split": split or "100,0,0", "max_prompt_length": max_prompt_length}
        found = _find(self.prefix, columns, optional)
        self._columns = {name: _column(path, tokenizer) for name, path in found.items()}
        self.columns = [name for name in found if name not in (IDS, MASK)]
        counts = {name: column.index.sequences for name, column in self._columns.items()}
        if len(set(counts.values())) > 1:
            raise UserError(f"{self.prefix}: its columns do not belong together: {counts}; convert the data again")
        first, stop = _share(counts[IDS], split, part)
        lengths = self._columns[IDS].index.lengths[first:stop]
        keep = np.ones(len(lengths), bool) if max_prompt_length is None else lengths <= max_prompt_length
        self._kept = np.flatnonzero(keep) + first
        self.too_long = int((~keep).sum())
        if not len(self._kept):
            raise UserError(
                f"{self.prefix}: no prompt is left of {len(lengths)}: {self.too_long} are longer than "
                f"max_prompt_length {max_prompt_length}; split is {split or '100,0,0'}"
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, place: int) -> RLPrompt:
        index = int(self._kept[place])
        columns = {name: np.array(column[index], dtype=np.int32) for name, column in self._columns.items()}
        ids = columns.pop(IDS)
        columns.pop(MASK, None)
        return RLPrompt(index, ids, columns, self._records[index] if self._records else {})

    @cached_property
    def _records(self) -> _Lines | None:
        path = prompts_path(self.prefix)
        if not path.is_file():
            return None
        lines = _Lines(path)
        if len(lines) != self._columns[IDS].index.sequences:
            raise UserError(f"{path}: {len(lines)} lines for {self._columns[IDS].index.sequences} prompts")
        return lines

    def order_settings(self) -> dict[str, Any]:
        """What determines the order of the prompts, by the names of the YAML's keys; `data_path` with a digest."""
        digest = hashlib.sha256(data_digest(f"{self.prefix}_packed_{IDS}_document").encode()).hexdigest()[:12]
        return {
            "seed": self.seed,
            "no_shuffle": not self.shuffle,
            **self._limits,
            "the digest of data_path": digest,
        }

    def order(self, epoch: int) -> NDArray[np.int64]:
        """[len(self)] places in the order in which an epoch takes them."""
        if not self.shuffle:
            return np.arange(len(self), dtype=np.int64)
        return np.random.default_rng([self.seed, epoch]).permutation(len(self))

    def batches(self, size: int, start: int = 0) -> Iterator[list[RLPrompt]]:
        """Batches without end: one epoch goes into the next, and no prompt is skipped.

        Args:
            size: prompts of a batch (`global_batch_size`).
            start: prompts that earlier batches, of any size, have taken: where a resumed run goes on.
        """
        epoch, place = divmod(start, len(self))
        order = self.order(epoch)
        while True:
            batch: list[RLPrompt] = []
            while len(batch) < size:
                if place == len(self):
                    epoch, place = epoch + 1, 0
                    order = self.order(epoch)
                batch.append(self[int(order[place])])
                place += 1
            yield batch


def prompt_dataset(config: Config, prefix: str, held_out: bool = False) -> PromptDataset:
    """The prompts of a prefix, as the configuration reads them; `split` is of those to train on.

    Raises:
        UserError: see `PromptDataset`; or they have no labels, which a verifier needs.
    """
    actor = config.actor
    prompts = PromptDataset(
        prefix,
        actor.dataset_additional_keys,
        # `check.lengths` compares the two only where the YAML sets max_prompt_length.
        max_prompt_length=min(
            config.rl.max_prompt_length, actor.seq_length - config.generate.sampling_config.max_tokens
        ),
        seed=actor.seed,
        shuffle=not actor.no_shuffle,
        split=None if held_out else actor.split,
        tokenizer=tokenizer_info(actor.tokenizer_name_or_path).fingerprint,
        optional=("labels",),
    )
    compare = [name for name in config.reward_names if name in VERIFIERS and VERIFIERS[name].compares]
    if compare and "labels" not in prompts.columns:
        raise UserError(
            f"{prompts.prefix}: these prompts have no labels, which {', '.join(compare)} (verifier_function) compare a "
            "response with. Convert the data with a handler that writes them (R1AlpacaStyleInstructionHandler), or "
            "take what needs none: minimind_shape, minimind.reward_model, a function of your own"
        )
    return prompts


def _find(prefix: str, columns: Sequence[str] | None, optional: Sequence[str]) -> dict[str, str]:
    """The dataset of each column of a prefix."""
    start, end = f"{prefix}_packed_", "_document"
    found = {path[len(start) : -len(end)]: path for path in datasets_at(prefix) if path.startswith(start)}
    if IDS not in found:
        raise UserError(
            f"data_path {prefix}: no prompts there ({start}{IDS}{end}.idx); make them with "
            "`bash examples/data/preprocess_data.sh grpo_minimind_math`"
        )
    missing = [name for name in columns or () if name not in found]
    if missing:
        raise UserError(
            f"data_path {prefix}: no column {', '.join(missing)}, which dataset_additional_keys asks for; it has "
            f"{', '.join(found)}. Convert the data with a handler that writes it (R1AlpacaStyleInstructionHandler), or "
            "leave it out there"
        )
    if columns is None:
        return found
    return {name: found[name] for name in (IDS, *columns, *filter(found.__contains__, optional))}


def _share(count: int, split: str | None, part: int) -> tuple[int, int]:
    """First and last but one document of a part of Megatron's split."""
    if split is None:
        return 0, count
    bounds = [0, *(round(float(end) * count) for end in np.cumsum(parse_split(split, "split")))]
    return bounds[part], bounds[part + 1]


def _column(prefix: str, tokenizer: str | None) -> Column:
    """One dataset, checked."""
    quick_check(prefix, tokenizer)
    return Column(prefix)


class _Lines:
    """The lines of a JSON-lines file by number; only where they begin is in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        ends = np.flatnonzero(np.memmap(path, np.uint8, "r") == ord("\n")) + 1
        self._starts = np.concatenate([[0], ends])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        with open(self._path, "rb") as file:
            file.seek(int(self._starts[number]))
            line = file.read(int(self._starts[number + 1] - self._starts[number]))
        return parse_object(line, f"{self._path}, line {number + 1}", "convert the data again")

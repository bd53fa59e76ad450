"""Conversations with labels, in the files that MindSpeed-LLM's instruction and pairwise handlers write.

    PREFIX_packed_input_ids_document.{bin,idx}        PREFIX_packed_chosen_input_ids_document
    PREFIX_packed_attention_mask_document             PREFIX_packed_chosen_labels_document
    PREFIX_packed_labels_document                     PREFIX_packed_rejected_...

All int32. A label is the token of its own position, -100 where there is no loss: here they are shifted.
The attention mask of a packed sample holds the numbers of the samples in it, 1, 2, ...

Each epoch is a shuffle of the documents by one generator, as MindSpeed-LLM shuffles them
(decoder_packed_mtf_dataset.py): the number of samples consumed is the whole data position.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.splits import MEGATRON_DEFAULT, parse_split
from minimind_mcore.preprocess.check import quick_check
from minimind_mcore.preprocess.indexed import Column, idx_path, read_index
from minimind_mcore.training.config import DataSection, TrainConfig
from minimind_mcore.training.data import DatasetTokenizer
from minimind_mcore.training.job import MicroBatch

logger = logging.getLogger(__name__)

IGNORED = -100
INSTRUCTION = ("input_ids", "attention_mask", "labels")
PAIRWISE = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
SCAN_TOKENS = 1 << 24

Tokens = NDArray[np.int32]


class PostTrainingDataset(Dataset[dict[str, Any]]):
    """The samples of a run in its order: each column cut at `seq_length`, and `index`, the document's number.

    Args:
        prefix: as in `--data-path`.
        columns: `INSTRUCTION` or `PAIRWISE`.
        order: document of each sample of the run.
        seq_length: longest sample.
    """

    def __init__(self, prefix: str, columns: tuple[str, ...], order: NDArray[np.int64], seq_length: int) -> None:
        self.columns = {name: open_column(prefix, name) for name in columns}
        self.order, self.seq_length = order, seq_length
        self.extra: dict[str, NDArray[Any]] = {}  # more about each document, by its number

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        document = int(self.order[i])
        parts = {name: column[document][: self.seq_length] for name, column in self.columns.items()}
        return {**parts, **{name: values[document] for name, values in self.extra.items()}, "index": document}


def file_prefix(prefix: str, name: str) -> str:
    """The prefix of one column's pair of files."""
    return f"{prefix}_packed_{name}_document"


def open_column(prefix: str, name: str) -> Column:
    """One of the files: a run of int32 numbers for each sample."""
    return Column(file_prefix(prefix, name))


def data_prefix(data: DataSection) -> str:
    """The one prefix of `--data-path`, without `_packed_..._document`."""
    paths = data.data_path or []
    if len(paths) != 1:
        raise UserError(
            f"--data-path: found {len(paths)} words, expected one prefix: PREFIX of PREFIX_packed_..._document"
        )
    return str(paths[0])


def check_files(prefix: str, columns: tuple[str, ...], tokenizer: DatasetTokenizer, everything: bool = False) -> None:
    """Refuse data that is missing or for another stage, files that do not belong together, another tokenizer.

    Args:
        prefix: of the columns.
        columns: their names.
        tokenizer: in use.
        everything: compare all of the files with their records, and not only samples of large ones.

    Raises:
        UserError: see above.
    """
    for name in columns:
        if not idx_path(file_prefix(prefix, name)).is_file():
            raise UserError(_missing(prefix, name))
        has_tokens = name.endswith("input_ids")
        vocab_size = tokenizer.vocab_size if has_tokens else None
        quick_check(file_prefix(prefix, name), tokenizer.fingerprint, vocab_size, everything)
    opened = {name: read_index(file_prefix(prefix, name)) for name in columns}
    for name in columns:
        tokens = name.replace("attention_mask", "input_ids").replace("labels", "input_ids")
        if not np.array_equal(opened[name].lengths, opened[tokens].lengths):
            raise UserError(
                f"{file_prefix(prefix, name)}: its samples are not as long as those of "
                f"{file_prefix(prefix, tokens)}; the files are of different conversions: convert the data again"
            )
    counts = {index.sequences for index in opened.values()}
    if len(counts) > 1 or 0 in counts:
        raise UserError(f"{prefix}: found {sorted(counts)} samples in its files, expected as many in each, and some")


def _missing(prefix: str, name: str) -> str:
    """What is wrong where a column is not there."""
    kinds = {
        "instruction data, for --stage sft, reason or distill": file_prefix(prefix, "input_ids"),
        "pairwise data, for --stage dpo": file_prefix(prefix, "chosen_input_ids"),
        "pretraining data, for pretrain_gpt.py": f"{prefix}_text_document",
    }
    found = [kind for kind, path in kinds.items() if idx_path(path).is_file()]
    text = f"{idx_path(file_prefix(prefix, name))}: no such file"
    if prefix.endswith("_document"):
        return f"{text}; --data-path takes the bare prefix, {prefix.split('_packed_')[0]}"
    if found and not name.endswith("labels") and name != "attention_mask":
        return f"{text}; {prefix} is {found[0]}"
    if Path(prefix).suffix.lower() in (".json", ".jsonl", ".parquet"):
        return f"{text}; --data-path takes converted data: run preprocess_data.py first"
    return f"{text}; convert the data again (preprocess_data.py with an instruction or pairwise handler)"


def check_labels(prefix: str, columns: tuple[str, ...], seq_length: int, vocab_size: int, packed: bool) -> None:
    """Refuse samples that train nothing, labels that are no tokens, and packing that would be ignored; say what is cut.

    Raises:
        UserError: names the first such samples.
    """
    for name in columns:
        column = open_column(prefix, name)
        if name.endswith("labels"):
            _check_label_column(column, seq_length, vocab_size)
            if cut := int((column.index.lengths > seq_length).sum()):
                logger.info(
                    f"{column.prefix}: {cut} of {len(column)} samples are cut to {seq_length} tokens (--seq-length)"
                )
        if name == "attention_mask":
            _check_packing(column, packed)


def _check_packing(column: Column, packed: bool) -> None:
    found = _documents_where(column, column.index.lengths.max(initial=1), lambda x: x > 1)
    if packed and not found.any():
        logger.info(f"{column.prefix}: not packed, each sample is a sequence: --neat-pack has no effect")
    if found.any() and not packed:
        raise UserError(
            f"{column.prefix}: sample {int(found.argmax())} is packed, its attention mask numbers the samples "
            "in it: give --reset-attention-mask --neat-pack, or they would see each other"
        )


def _check_label_column(column: Column, seq_length: int, vocab_size: int) -> None:
    wrong = _documents_where(column, seq_length, lambda x: (x != IGNORED) & ((x < 0) | (x >= vocab_size)))
    if wrong.any():
        raise UserError(
            f"{column.prefix}: sample {int(wrong.argmax())} has a label that is neither {IGNORED} nor a token of the "
            f"vocabulary (0 to {vocab_size - 1}): convert the data again, with this tokenizer"
        )
    empty = np.flatnonzero(~_documents_where(column, seq_length, lambda x: x != IGNORED, first=1))
    if len(empty):
        raise UserError(
            f"{column.prefix}: {len(empty)} of {len(column)} samples have no token with loss in the first "
            f"{seq_length} (--seq-length), the first of them sample {empty[0]}: they train nothing. Raise "
            "--seq-length, or leave them out when the data is converted"
        )


def _documents_where(
    column: Column, length: int, condition: Callable[[Tokens], NDArray[np.bool_]], first: int = 0
) -> NDArray[np.bool_]:
    """[samples] whether `condition` holds for any number of a sample from `first` to `length`."""
    lengths, found = column.index.lengths, np.zeros(len(column), dtype=np.bool_)
    if len(column) == 0:
        return found
    # So many samples at a time: memory stays bounded.
    step = max(1, SCAN_TOKENS // max(1, int(lengths.max())))
    for start in range(0, len(column), step):
        sizes = lengths[start : start + step].astype(np.int64)
        begin = int(column.index.pointers[start]) // column.index.dtype.itemsize
        values = np.asarray(column.tokens[begin : begin + int(sizes.sum())])
        starts = np.cumsum(sizes) - sizes
        places = np.arange(len(values)) - np.repeat(starts, sizes)
        holds = condition(values) & (places >= first) & (places < length)
        owners = np.repeat(np.arange(len(sizes)), sizes)
        found[start : start + len(sizes)] = np.bincount(owners[holds], minlength=len(sizes)) > 0
    return found


def split_ranges(split: str | None, documents: int) -> list[range]:
    """The documents of training, validation and test: consecutive ranges in the proportions of `--split`."""
    ends = [0]
    for share in parse_split(split or MEGATRON_DEFAULT):
        ends.append(ends[-1] + round(share * documents))
    excess = ends[-1] - documents  # of rounding; taken as Megatron takes it
    ends = [0, *(end - excess for end in ends[1:])]
    return [range(ends[i], ends[i + 1]) for i in range(3)]


def sample_order(documents: range, samples: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
    """[>= samples] documents in the order of the run: epoch after epoch, each shuffled."""
    generator = np.random.RandomState(seed)
    epochs = []
    for _ in range(max(1, math.ceil(samples / len(documents)))):
        epoch = np.arange(documents.start, documents.stop, dtype=np.int64)
        if shuffle:
            generator.shuffle(epoch)
        epochs.append(epoch)
    return np.concatenate(epochs)


# ------------------------------------------------------------------------------------------------ micro-batches


def padded_length(longest: int, config: TrainConfig) -> int:
    """The length of a micro-batch: `--seq-length`, or under `--no-pad-to-seq-lengths` its longest sample's."""
    if not config.data.no_pad_to_seq_lengths:
        return int(config.data.seq_length)
    # Sequence parallelism cuts the sequence into equal parts.
    unit = math.lcm(
        config.data.pad_to_multiple_of,
        config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1,
    )
    return min(-(-longest // unit) * unit, int(config.data.seq_length))


def pad(rows: list[Tokens], length: int, value: int) -> torch.Tensor:
    """[rows, length] int64, filled up on the right."""
    out = torch.full((len(rows), length), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return out


def batch_of(tokens: list[Tokens], labels: list[Tokens], length: int) -> MicroBatch:
    """Tokens, the label of the next position (0 where there is none), loss_mask, position_ids [rows, length].

    Padding is on the right, where causal attention hides it from every token.
    """
    shifted = pad([row[1:] for row in labels], length, IGNORED)
    return {
        "tokens": pad(tokens, length, 0),
        "labels": shifted.clamp(min=0),
        "loss_mask": (shifted != IGNORED).float(),
        # Not expand: a tensor whose rows share memory cannot be pinned for the copy to a device.
        "position_ids": torch.arange(length).repeat(len(tokens), 1),
    }


def flatten_packed(batch: MicroBatch, numbers: torch.Tensor) -> MicroBatch:
    """The rows of packed samples as one row [1, rows * length], and where each sample in it begins and ends.

    Attention, positions and loss stay inside a sample; what pads a row is a sample by itself.

    Args:
        batch: as `batch_of` makes it.
        numbers: [rows, length] of the sample that a token belongs to; 0 is padding.
    """
    rows, length = numbers.shape
    changes = torch.ones(rows, length, dtype=torch.bool)
    changes[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts = changes.flatten().nonzero().flatten()
    ends = torch.cat([starts, torch.tensor([rows * length])])
    lengths = ends.diff()
    return {
        "tokens": batch["tokens"].reshape(1, -1),
        "labels": batch["labels"].reshape(1, -1),
        # The last token of a sample must not learn to predict the next sample.
        "loss_mask": batch["loss_mask"].reshape(1, -1).index_fill(1, ends[1:] - 1, 0.0),
        "position_ids": (torch.arange(rows * length) - starts.repeat_interleave(lengths))[None],
        "cu_seqlens": ends.to(torch.int32),
        "longest": int(lengths.max()),
    }

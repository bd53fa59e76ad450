"""Conversations with labels, in the file format of MindSpeed-LLM's instruction and pairwise handlers.

    PREFIX_packed_input_ids_document.{bin,idx}        PREFIX_packed_chosen_input_ids_document
    PREFIX_packed_attention_mask_document             PREFIX_packed_chosen_labels_document
    PREFIX_packed_labels_document                     PREFIX_packed_rejected_...

All values are int32. Each position has a label: its token, or -100 if the position has no loss. The
labels are shifted here. The attention mask of a packed sample holds the number of the sample at each token: 1, 2, ...

Each epoch shuffles the documents with one generator, as in MindSpeed-LLM (decoder_packed_mtf_dataset.py). The number of
consumed samples is therefore the complete data position.
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
    """The samples of a run in order: each column cut to `seq_length`, and `index`, the number of the document.

    Args:
        prefix: prefix of `--data-path`.
        columns: `INSTRUCTION` or `PAIRWISE`.
        order: document of each sample of the run.
        seq_length: maximum sample length.
    """

    def __init__(self, prefix: str, columns: tuple[str, ...], order: NDArray[np.int64], seq_length: int) -> None:
        self.columns = {name: open_column(prefix, name) for name in columns}
        self.order, self.seq_length = order, seq_length
        self.extra: dict[str, NDArray[Any]] = {}  # further values of each document, by document number

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        document = int(self.order[i])
        parts = {name: column[document][: self.seq_length] for name, column in self.columns.items()}
        return {**parts, **{name: values[document] for name, values in self.extra.items()}, "index": document}


def file_prefix(prefix: str, name: str) -> str:
    """Return the prefix of one column's pair of files."""
    return f"{prefix}_packed_{name}_document"


def open_column(prefix: str, name: str) -> Column:
    """Open one column: a sequence of int32 numbers per sample."""
    return Column(file_prefix(prefix, name))


def data_prefix(data: DataSection) -> str:
    """Return the single prefix of `--data-path`, without `_packed_..._document`."""
    paths = data.data_path or []
    if len(paths) != 1:
        raise UserError(
            f"--data-path: found {len(paths)} words, expected one prefix: the PREFIX of PREFIX_packed_..._document"
        )
    return str(paths[0])


def check_files(prefix: str, columns: tuple[str, ...], tokenizer: DatasetTokenizer, everything: bool = False) -> None:
    """Refuse data that is missing, incomplete, for another stage, or made with another tokenizer.

    Args:
        prefix: prefix of the columns.
        columns: names of the columns.
        tokenizer: tokenizer of the run.
        everything: compare all bytes with their digests, instead of parts of large files.

    Raises:
        UserError: the data is not usable.
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
                f"{file_prefix(prefix, name)}: its samples have other lengths than the samples of "
                f"{file_prefix(prefix, tokens)}; the files hold different conversions: convert the data again"
            )
    counts = {index.sequences for index in opened.values()}
    if len(counts) > 1 or 0 in counts:
        raise UserError(f"{prefix}: found {sorted(counts)} samples in its files, expected one equal, non-zero number")


def _missing(prefix: str, name: str) -> str:
    """Return a message about a missing column."""
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
    """Check that samples have valid labels and that packing is not ignored, and report how many samples are cut.

    Raises:
        UserError: a check fails. The message names the first such sample.
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
        logger.info(f"{column.prefix}: the samples are not packed: --neat-pack has no effect")
    if found.any() and not packed:
        raise UserError(
            f"{column.prefix}: sample {int(found.argmax())} is packed (its attention mask numbers the samples): "
            "give --reset-attention-mask --neat-pack, or the packed samples would see each other"
        )


def _check_label_column(column: Column, seq_length: int, vocab_size: int) -> None:
    wrong = _documents_where(column, seq_length, lambda x: (x != IGNORED) & ((x < 0) | (x >= vocab_size)))
    if wrong.any():
        raise UserError(
            f"{column.prefix}: sample {int(wrong.argmax())} has a label that is neither {IGNORED} nor a token of the "
            f"vocabulary (0 to {vocab_size - 1}): convert the data again with the tokenizer of this run"
        )
    empty = np.flatnonzero(~_documents_where(column, seq_length, lambda x: x != IGNORED, first=1))
    if len(empty):
        raise UserError(
            f"{column.prefix}: {len(empty)} of {len(column)} samples have no token with loss in the first "
            f"{seq_length} tokens (--seq-length), the first of them sample {empty[0]}: they train nothing. Raise "
            "--seq-length, or leave these samples out when the data is converted"
        )


def _documents_where(
    column: Column, length: int, condition: Callable[[Tokens], NDArray[np.bool_]], first: int = 0
) -> NDArray[np.bool_]:
    """Return [samples]: whether `condition` holds for any number of a sample from `first` to `length`."""
    lengths, found = column.index.lengths, np.zeros(len(column), dtype=np.bool_)
    if len(column) == 0:
        return found
    # Samples per chunk: bounds the memory.
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
    """Return the documents of training, validation and test: consecutive ranges in the proportions of `--split`."""
    ends = [0]
    for share in parse_split(split or MEGATRON_DEFAULT):
        ends.append(ends[-1] + round(share * documents))
    excess = ends[-1] - documents  # from rounding; removed as in Megatron
    ends = [0, *(end - excess for end in ends[1:])]
    return [range(ends[i], ends[i + 1]) for i in range(3)]


def sample_order(documents: range, samples: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
    """Return [>= samples] documents in the order of the run: one epoch after another, each shuffled."""
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
    """Return the length of a micro-batch: `--seq-length`, or its longest sample under `--no-pad-to-seq-lengths`."""
    if not config.data.no_pad_to_seq_lengths:
        return int(config.data.seq_length)
    # Sequence parallelism splits the sequence into equal parts.
    unit = math.lcm(
        config.data.pad_to_multiple_of,
        config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1,
    )
    return min(-(-longest // unit) * unit, int(config.data.seq_length))


def pad(rows: list[Tokens], length: int, value: int) -> torch.Tensor:
    """Pad rows on the right to [rows, length] int64."""
    out = torch.full((len(rows), length), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return out


def batch_of(tokens: list[Tokens], labels: list[Tokens], length: int) -> MicroBatch:
    """Return tokens, next-token labels (0 where there is no loss), loss_mask and position_ids, all [rows, length].

    Padding is on the right, where the causal mask hides it from all tokens.
    """
    shifted = pad([row[1:] for row in labels], length, IGNORED)
    return {
        "tokens": pad(tokens, length, 0),
        "labels": shifted.clamp(min=0),
        "loss_mask": (shifted != IGNORED).float(),
        # repeat, not expand: rows that share memory cannot be pinned for the copy to a device.
        "position_ids": torch.arange(length).repeat(len(tokens), 1),
    }


def flatten_packed(batch: MicroBatch, numbers: torch.Tensor) -> MicroBatch:
    """Flatten rows of packed samples to one row [1, rows * length], and return where each sample starts and ends.

    Attention, positions and loss stay within a sample. The padding of a row becomes a sample of its own.

    Args:
        batch: result of `batch_of`.
        numbers: [rows, length], the number of each token's sample; 0 is padding.
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
        # The last token of a sample must not predict the first token of the next sample.
        "loss_mask": batch["loss_mask"].reshape(1, -1).index_fill(1, ends[1:] - 1, 0.0),
        "position_ids": (torch.arange(rows * length) - starts.repeat_interleave(lengths))[None],
        "cu_seqlens": ends.to(torch.int32),
        "longest": int(lengths.max()),
    }

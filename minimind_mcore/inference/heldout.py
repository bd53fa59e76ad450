"""Held-out text for perplexity: raw files, or a dataset that is converted already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minimind_mcore.errors import UserError
from minimind_mcore.inference.loading import Loaded
from minimind_mcore.preprocess.check import quick_check
from minimind_mcore.preprocess.indexed import bin_path, idx_path, read_index
from minimind_mcore.preprocess.readers import Reject, ShardReader, find_sources, plan_shards

KEY = "text"
Document = tuple[list[int], int]


def documents(path: str, loaded: Loaded) -> Iterator[Document]:
    """The ids of each document, bos and eos among them, and the bytes of its text.

    Args:
        path: files as preprocess_data.py reads them (.jsonl with `text`, .txt, .parquet), or the prefix of a dataset.
        loaded: whose tokenizer it is.

    Raises:
        UserError: nothing there, a record without text, or ids of another tokenizer.
    """
    yield from _of_dataset(path, loaded) if idx_path(path).is_file() else _of_files(path, loaded)


def _of_files(path: str, loaded: Loaded) -> Iterator[Document]:
    tokenizer: Any = loaded.tokenizer
    before, after = loaded.info.frame()
    for shard in plan_shards(find_sources(path), subsets=1):
        for line, record in ShardReader(shard, [KEY]):
            where = f"{shard.source.path}, record {line}"
            if isinstance(record, Reject):
                raise UserError(f"{where}: {record.reason}")
            if record is None:
                continue
            text = record.get(KEY) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(f"{where}: expected an object with a {KEY!r} that is a text")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            yield [*before, *ids, *after], len(text.encode())


def _of_dataset(prefix: str, loaded: Loaded) -> Iterator[Document]:
    quick_check(prefix, loaded.info.fingerprint)
    index = read_index(prefix)
    tokens = np.memmap(bin_path(prefix), index.dtype, "r")
    for length, pointer in zip(index.lengths, index.pointers, strict=True):
        start = int(pointer) // index.dtype.itemsize
        ids = tokens[start : start + int(length)].tolist()
        if max(ids) >= loaded.config.vocab_size or min(ids) < 0:
            raise UserError(f"{prefix}: an id of {max(ids)}, but the model has {loaded.config.vocab_size}")
        yield ids, len(loaded.tokenizer.decode(ids, skip_special_tokens=True).encode())

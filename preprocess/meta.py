"""The record of a dataset: `<prefix>.meta.json`.

    meta = read_meta("data/pt_text_document")          # None for data of another program

The record is written last, so a dataset with a record is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.documents import read_object
from minimind_mcore.preprocess.indexed import Written, bin_path, idx_path
from minimind_mcore.preprocess.tokenize import TokenizerInfo
from minimind_mcore.storage import atomic_write_text


@dataclass(frozen=True)
class SourceRecord:
    """The state of an input file: path, size in bytes, modification time."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class DatasetMeta:
    """The record of a finished dataset.

    Attributes:
        request: SHA-256 of everything that determines the content. Equal requests give equal files.
        handler, key, dtype, append_eod, prepend_bos, seq_length: options of the conversion.
        tokenizer: tokenizer of the ids.
        written: documents, tokens, sizes and digests of the pair of files.
        records: number of input records, without blank lines.
        rejects: number of unusable records, which are listed in `<output prefix>.rejects.jsonl`.
        empty: number of records without a token for this key. They are left out, as in Megatron.
        too_long: number of documents that --seq-length left out.
        sources: the input files.
        truncated: number of samples that --seq-length cut.
        samples: for conversations: number of samples. Packed samples share sequences.
        chat: for conversations: their options, and `template`, which identifies the chat template.
        unused: unread keys of the input, with the number of records or messages in which they were non-empty.
        prompts_sha256: for tasks: SHA-256 of `prompts_path`, the file of their records.
    """

    request: str
    handler: str
    key: str
    dtype: str
    append_eod: bool
    prepend_bos: bool
    seq_length: int | None
    tokenizer: TokenizerInfo
    written: Written
    records: int
    rejects: int
    empty: int
    too_long: int
    sources: list[SourceRecord]
    truncated: int = 0
    samples: int | None = None
    chat: dict[str, Any] | None = None
    unused: dict[str, int] = dataclasses.field(default_factory=dict)
    prompts_sha256: str | None = None


def meta_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the path of a dataset's record."""
    return Path(f"{os.fspath(prefix)}.meta.json")


def prompts_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the path of the tasks' records for a conversion to `prefix`, one line of JSON each."""
    return Path(f"{os.fspath(prefix)}_packed_prompts.jsonl")


def write_meta(prefix: str | os.PathLike[str], meta: DatasetMeta) -> None:
    """Write a dataset's record atomically."""
    atomic_write_text(meta_path(prefix), json.dumps(dataclasses.asdict(meta), indent=1, ensure_ascii=False) + "\n")


def read_meta(prefix: str | os.PathLike[str]) -> DatasetMeta | None:
    """Read a dataset's record.

    Returns:
        The record, or None if there is none (data of another program).

    Raises:
        UserError: the record is damaged.
    """
    path = meta_path(prefix)
    if not path.is_file():
        return None
    fields = read_object(path, "convert the data again")
    try:
        fields["tokenizer"] = TokenizerInfo(**fields["tokenizer"])
        fields["written"] = Written(**fields["written"])
        fields["sources"] = [SourceRecord(**source) for source in fields["sources"]]
        meta = DatasetMeta(**fields)
        parts: list[DatasetMeta | TokenizerInfo | Written | SourceRecord] = [meta, meta.tokenizer, meta.written]
        for part in [*parts, *meta.sources]:
            _require_types(part)
        return meta
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable dataset record ({error}); convert the data again") from error


def _require_types(part: DatasetMeta | TokenizerInfo | Written | SourceRecord) -> None:
    """Raise a TypeError unless all texts and numbers of a record have their annotated types."""
    hints = typing.get_type_hints(type(part))
    for name, value in vars(part).items():
        kind = hints[name]
        plain = kind in (str, int, bool, int | None, str | None)
        if plain and not (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            raise TypeError(f"{name}: found {value!r}, expected {getattr(kind, '__name__', kind)}")


def is_complete(prefix: str | os.PathLike[str], meta: DatasetMeta) -> bool:
    """Return whether both files of the dataset exist with the recorded sizes. (`check_dataset` compares digests.)"""
    sizes = ((bin_path(prefix), meta.written.bin_bytes), (idx_path(prefix), meta.written.idx_bytes))
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes)

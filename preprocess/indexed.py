"""Megatron's indexed dataset: `<prefix>.bin` has consecutive tokens, `<prefix>.idx` the position of each sequence.

    with IndexedWriter("data/pt_text_document") as writer:
        writer.add(tokens, lengths)            # a whole batch of documents as two arrays
    index = read_index("data/pt_text_document")
        index.sequences                            # number of sequences

Layout of the index, little endian (megatron/core/datasets/indexed_dataset.py, the same in 0.12 and 0.16):

    9 bytes "MMIDIDX\\0\\0" | u64 version 1 | u8 dtype code | u64 sequences S | u64 document indices D
    | int32 length[S] | int64 byte offset[S] | int64 document index[D]

A document is a run of sequences. `document index` starts with 0 and has the number of sequences at the end of each
document. Here every document is one sequence, so D = S + 1. The files are byte-identical to those that megatron-core's
`IndexedDatasetBuilder` writes for the same tokens.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from minimind_mcore.errors import UserError
from minimind_mcore.storage import atomic_file

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
COPY_BYTES = 1 << 22
BLOCK_BYTES = 1 << 20  # block size of a .bin file; the dataset's record has a checksum per block

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
IGNORED = -100  # the label of a token without loss


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the data file of a dataset."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the index file of a dataset."""
    return Path(f"{os.fspath(prefix)}.idx")


def datasets_at(prefix: str | os.PathLike[str]) -> list[str]:
    """Return the dataset at a prefix, or the datasets of conversations whose names start with the prefix."""
    if idx_path(prefix).is_file():
        return [os.fspath(prefix)]
    path = Path(prefix)
    found = sorted(path.parent.glob(f"{glob.escape(path.name)}_packed_*_document.idx"))
    return [str(file.with_suffix("")) for file in found]


@dataclass(frozen=True)
class Index:
    """An opened index. The arrays are memory maps of the file.

    Attributes:
        dtype: dtype of the tokens in the `.bin` file.
        lengths: [S] int32, tokens in each sequence.
        pointers: [S] int64, byte offset of each sequence in the `.bin` file.
        documents: [D] int64, first sequence of each document, then S.
    """

    dtype: np.dtype[Any]
    lengths: Int32s
    pointers: Int64s
    documents: Int64s

    @property
    def sequences(self) -> int:
        """Number of sequences S."""
        return len(self.lengths)


def read_index(prefix: str | os.PathLike[str]) -> Index:
    """Open `<prefix>.idx`.

    Raises:
            UserError: the file is missing, is not an index, or its size does not match its counts.
    """
    path = idx_path(prefix)
    if not path.is_file():
        near = sorted(path.parent.glob(f"{path.stem}_*_document.idx"))
        hint = (
            f"did you mean {near[0].with_suffix('')}?"
            if near
            else "an indexed dataset is a pair of .bin and .idx files"
        )
        raise UserError(f"{path}: no such file; {hint}")
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"{path}: not a Megatron index (it must start with {MAGIC!r}); convert the data again")
    _, version, code, sequences, documents = HEADER.unpack(head)
    names = {value: name for name, value in CODES.items()}
    if version != 1 or code not in names:
        raise UserError(f"{path}: index version {version} with dtype code {code}; expected version 1, code 1 to 8")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size != expected:
        raise UserError(
            f"{path}: {size} bytes, but {sequences} sequences and {documents} document indices need {expected}; "
            "the file is truncated or damaged: convert the data again"
        )
    dtype = np.dtype(names[code])
    if sequences == 0:
        return Index(dtype, np.empty(0, np.int32), np.empty(0, np.int64), np.zeros(documents, np.int64))
    data = np.memmap(path, mode="r")
    first, second = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
    return Index(
        dtype,
        data[HEADER.size : first].view(np.int32),
        data[first:second].view(np.int64),
        data[second:].view(np.int64),
    )


class Column:
    """The sequences of one dataset, by number. Each is read from the file on access."""

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix, self.index = os.fspath(prefix), read_index(prefix)
        self.tokens: NDArray[Any] = np.empty(0, self.index.dtype)
        if self.index.sequences:
            self.tokens = np.memmap(bin_path(prefix), dtype=self.index.dtype, mode="r")

    def __len__(self) -> int:
        return self.index.sequences

    def __getitem__(self, number: int) -> NDArray[Any]:
        start = int(self.index.pointers[number]) // self.index.dtype.itemsize
        return self.tokens[start : start + int(self.index.lengths[number])]

    def __reduce__(self) -> Any:
        return type(self), (self.prefix,)  # a worker process opens the files itself


class HashingFile:
    """A binary file being written, with the SHA-256 of its bytes and the CRC-32 of each block of `BLOCK_BYTES`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._crcs: list[int] = []
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self._digest.update(data)
        rest = memoryview(data)
        while rest:
            filled = self.size % BLOCK_BYTES
            if filled == 0:
                self._crcs.append(0)
            part = rest[: BLOCK_BYTES - filled]
            self._crcs[-1] = zlib.crc32(part, self._crcs[-1])
            self.size += len(part)
            rest = rest[len(part) :]

    def write_array(self, array: NDArray[Any]) -> None:
        """Append an array's elements (a view is written without a copy)."""
        if array.size:
            self.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """Return the SHA-256 of everything written so far."""
        return self._digest.hexdigest()

    def blocks(self) -> str:
        """Return the CRC-32 of each block, as `Written` records them."""
        return "".join(f"{crc:08x}" for crc in self._crcs)


@dataclass(frozen=True)
class Written:
    """The result of a writer or a merge.

    `bin_blocks` has the CRC-32 of each block of `BLOCK_BYTES` of the .bin file, 8 hexadecimal digits each. They allow
    to check some blocks of a large file, which SHA-256 does not. Records of earlier versions have no blocks.
    """

    documents: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    bin_blocks: str = ""


class IndexedWriter:
    """Writes one dataset of single-sequence documents. The pair of files appears when the context ends without an
    error.

    Memory: 4 bytes per document, plus the current batch. `written` is set after the context.
    """

    written: Written

    def __init__(self, prefix: str | os.PathLike[str], dtype: str = "int32") -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.tokens = 0
        self._lengths: list[Int32s] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> IndexedWriter:
        # The file entered last is published first: the .bin exists before the .idx that refers to it.
        self._idx = HashingFile(self._stack.enter_context(atomic_file(idx_path(self.prefix))))
        self._bin = HashingFile(self._stack.enter_context(atomic_file(bin_path(self.prefix))))
        self._stack.push(self._finish)  # runs before both files are published, so that its errors cancel the publishing
        return self

    def add(self, tokens: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Append a batch of documents.

        Args:
            tokens: [sum(lengths)] token ids, document after document; must fit the dtype.
            lengths: [documents] tokens in each document, none of them 0.
        """
        self._bin.write_array(tokens.astype(self.dtype, copy=False))
        self._lengths.append(lengths.astype(np.int32))
        self.tokens += len(tokens)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)

    def _finish(self, kind: Any, error: Any, trace: Any) -> None:
        """Write the index, unless an exception was raised."""
        if kind is None:
            lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
            ends = np.arange(len(lengths) + 1, dtype=np.int64)
            _write_index(self._idx, self.dtype, lambda: iter([(lengths, ends)]))
            data, index = self._bin, self._idx
            digests = data.hexdigest(), index.hexdigest()
            self.written = Written(
                len(lengths), self.tokens, data.size, digests[0], index.size, digests[1], data.blocks()
            )


def _write_index(out: HashingFile, dtype: np.dtype[Any], parts: Callable[[], Iterator[tuple[Int32s, Int64s]]]) -> None:
    """Write the index of concatenated parts, each a pair (lengths, document indices).

    `parts` is called once per section of the file, so that only one part's index is in memory at a time.
    """
    counts = [(len(lengths), len(ends) - 1) for lengths, ends in parts()]
    sequences, documents = (sum(count) for count in zip(*counts, strict=True))
    out.write(HEADER.pack(MAGIC, 1, CODES[dtype.name], sequences, documents + 1))
    for lengths, _ in parts():
        out.write_array(lengths)
    position = 0
    for lengths, _ in parts():
        ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize + position
        out.write_array(ends - lengths * np.int64(dtype.itemsize))
        position = int(ends[-1]) if len(ends) else position
    out.write_array(np.zeros(1, np.int64))
    base = 0
    for lengths, ends in parts():
        out.write_array(ends[1:] + base)
        base += len(lengths)


def copy_chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file in chunks of bounded size."""
    with open(path, "rb") as f:
        while chunk := f.read(COPY_BYTES):
            yield chunk


def merge(prefixes: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str]) -> Written:
    """Concatenate datasets with the same dtype to a new one, in the given order.

    The target's `.idx` is absent while its `.bin` is replaced. A reader needs both files, so it never reads
    parts of two datasets.

    Raises:
        UserError: a part is damaged, the dtypes differ, or the disk is full.
    """
    summaries = [_summary(prefix) for prefix in prefixes]
    dtypes = {dtype for dtype, _, _ in summaries}
    if len(dtypes) != 1:
        raise UserError(f"cannot merge into {target}: the parts have dtypes {sorted(dtype.name for dtype in dtypes)}")
    dtype = dtypes.pop()
    documents, tokens = sum(count for _, count, _ in summaries), sum(count for _, _, count in summaries)

    def parts() -> Iterator[tuple[Int32s, Int64s]]:
        for prefix in prefixes:
            index = read_index(prefix)
            yield index.lengths, index.documents

    with atomic_file(idx_path(target)) as idx_file, atomic_file(bin_path(target)) as bin_file:
        data, index = HashingFile(bin_file), HashingFile(idx_file)
        for prefix in prefixes:
            for chunk in copy_chunks(bin_path(prefix)):
                data.write(chunk)
        if data.size != tokens * dtype.itemsize:
            raise UserError(
                f"cannot merge into {target}: the parts hold {data.size} bytes, their indices say "
                f"{tokens * dtype.itemsize}; one is damaged"
            )
        _write_index(index, dtype, parts)
        idx_file.flush()
        idx_path(target).unlink(missing_ok=True)
    return Written(documents, tokens, data.size, data.hexdigest(), index.size, index.hexdigest(), data.blocks())


def _summary(prefix: str | os.PathLike[str]) -> tuple[np.dtype[Any], int, int]:
    """Return (dtype, documents, tokens) of a dataset."""
    index = read_index(prefix)
    return index.dtype, len(index.documents) - 1, int(index.lengths.sum(dtype=np.int64))

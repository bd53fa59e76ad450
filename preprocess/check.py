"""Verify an indexed dataset.

    quick_check("data/pt_text_document", fingerprint)      # before training: files, sizes, tokenizer
    problems = check_dataset("data/pt_text_document")      # complete check, reads all bytes

megatron-core opens a truncated `.bin` without an error, and fails only when it reads a sample after the cut,
possibly hours later.
"""

from __future__ import annotations

import functools
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.indexed import (
    BLOCK_BYTES,
    IGNORED,
    Column,
    Index,
    bin_path,
    copy_chunks,
    idx_path,
    read_index,
)
from minimind_mcore.preprocess.meta import DatasetMeta, meta_path, prompts_path, read_meta
from minimind_mcore.preprocess.tokenize import TokenizerInfo
from minimind_mcore.storage import sha256

CHUNK = 1 << 22
SAMPLED_BLOCKS = 64
LABELS, MASKS = "labels_document", "attention_mask_document"
Prefix = str | os.PathLike[str]


def quick_check(
    prefix: Prefix, fingerprint: str | None = None, vocab_size: int | None = None, everything: bool = False
) -> None:
    """Refuse a dataset that cannot be trained on. Reads its index and some blocks of its tokens.

    Args:
        prefix: prefix of the `.bin/.idx` pair.
        fingerprint: `tokenizer_fingerprint` of the run's tokenizer, compared with the dataset's record if there
            is one (data of other programs has none).
        vocab_size: vocab size of that tokenizer. Without a record the first few million ids must be below it.
            (Under tensor parallelism larger ids train on zeros, without an error.)
        everything: compare all blocks with the record, not only some of a large file (the processes
            of a host share the blocks). Without a record all ids must be in the vocabulary.

    Raises:
        UserError: a file is missing, truncated, damaged or not a dataset, or the tokenizer differs.
    """
    index = read_index(prefix)
    problems = _kind_problems(prefix, index) or _size_problems(prefix, index) or [*_index_problems(prefix, index)]
    meta = read_meta(prefix)
    if meta is not None and fingerprint is not None:
        problems += _tokenizer_problems(meta, fingerprint)
    if meta is not None and not problems:
        problems += digest_problems(prefix, meta, everything)
    if meta is None and not problems:
        problems += _token_problems(prefix, index, vocab_size, None if everything else CHUNK)
    if problems:
        raise UserError("\n  ".join(problems))


def check_dataset(prefix: Prefix, tokenizer: TokenizerInfo | None = None) -> list[str]:
    """Check a dataset completely, reading every byte.

    Args:
        prefix: prefix of the `.bin/.idx` pair.
        tokenizer: tokenizer whose vocabulary must contain the ids (default: the recorded one).

    Returns:
        One line per problem.
    """
    try:
        index = read_index(prefix)
        meta = read_meta(prefix)
    except UserError as error:
        return [str(error)]
    problems = [*_kind_problems(prefix, index), *_size_problems(prefix, index), *_index_problems(prefix, index)]
    if meta is not None:
        problems += _record_problems(prefix, index, meta)
        if tokenizer is not None:
            problems += _tokenizer_problems(meta, tokenizer.fingerprint)
    vocab = tokenizer.vocab_size if tokenizer else meta.tokenizer.vocab_size if meta else None
    return problems + _token_problems(prefix, index, vocab)


def check_together(prefixes: Sequence[str]) -> list[str]:
    """Check that datasets of the same conversations have the same number of sequences with the same lengths.

    Returns:
        One line per problem.
    """
    if len(prefixes) < 2:
        return []
    indices = {prefix: read_index(prefix) for prefix in prefixes}
    counts = {prefix: index.sequences for prefix, index in indices.items()}
    if len(set(counts.values())) > 1:
        return ["they do not belong together: " + ", ".join(f"{p} has {n:,} sequences" for p, n in counts.items())]
    problems, answers = [], [*_answers(prefixes)]
    for prefix, index in indices.items():
        if prefix in answers:
            continue
        ids = prefix.replace(LABELS, "input_ids_document").replace(MASKS, "input_ids_document")
        if ids in indices and not np.array_equal(index.lengths, indices[ids].lengths):
            problems.append(f"{prefix}: its sequences are not as long as those of {ids}")
    beside = _prompts_of(prefixes[0])
    if beside.is_file() and (lines := _lines(beside)) != counts[prefixes[0]]:
        problems.append(f"{beside}: {lines:,} lines for {counts[prefixes[0]]:,} tasks")
    return problems


def _answers(prefixes: Sequence[str]) -> Iterator[str]:
    """Yield the prefixes of labels that are right answers of tasks, not labels of ids: they contain no `IGNORED`."""
    for prefix in prefixes:
        size = bin_path(prefix).stat().st_size if bin_path(prefix).is_file() else 0
        if size and prefix.endswith("_packed_labels_document") and not (Column(prefix).tokens[:CHUNK] == IGNORED).any():
            yield prefix


def _lines(path: Path) -> int:
    return sum(chunk.count(b"\n") for chunk in copy_chunks(path))


def _total(index: Index) -> int:
    return int(index.lengths.sum(dtype=np.int64))


def _kind_problems(prefix: Prefix, index: Index) -> list[str]:
    path = idx_path(prefix)
    if index.dtype.kind == "f":
        return [f"{path}: its tokens are of dtype {index.dtype.name}, expected integers; convert the data again"]
    if index.sequences == 0:
        return [f"{path}: found 0 sequences, expected 1 or more; convert the data again, from input that has text"]
    return []


def idx_digest(prefix: Prefix) -> str:
    """Return the SHA-256 of a dataset's index. An unchanged file is read only once."""
    return _digest(idx_path(prefix))


def _digest(path: Path) -> str:
    found = path.stat()
    return _read_digest(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_digest(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path)


def _prompts_of(column: Prefix) -> Path:
    """Return the records file of the tasks whose column this dataset is."""
    return prompts_path(os.fspath(column).rpartition("_packed_")[0])


def _prompts_problems(prefix: Prefix, meta: DatasetMeta) -> list[str]:
    """Compare the records of tasks, which hold the right answers, with the digest of the conversion."""
    path = _prompts_of(prefix)
    if meta.prompts_sha256 is None or (path.is_file() and _digest(path) == meta.prompts_sha256):
        return []
    return [f"{path}: content differs from its recorded SHA-256" if path.is_file() else f"{path}: no such file"]


def digest_problems(prefix: Prefix, meta: DatasetMeta, everything: bool = False) -> list[str]:
    """Compare the index and blocks of the tokens with the dataset's record."""
    written = meta.written
    again = (
        "the dataset has changed since its conversion; convert the data again (--overwrite-cache), or remove "
        f"{meta_path(prefix)} if another program wrote these files"
    )
    if idx_digest(prefix) != written.idx_sha256:
        return [f"{idx_path(prefix)}: content differs from its recorded SHA-256: {again}"]
    if problems := _prompts_problems(prefix, meta):
        return [f"{problems[0]}: {again}"]
    path, count = bin_path(prefix), len(written.bin_blocks) // 8
    if count == 0:  # recorded by an earlier version
        small = everything or written.bin_bytes <= SAMPLED_BLOCKS * BLOCK_BYTES
        if small and sha256(path) != written.bin_sha256:
            return [f"{path}: content differs from its recorded SHA-256: {again}"]
        return []
    with open(path, "rb") as file:
        for block in _blocks_to_check(count, everything):
            file.seek(block * BLOCK_BYTES)
            if f"{zlib.crc32(file.read(BLOCK_BYTES)):08x}" != written.bin_blocks[8 * block : 8 * block + 8]:
                where = f"bytes {block * BLOCK_BYTES} to {(block + 1) * BLOCK_BYTES - 1}"
                return [f"{path}: {where} differ from their recorded CRC-32: {again}"]
    return []


def _blocks_to_check(count: int, everything: bool) -> Sequence[int]:
    """Return the blocks of a .bin file that a quick check reads. 64 MiB take about 0.1 s.

    The choice differs between processes and between starts, so that damage in other blocks is found eventually.
    """
    if everything:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return range(int(os.environ.get("LOCAL_RANK", "0")) % ranks, count, ranks)
    if count <= SAMPLED_BLOCKS:
        return range(count)
    chosen = random.Random().sample(range(1, count - 1), SAMPLED_BLOCKS - 2)
    return sorted([0, *chosen, count - 1])


def _size_problems(prefix: Prefix, index: Index) -> list[str]:
    path, expected = bin_path(prefix), _total(index) * index.dtype.itemsize
    if not path.is_file():
        return [f"{path}: no such file, though its index is there: convert the data again"]
    size = path.stat().st_size
    if size == expected:
        return []
    state = "truncated" if size < expected else "longer than its index says"
    return [f"{path}: {state}: {size} bytes, expected {expected}; convert the data again"]


def _index_problems(prefix: Prefix, index: Index) -> Iterator[str]:
    path, position = idx_path(prefix), 0
    for start in range(0, index.sequences, CHUNK):
        lengths = index.lengths[start : start + CHUNK]
        if (lengths < 0).any():
            yield f"{path}: sequence {start + int(np.argmax(lengths < 0))} has a negative length"
        ends = np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize + position
        wrong = index.pointers[start : start + CHUNK] != np.concatenate([[position], ends[:-1]])
        if wrong.any():
            yield f"{path}: the pointer of sequence {start + int(np.argmax(wrong))} is not where it begins"
        position = int(ends[-1])
    documents = index.documents
    if len(documents) == 0 or documents[0] != 0 or documents[-1] != index.sequences:
        yield f"{path}: the document indices do not run from 0 to {index.sequences}"
    elif (np.diff(documents) < 0).any():
        yield f"{path}: document index {1 + int(np.argmax(np.diff(documents) < 0))} goes backwards"


def _token_problems(prefix: Prefix, index: Index, vocab: int | None, limit: int | None = None) -> list[str]:
    path, name = bin_path(prefix), os.fspath(prefix)
    if name.endswith(MASKS):
        return []
    if not path.is_file() or path.stat().st_size < index.dtype.itemsize:
        return []
    limits = "an id is 0 or more" if vocab is None else f"outside of the tokenizer's vocabulary (0 to {vocab - 1})"
    tokens = np.memmap(path, dtype=index.dtype, mode="r", shape=(path.stat().st_size // index.dtype.itemsize,))
    for start in range(0, min(len(tokens), limit or len(tokens)), CHUNK):
        chunk = tokens[start : start + CHUNK]
        outside = chunk < 0
        if vocab is not None:
            outside |= chunk >= vocab
        if name.endswith(LABELS):
            outside &= chunk != IGNORED
        if outside.any():
            at = int(np.argmax(outside))
            return [f"{path}: token {start + at} is {chunk[at]}, {limits}"]
    return []


def _record_problems(prefix: Prefix, index: Index, meta: DatasetMeta) -> Iterator[str]:
    written = meta.written
    found = {"documents": len(index.documents) - 1, "tokens": _total(index)}
    for name, expected in (("documents", written.documents), ("tokens", written.tokens)):
        if found[name] != expected:
            yield f"{idx_path(prefix)}: {found[name]} {name}, recorded {expected}"
    for path, digest in ((bin_path(prefix), written.bin_sha256), (idx_path(prefix), written.idx_sha256)):
        if path.is_file() and sha256(path) != digest:
            yield f"{path}: content differs from its recorded SHA-256; convert the data again"
    yield from _prompts_problems(prefix, meta)


def _tokenizer_problems(meta: DatasetMeta, fingerprint: str) -> list[str]:
    if fingerprint == meta.tokenizer.fingerprint:
        return []
    return [
        f"tokenizer mismatch: the data was made with {meta.tokenizer.path} (fingerprint "
        f"{meta.tokenizer.fingerprint[:12]}), but the given tokenizer has {fingerprint[:12]}: its ids mean other text; "
        "give the tokenizer that made the data, or convert the text again"
    ]

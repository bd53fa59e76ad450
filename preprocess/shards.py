"""Converting one shard of the input into part files, inside a worker process.

A part is `<directory>/<shard>.<key>.bin/.idx`, its rejects, and last `<shard>.json`, the report:
a shard with a report is finished, whatever happened to the run afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.handlers import find_handler
from minimind_mcore.preprocess.indexed import IndexedWriter
from minimind_mcore.preprocess.readers import Reject, Shard, ShardReader
from minimind_mcore.preprocess.tokenize import load_encoder
from minimind_mcore.storage import atomic_file, atomic_write_text

# Large enough that the cost per call vanishes, small enough that a worker stays far below 1 GiB.
BATCH_CHARS = 1 << 19

# So many rejects, if they are most of what was read, mean the wrong file or key: no use reading on.
HOPELESS_REJECTS = 1000


@dataclass(frozen=True)
class Job:
    """What all shards of a run have in common.

    Attributes:
        directory: for the part files.
        tokenizer: path.
        backend: "tokenizers" or "gigatoken".
        handler, keys, dtype: as in `pretrain.Options`.
        bos_id, eos_id: put before and behind each document, unless None.
        seq_length: documents of so many tokens or more are left out, unless None.
        max_reject_rate: share of unusable records that is tolerated.
        progress: shared memory, two counters per shard: bytes read, tokens written. A worker writes
            only its own shard's, so they need no lock that a killed worker could keep.
    """

    directory: Path
    tokenizer: str
    backend: str
    handler: str
    keys: tuple[str, ...]
    dtype: str
    bos_id: int | None
    eos_id: int | None
    seq_length: int | None
    max_reject_rate: float
    progress: Any


@dataclass(frozen=True)
class Task:
    """One shard and its number in input order."""

    number: int
    shard: Shard


@dataclass
class Report:
    """What became of a shard.

    Attributes:
        number: of the shard.
        bytes: of input.
        lines: lines or rows read, so that the next shard's lines can be numbered.
        records: of these, not blank.
        rejects, too_long: records left out.
        empty: by key, records without a token.
        tokens: by key.
    """

    number: int
    bytes: int
    lines: int = 0
    records: int = 0
    rejects: int = 0
    too_long: int = 0
    empty: dict[str, int] = dataclasses.field(default_factory=dict)
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)


def part_prefix(directory: Path, number: int, key: str) -> Path:
    """Prefix of the dataset that holds one key of one shard."""
    return directory / f"{number:05d}.{key}"


def rejects_path(directory: Path, number: int) -> Path:
    """The rejects of a shard, with lines counted from its first."""
    return directory / f"{number:05d}.rejects.jsonl"


def report_path(directory: Path, number: int) -> Path:
    """The report of a finished shard."""
    return directory / f"{number:05d}.json"


def finished(directory: Path, count: int) -> dict[int, Report]:
    """Reports of the shards that an earlier run finished."""
    paths = {number: report_path(directory, number) for number in range(count)}
    return {number: Report(**json.loads(path.read_text())) for number, path in paths.items() if path.is_file()}


def frame(
    tokens: NDArray[np.uint32], lengths: NDArray[np.int64], bos_id: int | None, eos_id: int | None
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Put begin and end tokens around each document that has tokens; the others stay empty.

    Args:
        tokens: [sum(lengths)] ids.
        lengths: [documents].
        bos_id, eos_id: what to add; None adds nothing.

    Returns:
        The new ids and lengths.
    """
    added = (bos_id is not None) + (eos_id is not None)
    framed = lengths + added * (lengths > 0)
    ends = np.cumsum(framed)[lengths > 0]
    starts = ends - framed[lengths > 0]
    out = np.empty(int(framed.sum()), np.uint32)
    body = np.ones(len(out), bool)
    if bos_id is not None:
        out[starts], body[starts] = bos_id, False
    if eos_id is not None:
        out[ends - 1], body[ends - 1] = eos_id, False
    out[body] = tokens
    return out, framed


class ShardConverter:
    """Converts shards one after the other; a worker has one."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder = load_encoder(job.tokenizer, job.backend)
        self._handler = find_handler(job.handler)
        self._parent = os.getppid()

    def __call__(self, task: Task) -> Report:
        """Convert one shard, report it on the disk, and return the report.

        Raises:
            UserError: unreadable input, a full disk, or nearly nothing but rejects.
        """
        job, report = self._job, Report(task.number, task.shard.bytes)
        report.empty, report.tokens = dict.fromkeys(job.keys, 0), dict.fromkeys(job.keys, 0)
        with contextlib.ExitStack() as stack:
            writers = {
                key: stack.enter_context(IndexedWriter(part_prefix(job.directory, task.number, key), job.dtype))
                for key in job.keys
            }
            rejects = stack.enter_context(atomic_file(rejects_path(job.directory, task.number)))
            self._read(task, report, writers, rejects)
        atomic_write_text(report_path(job.directory, task.number), json.dumps(dataclasses.asdict(report)))
        return report

    def _read(self, task: Task, report: Report, writers: Mapping[str, IndexedWriter], rejects: BinaryIO) -> None:
        reader = ShardReader(task.shard, self._handler.columns(self._job.keys))
        batch: list[dict[str, str]] = []
        chars = 0
        for line, record in reader:
            report.lines = line
            if record is None:
                continue
            report.records += 1
            texts = record if isinstance(record, Reject) else self._handler(record, self._job.keys)
            if isinstance(texts, Reject):
                self._reject(task, report, texts, rejects)
                continue
            batch.append(texts)
            chars += sum(map(len, texts.values()))
            if chars >= BATCH_CHARS:
                self._write(batch, report, writers)
                self._count(task, reader.bytes_read, report)
                batch, chars = [], 0
        self._write(batch, report, writers)
        self._count(task, task.shard.bytes, report)

    def _write(self, batch: Sequence[dict[str, str]], report: Report, writers: Mapping[str, IndexedWriter]) -> None:
        """Encode a batch and append it to the part of each key."""
        job = self._job
        framed = {}
        for key in job.keys:
            tokens, lengths = self._encoder.encode([texts[key] for texts in batch])
            framed[key] = frame(tokens, lengths, job.bos_id, job.eos_id)
        keep = np.ones(len(batch), bool)
        if job.seq_length is not None:
            keep = np.all([lengths < job.seq_length for _, lengths in framed.values()], axis=0)
            report.too_long += int((~keep).sum())
        for key, (tokens, lengths) in framed.items():
            report.empty[key] += int((lengths == 0).sum())
            if not keep.all():
                tokens, lengths = tokens[np.repeat(keep, lengths)], lengths[keep]
            writers[key].add(tokens, lengths[lengths > 0])
            report.tokens[key] += len(tokens)

    def _reject(self, task: Task, report: Report, reject: Reject, rejects: BinaryIO) -> None:
        path = task.shard.source.path
        entry = {"file": path, "line": report.lines, "reason": reject.reason, "content": reject.content}
        rejects.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        report.rejects += 1
        tolerated = max(0.5, self._job.max_reject_rate)
        if report.rejects >= HOPELESS_REJECTS and report.rejects > tolerated * report.records:
            raise UserError(
                f"input {path}: {report.rejects} of {report.records} records in a row cannot be used, the last "
                f"because: {reject.reason}; is this the right file, --json-keys and --handler-name?"
            )

    def _count(self, task: Task, bytes_read: int, report: Report) -> None:
        counters: array[int] = self._job.progress
        counters[2 * task.number] = bytes_read
        counters[2 * task.number + 1] = sum(report.tokens.values())
        if os.getppid() != self._parent:  # it was killed; the next run must not race with us
            raise EOFError("the parent process is gone")


def lines_before_each(shards: Sequence[Shard], reports: Sequence[Report]) -> list[int]:
    """How many lines of the same file come before each shard."""
    offsets, path, lines = [], "", 0
    for shard, report in zip(shards, reports, strict=True):
        lines = lines if shard.source.path == path else 0
        path = shard.source.path
        offsets.append(lines)
        lines += report.lines
    return offsets

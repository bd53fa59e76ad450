"""Convert one shard of the input to part files, inside a worker process.

A part is `<directory>/<shard>.<key>.bin/.idx`, its rejects, the records of its tasks, and last
`<shard>.json`, the report. A shard with a report is finished, even if the run was killed later. The stage (`stages`)
converts the records.
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

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.indexed import IndexedWriter
from minimind_mcore.preprocess.options import Options
from minimind_mcore.preprocess.readers import InputShard, Reject, ShardReader, rejected
from minimind_mcore.preprocess.stages import Prepared, make_stage
from minimind_mcore.preprocess.tokenize import TokenizerInfo, load_encoder
from minimind_mcore.storage import atomic_file, atomic_write_text

# Large enough that the overhead per call vanishes, small enough that a worker stays far below 1 GiB.
BATCH_CHARS = 1 << 19

# If most records are rejected after this many rejects, the file or the key is wrong, and reading stops.
HOPELESS_REJECTS = 1000

# Maximum number of unread keys that a shard reports: if keys are data (names, dates), their number is unbounded.
MOST_UNUSED = 100


@dataclass(frozen=True)
class ShardContext:
    """The common inputs of all shards of a run.

    Attributes:
        directory: directory of the part files.
        options: options of the conversion.
        info: its tokenizer.
        backend: "tokenizers" or "gigatoken".
        progress: shared memory with two counters per shard: bytes read, tokens written. A worker writes
            only its own shard's counters, so no lock is needed, which a killed worker could keep.
    """

    directory: Path
    options: Options
    info: TokenizerInfo
    backend: str
    progress: Any


@dataclass(frozen=True)
class ShardTask:
    """One shard and its number in input order."""

    number: int
    shard: InputShard


@dataclass
class Report:
    """The result of a shard.

    Attributes:
        number: number of the shard.
        bytes: number of input bytes.
        lines: number of lines or rows read, so that the next shard's lines can be numbered.
        records: number of lines that are not blank.
        rejects, too_long: number of records left out.
        truncated: number of records cut.
        empty: by key, number of records without a token.
        tokens: by key, number of tokens.
        unused: by unread key of the input: in how many records, or messages.
    """

    number: int
    bytes: int
    lines: int = 0
    records: int = 0
    rejects: int = 0
    too_long: int = 0
    truncated: int = 0
    empty: dict[str, int] = dataclasses.field(default_factory=dict)
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    unused: dict[str, int] = dataclasses.field(default_factory=dict)


def part_prefix(directory: Path, number: int, key: str) -> Path:
    """Return the prefix of the dataset with one key of one shard."""
    return directory / f"{number:05d}.{key}"


def rejects_path(directory: Path, number: int) -> Path:
    """Return the rejects file of a shard, with lines counted from its start."""
    return directory / f"{number:05d}.rejects.jsonl"


def beside_path(directory: Path, number: int) -> Path:
    """Return the records file of the tasks of a shard, one line each."""
    return directory / f"{number:05d}.prompts.jsonl"


def report_path(directory: Path, number: int) -> Path:
    """Return the report file of a finished shard."""
    return directory / f"{number:05d}.json"


def finished(directory: Path, count: int) -> dict[int, Report]:
    """Return the reports of shards that an earlier run finished."""
    paths = {number: report_path(directory, number) for number in range(count)}
    return {number: Report(**json.loads(path.read_text())) for number, path in paths.items() if path.is_file()}


@dataclass(frozen=True)
class _Part:
    """The files of a shard during writing."""

    writers: Mapping[str, IndexedWriter]
    rejects: BinaryIO
    beside: BinaryIO


class ShardConverter:
    """Converts shards one after the other. Each worker has one converter."""

    def __init__(self, job: ShardContext) -> None:
        self._job = job
        self._stage = make_stage(job.options, job.info, load_encoder(job.options.tokenizer, job.backend))
        self._parent = os.getppid()

    def __call__(self, task: ShardTask) -> Report:
        """Convert one shard, write its report, and return the report.

        Raises:
            UserError: the input is unreadable, the disk is full, or nearly all records are rejects.
        """
        directory, keys = self._job.directory, self._stage.keys
        report = Report(task.number, task.shard.bytes)
        report.empty, report.tokens = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
        dtype = self._job.options.dtype
        with (
            contextlib.ExitStack() as stack,
            atomic_file(rejects_path(directory, task.number)) as rejects,
            atomic_file(beside_path(directory, task.number)) as beside,
        ):
            writers = {
                key: stack.enter_context(IndexedWriter(part_prefix(directory, task.number, key), dtype)) for key in keys
            }
            self._read(task, report, _Part(writers, rejects, beside))
        atomic_write_text(report_path(directory, task.number), json.dumps(dataclasses.asdict(report)))
        return report

    def _read(self, task: ShardTask, report: Report, part: _Part) -> None:
        reader = ShardReader(task.shard, self._stage.columns)
        self._stage.unused.clear()
        batch: list[tuple[int, Any, Prepared]] = []
        chars = 0
        for line, record in reader:
            report.lines = line
            if record is None:
                continue
            report.records += 1
            prepared = record if isinstance(record, Reject) else self._stage.prepare(record)
            if isinstance(prepared, Reject):
                self._reject(task, report, line, prepared, part)
                continue
            batch.append((line, record, prepared))
            chars += sum(map(len, prepared.texts))
            if chars >= BATCH_CHARS:
                self._write(task, batch, report, part)
                self._count(task, reader.bytes_read, report)
                batch, chars = [], 0
        self._write(task, batch, report, part)
        self._count(task, task.shard.bytes, report)
        self._stage.unused.update({name: rows for name, rows in reader.unread.items() if rows})
        report.unused = dict(self._stage.unused.most_common(MOST_UNUSED))

    def _write(self, task: ShardTask, batch: Sequence[tuple[int, Any, Prepared]], report: Report, part: _Part) -> None:
        """Encode a batch and append it to the part of each key."""
        encoded = self._stage.encode([prepared for _, _, prepared in batch])
        report.too_long += encoded.too_long
        report.truncated += encoded.truncated
        for key, (tokens, lengths) in encoded.sequences.items():
            report.empty[key] += int((lengths == 0).sum())
            part.writers[key].add(tokens, lengths[lengths > 0])
            report.tokens[key] += len(tokens)
        part.beside.writelines(encoded.beside)
        for position, reason in encoded.unusable:
            line, record, _ = batch[position]
            self._reject(task, report, line, rejected(reason, record), part)

    def _reject(self, task: ShardTask, report: Report, line: int, reject: Reject, part: _Part) -> None:
        path = task.shard.source.path
        entry = {"file": path, "line": line, "reason": reject.reason, "content": reject.content}
        part.rejects.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        report.rejects += 1
        tolerated = max(0.5, self._job.options.max_reject_rate)
        if report.rejects >= HOPELESS_REJECTS and report.rejects > tolerated * report.records:
            raise UserError(
                f"input {path}: {report.rejects} of {report.records} records in a row cannot be used, the last "
                f"because: {reject.reason}; is this the right file, --json-keys and --handler-name?"
            )

    def _count(self, task: ShardTask, bytes_read: int, report: Report) -> None:
        counters: array[int] = self._job.progress
        counters[2 * task.number] = bytes_read
        counters[2 * task.number + 1] = sum(report.tokens.values())
        if os.getppid() != self._parent:  # the parent was killed, and the next run must not race with this worker
            raise EOFError("the parent process is gone")


def lines_before_each(shards: Sequence[InputShard], reports: Sequence[Report]) -> list[int]:
    """Return how many lines of the same file come before each shard."""
    offsets, path, lines = [], "", 0
    for shard, report in zip(shards, reports, strict=True):
        lines = lines if shard.source.path == path else 0
        path = shard.source.path
        offsets.append(lines)
        lines += report.lines
    return offsets

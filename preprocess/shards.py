"""Converting one shard of the input into part files, inside a worker process.

A part is `<directory>/<shard>.<key>.bin/.idx`, its rejects, what goes beside its tasks, and last
`<shard>.json`, the report: a shard with a report is finished, whatever happened to the run afterwards.
What becomes of a record, the stage decides (`stages`).
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

# Large enough that the cost per call vanishes, small enough that a worker stays far below 1 GiB.
BATCH_CHARS = 1 << 19

# So many rejects, if they are most of what was read, mean the wrong file or key: no use reading on.
HOPELESS_REJECTS = 1000

# Keys of the input that a shard reports at most: where keys are data (a name, a date), their number has no bound.
MOST_UNUSED = 100


@dataclass(frozen=True)
class ShardContext:
    """What all shards of a run have in common.

    Attributes:
        directory: for the part files.
        options: of the conversion.
        info: of its tokenizer.
        backend: "tokenizers" or "gigatoken".
        progress: shared memory, two counters per shard: bytes read, tokens written. A worker writes
            only its own shard's, so they need no lock that a killed worker could keep.
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
    """What became of a shard.

    Attributes:
        number: of the shard.
        bytes: of input.
        lines: lines or rows read, so that the next shard's lines can be numbered.
        records: of these, not blank.
        rejects, too_long: records left out.
        truncated: records cut short.
        empty: by key, records without a token.
        tokens: by key.
        unused: by key of the input that nothing reads: in how many records, or messages.
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
    """Prefix of the dataset that holds one key of one shard."""
    return directory / f"{number:05d}.{key}"


def rejects_path(directory: Path, number: int) -> Path:
    """The rejects of a shard, with lines counted from its first."""
    return directory / f"{number:05d}.rejects.jsonl"


def beside_path(directory: Path, number: int) -> Path:
    """What goes beside the tasks of a shard, a line for each."""
    return directory / f"{number:05d}.prompts.jsonl"


def report_path(directory: Path, number: int) -> Path:
    """The report of a finished shard."""
    return directory / f"{number:05d}.json"


def finished(directory: Path, count: int) -> dict[int, Report]:
    """Reports of the shards that an earlier run finished."""
    paths = {number: report_path(directory, number) for number in range(count)}
    return {number: Report(**json.loads(path.read_text())) for number, path in paths.items() if path.is_file()}


@dataclass(frozen=True)
class _Part:
    """The files of a shard while they are written."""

    writers: Mapping[str, IndexedWriter]
    rejects: BinaryIO
    beside: BinaryIO


class ShardConverter:
    """Converts shards one after the other; a worker has one."""

    def __init__(self, job: ShardContext) -> None:
        self._job = job
        self._stage = make_stage(job.options, job.info, load_encoder(job.options.tokenizer, job.backend))
        self._parent = os.getppid()

    def __call__(self, task: ShardTask) -> Report:
        """Convert one shard, report it on the disk, and return the report.

        Raises:
            UserError: unreadable input, a full disk, or nearly nothing but rejects.
        """
        directory, keys = self._job.directory, self._stage.keys
        report = Report(task.number, task.shard.bytes)
        report.empty, report.tokens = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
        with contextlib.ExitStack() as stack:
            part = _Part(
                {
                    key: stack.enter_context(
                        IndexedWriter(part_prefix(directory, task.number, key), self._job.options.dtype)
                    )
                    for key in keys
                },
                stack.enter_context(atomic_file(rejects_path(directory, task.number))),
                stack.enter_context(atomic_file(beside_path(directory, task.number))),
            )
            self._read(task, report, part)
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
        if os.getppid() != self._parent:  # it was killed; the next run must not race with us
            raise EOFError("the parent process is gone")


def lines_before_each(shards: Sequence[InputShard], reports: Sequence[Report]) -> list[int]:
    """How many lines of the same file come before each shard."""
    offsets, path, lines = [], "", 0
    for shard, report in zip(shards, reports, strict=True):
        lines = lines if shard.source.path == path else 0
        path = shard.source.path
        offsets.append(lines)
        lines += report.lines
    return offsets

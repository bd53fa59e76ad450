"""The events of a job: lines of its log, rows of its metrics, its state. Each event has an id to continue from.

An id says how much of each source a client has: version of the record, bytes of the log, and identity and bytes of
metrics.jsonl. The events of a job can therefore be continued exactly, also after a restart of the manager, and are not
stored a second time. A training that resumes drops the rows after its checkpoint. It then replaces the file, and the
event `reset` tells the client to forget the rows that it has.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from minimind_mcore.manager.queue import Queue
from minimind_mcore.manager.record import ENDED, LOG, JobRecord
from minimind_mcore.training.metrics import Row, parse_rows, read_history

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
CHUNK = 1 << 16  # bytes that are read at a time; a longer line is cut
CHUNK_OF_ROWS = 1 << 18  # bytes of about 1,000 rows
MOST_CHUNKS = 16
LONGEST_TAIL = 1 << 20  # bytes
ID = re.compile(r"(\d{1,9})-(\d{1,18})-(\d{1,9})-(\d{1,20})-(\d{1,18})")


@dataclass(frozen=True)
class Cursor:
    """What a client has.

    Attributes:
        version: of the record; -1 for none.
        log: bytes of the log.
        attempt: of the rows; a later attempt may have dropped some.
        inode: of the file with the rows.
        rows: bytes of that file.
    """

    version: int = -1
    log: int = 0
    attempt: int = 0
    inode: int = 0
    rows: int = 0

    def __str__(self) -> str:
        return f"{max(self.version, 0)}-{self.log}-{self.attempt}-{self.inode}-{self.rows}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Return the cursor of an id; the beginning for another text."""
        match = ID.fullmatch(text.strip())
        return cls(*map(int, match.groups())) if match else cls()


@dataclass(frozen=True)
class Event:
    """An event: "log", "metrics", "reset" or "state", its JSON, and the cursor of a client that has it."""

    kind: str
    data: dict[str, object]
    cursor: Cursor


def at_tail(log: Path, lines: int) -> Cursor:
    """Return the cursor before the last lines of a log, at most `LONGEST_TAIL` bytes; rows are from the beginning."""
    try:
        file = log.open("rb")
    except OSError:
        return Cursor()
    with file:
        start = max(0, file.seek(0, os.SEEK_END) - LONGEST_TAIL)
        file.seek(start)
        content = file.read()
    place = len(content)
    for _ in range(lines + 1):
        found = content.rfind(b"\n", 0, place)
        if found < 0:
            return Cursor(log=start)
        place = found
    return Cursor(log=start + place + 1)


def news(queue: Queue, job: JobRecord, cursor: Cursor) -> list[Event]:
    """Return what is new since a cursor: log, then metrics, then state. Of much news only a part is returned.

    The state is read first: a client that learns that the job has ended has the whole log.
    """
    version, ended, state = job.version, job.state in ENDED, described(queue, job)
    found: list[Event] = []
    for lines, place in _lines(queue.folder(job) / LOG, cursor.log, ended):
        cursor = replace(cursor, log=place)
        found.append(Event("log", {"lines": lines}, cursor))
        if len(found) == MOST_CHUNKS:
            return found
    for event in _rows(queue.output(job) / METRICS, job.attempt, cursor):
        cursor = event.cursor
        found.append(event)
        if len(found) == MOST_CHUNKS:
            return found
    if version > cursor.version:
        found.append(Event("state", state, replace(cursor, version=version)))
    return found


def _lines(log: Path, place: int, ended: bool) -> Iterator[tuple[list[str], int]]:
    """Yield whole lines of a log and the byte after them; of a job that has ended also what follows the last line."""
    try:
        file = log.open("rb")
    except OSError:
        return
    with file:
        if place > file.seek(0, os.SEEK_END):  # the log was cut, or is another file
            place = 0
        file.seek(place)
        while chunk := file.read(CHUNK):
            end = chunk.rfind(b"\n") + 1
            if not end:
                if len(chunk) < CHUNK and not ended:
                    return
                end = len(chunk)
            place += end
            file.seek(place)
            # Not splitlines: a progress bar's carriage return does not end a line.
            yield chunk[:end].decode(errors="replace").removesuffix("\n").split("\n"), place


def _rows(file: Path, attempt: int, cursor: Cursor) -> Iterator[Event]:
    """Yield new rows; "reset" first if the client has rows of another file or attempt."""
    try:
        opened = file.open("rb")
    except OSError:
        return
    with opened:
        status = os.fstat(opened.fileno())
        if (cursor.attempt, cursor.inode) != (attempt, status.st_ino) or cursor.rows > status.st_size:
            had = cursor.rows > 0
            cursor = replace(cursor, attempt=attempt, inode=status.st_ino, rows=0)
            if had:
                yield Event("reset", {}, cursor)
        opened.seek(cursor.rows)
        while lines := opened.readlines(CHUNK_OF_ROWS):
            content = b"".join(line for line in lines if line.endswith(b"\n"))
            if not content:
                return
            cursor = replace(cursor, rows=cursor.rows + len(content))
            rows = [finite(row) for row in parse_rows(content.decode(errors="replace"))]
            yield Event("metrics", {"rows": rows}, cursor)


def described(queue: Queue, job: JobRecord) -> dict[str, object]:
    """Return a job as JSON for clients."""
    found = job.model_dump(exclude={"mark", "pid", "commands"})
    found |= {"name": job.request.name or job.request.stage, "stage": job.request.stage}
    found["waits_for"] = queue.blockers(job) if job.state == "queued" else []
    return found


def thinned(rows: list[Row], most: int) -> list[Row]:
    """Return at most so many rows, evenly spaced; the last one is always among them."""
    if len(rows) <= most:
        return rows
    step = len(rows) / most
    return [rows[min(len(rows) - 1, int((n + 1) * step) - 1)] for n in range(most)]


def finite(row: Row) -> Row:
    """Return the numbers of a row that JSON can carry."""
    return {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}


def metrics(queue: Queue, job: JobRecord, most: int) -> list[Row]:
    """Return the rows of a job's metrics.jsonl."""
    file = queue.output(job) / METRICS
    try:
        found = file.stat()
    except OSError:
        return []
    return list(_history(file, (found.st_ino, found.st_size, found.st_mtime_ns), most))


@functools.lru_cache(maxsize=16)
def _history(file: Path, version: tuple[int, int, int], most: int) -> tuple[Row, ...]:
    """Return the rows of a version of a file. Pages ask for them every few seconds."""
    return tuple(thinned([finite(row) for row in read_history(file)], most))


def samples(queue: Queue, job: JobRecord, most: int) -> list[Row]:
    """Return the newest sample completions of a reinforcement learning job, the newest first."""
    return read_history(queue.output(job) / SAMPLES)[::-1][:most]

"""Read raw corpora: find files, split them into shards, and yield each record with its line number.

    sources = find_sources("data/a.jsonl,data/more/,data/*.parquet")
    for shard in plan_shards(sources, subsets=1):
        for line, record in ShardReader(shard, keys=["text"]):
            ...                                    # a parsed JSON value, a `Reject`, or None

| file | one record |
|---|---|
| .jsonl, .ndjson, .json (+ .gz, .zst) | a line holding a JSON object |
| .json starting with `[` (+ .gz, .zst) | an element of that array, parsed piece by piece |
| .txt, .text (+ .gz, .zst) | a line, as {"text": line} (as `datasets` and MindSpeed-LLM read it) |
| .parquet | a row, of which only the wanted columns are read |

Names may be in capitals (.JSONL). CSV is refused: its columns have no types and no nesting.

In Parquet every object of a column has the same keys, with null where the record had none. These nulls are dropped, so
that a file converted from JSON Lines reads like the original. Nulls of the original JSON are dropped too.

Lines end with "\\n" (or "\\r\\n"). Blank lines are skipped and do not count as rejects. A byte-order mark at the
start of a file is ignored. Files are streamed: memory is bounded by the longest record.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow
import pyarrow.parquet

from minimind_mcore.errors import UserError

logger = logging.getLogger(__name__)

READ_CHARS = 1 << 20


class JsonArray:
    """Iterate over (line, element) of a stream with one JSON array.

    Args:
        stream: the text. Lines count from 1 at its position.
        path: name of the file in errors.
        limit: maximum length of an element in characters.

    Raises:
        UserError: the array is malformed. The elements after the fault cannot be read.
    """

    def __init__(self, stream: TextIO, path: str, limit: int) -> None:
        self._stream = stream
        self._path = path
        self._limit = limit
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._line = 1

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self._take("[")
        if self._peek() != "]":
            yield self._element()
            while self._peek() == ",":
                self._take(",")
                yield self._element()
        self._take("]")
        if self._peek():
            raise self._fault("there is more after the end of the array")

    def _peek(self) -> str:
        """Return the next character that is not white space; "" at the end of the file."""
        while True:
            rest = self._buffer.lstrip(" \t\r\n")
            self._line += self._buffer.count("\n", 0, len(self._buffer) - len(rest))
            self._buffer = rest or self._stream.read(READ_CHARS)
            if rest or not self._buffer:
                return self._buffer[:1]

    def _take(self, wanted: str) -> None:
        found = self._peek()
        if found != wanted:
            raise self._fault(f"expected {wanted!r}, found {found!r}" if found else f"the file ends before {wanted!r}")
        self._buffer = self._buffer[1:]

    def _element(self) -> tuple[int, Any]:
        self._peek()
        line = self._line
        while True:
            try:
                value, size = self._decoder.raw_decode(self._buffer)
            except (ValueError, RecursionError) as error:
                value, size, why = None, len(self._buffer), str(error)
            else:
                why = ""
            # An element at the end of the buffer may continue after it: 12 may be the start of 123.
            if size < len(self._buffer):
                break
            # Doubling the buffer keeps the total parsing work linear in the element's size.
            more = self._stream.read(max(READ_CHARS, len(self._buffer)))
            if not more and not why:
                break
            if not more or len(self._buffer) > self._limit:
                raise self._fault(f"malformed JSON ({why})")
            self._buffer += more
        self._line += self._buffer.count("\n", 0, size)
        self._buffer = self._buffer[size:]
        return line, value

    def _fault(self, what: str) -> UserError:
        return UserError(
            f"input {self._path}, line {self._line}: {what}; the rest of a broken array cannot be read: repair it, "
            "or write one JSON object per line (.jsonl), where a bad line costs only itself"
        )


LINE_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".txt": "txt", ".text": "txt"}
COMPRESSIONS = (".gz", ".zst")
TABLES = (".csv", ".tsv")
# Files that this kit writes next to its datasets, and that may lie in an input directory.
OWN_FILES = (".rejects.jsonl", ".meta.json", ".bin", ".idx")
SHOWN_IGNORED = 5
PARTS = ".parts"

SHARD_BYTES = 16 << 20
MAX_SHARDS = 4096
MAX_RECORD_BYTES = 256 << 20
READ_BYTES = 1 << 20
PARQUET_ROWS = 512
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """One input file.

    Attributes:
        path: absolute path.
        format: "jsonl", "array", "txt" or "parquet".
        compression: "", ".gz" or ".zst".
        size: size on disk in bytes.
        mtime_ns: modification time.
    """

    path: str
    format: str
    compression: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class InputShard:
    """A part of one input file, small enough to be repeated.

    Attributes:
        source: the file.
        start, stop: range of bytes, or of row groups of a parquet file.
        bytes: share of the file's size.
    """

    source: InputFile
    start: int
    stop: int
    bytes: int


@dataclass(frozen=True)
class Reject:
    """A record that cannot be used.

    Attributes:
        reason: the reason, in a few words.
        content: the raw record, with undecodable bytes escaped.
    """

    reason: str
    content: str


def _format(path: Path) -> tuple[str, str] | None:
    """Return (format, compression) by the file's name, or None if the kind is not supported."""
    suffix, compression = _suffixes(path)
    if path.name.endswith(OWN_FILES):
        return None
    if suffix == ".parquet" and not compression:
        return "parquet", ""
    kind = LINE_FORMATS.get(suffix)
    return (kind, compression) if kind else None


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffixes of format and compression in lower case."""
    name = path.name.lower()
    compression = Path(name).suffix if name.endswith(COMPRESSIONS) else ""
    return Path(name.removesuffix(compression)).suffix, compression


def _expand(pattern: str) -> list[Path]:
    """Return the sorted files of one item of --input. Of a directory or a glob only files of supported kinds."""
    path = Path(pattern).expanduser()
    if path.is_file():
        _refuse_table(path)
        if _format(path) is None:
            known = ", ".join([*LINE_FORMATS, ".parquet"])
            raise UserError(f"input {path}: unknown kind of file; expected {known} (text ones also as .gz or .zst)")
        return [path]
    found = [path] if path.is_dir() else [Path(p) for p in glob.glob(str(path), recursive=True)]
    if not found:
        raise UserError(f"input {pattern}: no such file or directory, and no file matches it as a pattern")
    files = sorted({file for p in found for file in (_below(p) if p.is_dir() else [p])})
    readable = [file for file in files if _format(file)]
    ignored = [file for file in files if not _format(file) and not file.name.endswith(OWN_FILES)]
    for file in ignored:
        _refuse_table(file)
    if not readable:
        raise UserError(f"input {pattern}: no file to read there; expected .jsonl, .json, .txt or .parquet files")
    if ignored:
        names = [file.name for file in ignored[:SHOWN_IGNORED]] + ["..."] * (len(ignored) > SHOWN_IGNORED)
        logger.info(f"input {pattern}: ignored {len(ignored)} files of other kinds ({', '.join(names)})")
    return readable


def _refuse_table(path: Path) -> None:
    """Refuse a CSV file.

    Raises:
        UserError: the file is CSV.
    """
    suffix, _ = _suffixes(path)
    if suffix in TABLES:
        known = ", ".join([*LINE_FORMATS, ".parquet"])
        raise UserError(
            f"input {path}: {suffix[1:].upper()} files are not read; expected {known}. "
            "Convert the file, for example with pandas: read_csv(...).to_json(..., orient='records', lines=True)"
        )


def _below(directory: Path) -> Iterator[Path]:
    """Yield all files below a directory, without hidden files and parts of unfinished conversions."""
    for path in directory.rglob("*"):
        folders = path.relative_to(directory).parts
        if path.is_file() and not any(name.startswith(".") or name.endswith(PARTS) for name in folders):
            yield path


def find_sources(spec: str) -> list[InputFile]:
    """Resolve --input: files, directories (recursive) and globs, separated by commas.

    Returns:
        The files in the given order. Files of a directory or glob are sorted by path. In directories
        hidden files are skipped, and files of unknown kind are counted in a log line.

    Raises:
        UserError: there is no file, a file is of unknown kind or CSV, or a file is given twice.
    """
    items = [spec] if Path(spec).expanduser().exists() else [item.strip() for item in spec.split(",") if item.strip()]
    if not items:
        raise UserError("input: nothing given; expected files, directories or globs, separated by commas")
    sources: dict[str, InputFile] = {}
    for file in (file for item in items for file in _expand(item)):
        path = str(file.resolve())
        if path in sources:
            raise UserError(f"input {file}: given twice (by {spec}); name each file once")
        sources[path] = _source(path)
    return list(sources.values())


def _source(path: str) -> InputFile:
    format_and_compression = _format(Path(path))
    if format_and_compression is None:  # a link named data.jsonl to a file of another kind
        raise UserError(f"input {path}: unknown kind of file")
    kind, compression = format_and_compression
    stat = os.stat(path)
    source = InputFile(path, kind, compression, stat.st_size, stat.st_mtime_ns)
    if kind == "json":
        with open(path, "rb") as raw, _decompressed(source, raw) as stream:
            head = stream.read(4096).removeprefix(BOM).lstrip()
        return replace(source, format="array" if head.startswith(b"[") else "jsonl")
    return source


def plan_shards(sources: Sequence[InputFile], subsets: int) -> list[InputShard]:
    """Split the input into shards that can be converted, and repeated, separately.

    Args:
        sources: result of `find_sources`.
        subsets: approximate minimum number of shards (MindSpeed-LLM's --n-subs). Large inputs are
            split further, so that an interruption costs little. The split never changes the result.

    Returns:
        Shards in input order. A compressed file or a JSON array is one shard, because reading cannot start midway.
    """
    total = sum(source.size for source in sources)
    target = min(max(SHARD_BYTES, -(-total // MAX_SHARDS)), max(1, -(-total // subsets)))
    shards = []
    for source in sources:
        if source.format == "parquet":
            groups = _row_groups(source)
            step = max(1, groups * target // max(1, source.size))
            ranges = [(i, min(i + step, groups)) for i in range(0, groups, step)]
            # Row groups have similar sizes. Their exact size on disk matters only to the progress bar.
            shards += [InputShard(source, i, j, source.size * (j - i) // groups) for i, j in ranges]
        elif source.compression or source.format == "array":
            shards.append(InputShard(source, 0, source.size, source.size))
        else:
            ranges = [(i, min(i + target, source.size)) for i in range(0, source.size, target)]
            shards += [InputShard(source, i, j, j - i) for i, j in ranges]
    return shards


def _row_groups(source: InputFile) -> int:
    with _damage(source.path), pyarrow.parquet.ParquetFile(source.path) as file:
        return int(file.metadata.num_row_groups)


@contextlib.contextmanager
def _damage(path: str) -> Iterator[None]:
    """Name the file in errors of a decompressor or the parquet reader."""
    try:
        yield
    except (EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise UserError(f"input {path}: truncated or damaged ({error}); get the file again") from error
    except OSError as error:
        if error.errno is not None:  # an error of the operating system, not of pyarrow or gzip
            raise
        raise UserError(f"input {path}: truncated or damaged ({error}); get the file again") from error


def _decompressed(source: InputFile, raw: BinaryIO) -> BinaryIO:
    """Return a buffered stream of the decompressed content of the opened file `raw`."""
    if source.compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if source.compression == ".zst":
        # The reader of the zstandard package accepts a truncated file as complete.
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), READ_BYTES)
    return raw


def escape(raw: bytes | str) -> str:
    """Return a rejected record as printable text, cut to 4096 characters."""
    data = raw[:4096].encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw[:4096]
    return data.decode("utf-8", "backslashreplace").rstrip("\r\n")


def kind_of(value: Any) -> str:
    """Describe the type of a JSON value, for a message."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number"}
    names[float] = names[int]
    return names.get(type(value), "null" if value is None else type(value).__name__)


def rejected(reason: str, record: Any) -> Reject:
    """Return a `Reject` for a parsed record."""
    return Reject(reason, escape(json.dumps(record, ensure_ascii=False, default=repr)))


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Reject(f"invalid UTF-8 at byte {error.start + 1}", escape(line))
    except json.JSONDecodeError as error:
        return Reject(f"malformed JSON: {error.msg} at column {error.colno}", escape(line))
    except (ValueError, RecursionError) as error:  # such as a number of 5000 digits, or 10000 nested levels
        return Reject(f"malformed JSON: {error}", escape(line))


def _text_line(line: bytes) -> Any:
    try:
        return {"text": line.decode("utf-8").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return Reject(f"invalid UTF-8 at byte {error.start + 1}", escape(line))


class ShardReader:
    """Iterate over a shard's records, as (number, record).

    The number counts lines or rows from 1 at the shard's start. The record is the
    parsed JSON value (of any type: the caller checks it), a `Reject`, or None for a blank line.

    Args:
        shard: result of `plan_shards`.
        keys: columns to read from a parquet file. None for all.

    Attributes:
        unread: after reading a parquet file: the unread columns, and the number of rows with a value.

    Raises:
        UserError: the file is damaged, and the records after the damage cannot be read.
    """

    def __init__(self, shard: InputShard, keys: Sequence[str] | None) -> None:
        self._shard = shard
        self._keys = keys
        self._raw: BinaryIO | None = None
        self._row_share = 0.0
        self.unread: dict[str, int] = {}

    @property
    def bytes_read(self) -> int:
        """Number of bytes of the shard, on disk, that have been read."""
        if self._raw is not None:
            return min(self._raw.tell() - self._shard.start, self._shard.bytes)
        return int(self._shard.bytes * self._row_share)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        source = self._shard.source
        if source.format == "parquet":
            yield from self._rows()
            return
        with open(source.path, "rb") as self._raw, _damage(source.path):
            stream = _decompressed(source, self._raw)
            if source.format == "array":
                # surrogateescape: invalid UTF-8 bytes become lone surrogates in the element that contains them.
                text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape")
                yield from JsonArray(text, source.path, MAX_RECORD_BYTES)
            else:
                parse = _text_line if source.format == "txt" else _json_line
                for number, line in self._lines(stream):
                    yield number, None if line.isspace() else parse(line)

    def _lines(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Yield the lines that start in the shard."""
        shard = self._shard
        position, number = shard.start, 0
        if position:  # a line that starts before the shard belongs to the previous shard
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while shard.source.compression or position < shard.stop:
            line = stream.readline(MAX_RECORD_BYTES)
            if not line:
                return
            if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
                limit = f"{MAX_RECORD_BYTES >> 20} MiB"
                raise UserError(f"input {shard.source.path}: a line of more than {limit}; is this a text file?")
            number += 1
            yield number, line.removeprefix(BOM) if position == 0 else line
            position += len(line)

    def _rows(self) -> Iterator[tuple[int, Any]]:
        """Yield the rows of the shard's row groups."""
        path = self._shard.source.path
        # A bounded buffer streams the column pages instead of holding a whole row group.
        with _damage(path), pyarrow.parquet.ParquetFile(path, buffer_size=READ_BYTES) as file:
            present = file.schema_arrow.names
            columns = present if self._keys is None else [name for name in self._keys if name in present]
            if self._keys and not columns:
                names, hint = ", ".join(present), "choose with --json-keys or --map-keys"
                raise UserError(f"input {path}: no column {self._keys[0]!r}; it has {names} ({hint})")
            groups = list(range(self._shard.start, self._shard.stop))
            nested = [name for name in columns if pyarrow.types.is_nested(file.schema_arrow.field(name).type)]
            self.unread = {name: _values(file, groups, name) for name in present if name not in columns}
            total = sum(file.metadata.row_group(group).num_rows for group in groups)
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups, columns=columns):
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    row += 1
                    record = dict(zip(columns, values, strict=True))
                    record.update((name, _without_nulls(record[name])) for name in nested)
                    yield row, record
                self._row_share = row / total


def read_records(inputs: str, keys: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Iterate over the records of an input, as (place, record).

    The place is the file and line, for messages. The record is the same as in `ShardReader`. Blank lines are skipped.

    Args:
        inputs: files, directories, globs, separated by commas.
        keys: columns to read from parquet files. None for all.
    """
    for shard in plan_shards(find_sources(inputs), subsets=1):
        for number, record in ShardReader(shard, keys):
            if record is not None:
                yield f"{shard.source.path}, record {number}", record


def sound_records(inputs: str, keys: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Iterate over the records of an input, as `read_records` does.

    Raises:
        UserError: a record cannot be read.
    """
    for place, record in read_records(inputs, keys):
        if isinstance(record, Reject):
            raise UserError(f"{place}: {record.reason}")
        yield place, record


def _without_nulls(value: Any) -> Any:
    """Return a value of a nested column without keys whose value is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _values(file: pyarrow.parquet.ParquetFile, groups: Sequence[int], column: str) -> int:
    """Return how many rows of these row groups have a value in a column, by the file's statistics."""
    count = 0
    for group in map(file.metadata.row_group, groups):
        count += group.num_rows
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema == column and chunk.statistics is not None and chunk.statistics.has_null_count:
                count -= chunk.statistics.null_count
    return count

"""Raw text to indexed datasets for pretraining: `<prefix>_<key>_document.bin/.idx/.meta.json`.

    python preprocess_data.py --input data/sample.jsonl --output-prefix data/sample \\
        --tokenizer-name-or-path data/tokenizer --prepend-bos --append-eod --workers 2

or from a program, with a name chosen from the content, done once and found again afterwards:

    [prefix] = convert(Options("data/sample.jsonl", "data/tokenizer", cache_dir="data/cache"))

The input is cut into shards. Worker processes turn each into part files, which are then concatenated
in input order, so the result does not depend on `workers`, `n_subs` or the tokenizer backend. What an
interrupted run finished lies in `<prefix>.parts/` and is used by the next one with the same request.
The final files appear at the end, by renaming: `.bin`, `.idx`, then the record `.meta.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.handlers import find_handler
from minimind_mcore.preprocess.indexed import bin_path, merge
from minimind_mcore.preprocess.meta import DatasetMeta, SourceRecord, is_complete, meta_path, read_meta, write_meta
from minimind_mcore.preprocess.pool import run_tasks
from minimind_mcore.preprocess.progress import Progress
from minimind_mcore.preprocess.readers import PARTS, Reject, ShardReader, Source, find_sources, plan_shards
from minimind_mcore.preprocess.shards import (
    Job,
    Report,
    ShardConverter,
    Task,
    finished,
    lines_before_each,
    part_prefix,
    rejects_path,
)
from minimind_mcore.preprocess.tokenize import TokenizerInfo, load_encoder, tokenizer_info
from minimind_mcore.storage import atomic_file, disk_errors

# Part of every request: raise it when the same request would give other files than before.
FORMAT = 1
SHOWN_REJECTS = 5
PREVIEWED = 1000


@dataclass(frozen=True)
class Options:
    """One conversion.

    Attributes:
        input: files, directories, globs, separated by commas.
        tokenizer: directory with tokenizer.json.
        output_prefix: of the files to write; None chooses a name in `cache_dir` by content.
        cache_dir: where unfinished parts go (default: beside the output), and see `output_prefix`.
        handler: name from `handlers.HANDLERS`.
        keys: fields to convert, each into a dataset of its own.
        append_eod: end each document with the tokenizer's eos.
        prepend_bos: begin each document with its bos. Both together are MiniMind's pretraining format.
        dtype: "int32" as MindSpeed-LLM expects, or "uint16", half the size.
        seq_length: leave out documents of so many tokens or more; None keeps all.
        backend: "auto", "gigatoken" or "tokenizers".
        workers: processes.
        n_subs: cut the input into at least so many shards.
        max_reject_rate: share of unusable records above which nothing is written.
        overwrite: convert even if the result is there and parts exist.
    """

    input: str
    tokenizer: str
    output_prefix: str | None = None
    cache_dir: str | None = None
    handler: str = "GeneralPretrainHandler"
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    dtype: str = "int32"
    seq_length: int | None = None
    backend: str = "auto"
    workers: int = 1
    n_subs: int = 1
    max_reject_rate: float = 0.001
    overwrite: bool = False


def convert(options: Options) -> list[str]:
    """Convert raw text, or find that it has been converted already.

    Returns:
        The prefix of the dataset of each key.

    Raises:
        UserError: bad options, unusable input, too many rejects, a full disk, a dead worker.
        RuntimeError: a defect, with the traceback of the worker it showed in.
    """
    sources = find_sources(options.input)
    info = tokenizer_info(options.tokenizer)
    _validate(options, info)
    request = request_fingerprint(options, info, sources)
    prefix = _output_prefix(options, sources, request)
    targets = _targets(options, prefix)
    with disk_errors(prefix):
        prefix.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(prefix):
        if _done(options, targets, request):
            _say(f"{prefix}: up to date, nothing to do")
        else:
            _Run(options, info, sources, request, prefix, targets).run()
    return list(targets.values())


def preview(options: Options) -> list[str]:
    """Check all that can be checked without converting, and say what would be converted.

    Returns:
        The prefixes if `convert` would find everything done, else an empty list.

    Raises:
        UserError: what `convert` would raise at once, or none of the first records is usable.
    """
    sources = find_sources(options.input)
    info = tokenizer_info(options.tokenizer)
    _validate(options, info)
    load_encoder(options.tokenizer, options.backend)
    request = request_fingerprint(options, info, sources)
    prefix = _output_prefix(options, sources, request)
    targets = _targets(options, prefix)
    if _done(options, targets, request):
        _say(f"{prefix}: up to date, nothing to do")
        return list(targets.values())
    _try_first_records(options, sources)
    size = sum(source.size for source in sources) / 1e6
    _say(f"would convert {len(sources)} files, {size:.1f} MB, to {', '.join(targets.values())}")
    return []


def _try_first_records(options: Options, sources: Sequence[Source]) -> None:
    """See that the first file has records under these keys."""
    handler = find_handler(options.handler)
    reader = ShardReader(plan_shards(sources, 1)[0], handler.columns(options.keys))
    reason = "it has no records"
    for number, record in itertools.islice(reader, PREVIEWED):
        if record is None:  # a blank line
            continue
        found = record if isinstance(record, Reject) else handler(record, options.keys)
        if not isinstance(found, Reject):
            return
        reason = f"record {number}: {found.reason}"
    raise UserError(f"input {sources[0].path}: no usable record at its beginning; {reason}")


def _targets(options: Options, prefix: Path) -> dict[str, str]:
    return {key: f"{prefix}_{key}_document" for key in options.keys}


def _done(options: Options, targets: dict[str, str], request: str) -> bool:
    found = all(_up_to_date(target, request, options.max_reject_rate) for target in targets.values())
    return found and not options.overwrite


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _validate(options: Options, info: TokenizerInfo) -> None:
    find_handler(options.handler)
    if len(set(options.keys)) < len(options.keys):
        raise UserError(f"--json-keys {' '.join(options.keys)}: a key is given twice")
    for wanted, token, name in ((options.append_eod, info.eos_id, "eos"), (options.prepend_bos, info.bos_id, "bos")):
        if wanted and token is None:
            raise UserError(
                f"tokenizer {info.path}: its tokenizer_config.json names no {name}_token that is in the vocabulary; "
                f"{'--append-eod' if name == 'eos' else '--prepend-bos'} needs one"
            )
    if options.dtype == "uint16" and info.vocab_size > 1 << 16:
        raise UserError(f"--dtype uint16: the tokenizer has {info.vocab_size} ids, uint16 holds 65536; use int32")
    if min(options.workers, options.n_subs) < 1:
        raise UserError(f"--workers {options.workers} --n-subs {options.n_subs}: both must be at least 1")


def request_fingerprint(options: Options, info: TokenizerInfo, sources: Sequence[Source]) -> str:
    """SHA-256 over everything that decides the content of the result, and nothing else."""
    content = {
        "format": FORMAT,
        "sources": [[source.path, source.size, source.mtime_ns] for source in sources],
        "tokenizer": [info.fingerprint, info.bos_id, info.eos_id],
        "options": [getattr(options, name) for name in ("handler", "append_eod", "prepend_bos", "dtype", "seq_length")],
        "keys": options.keys,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _output_prefix(options: Options, sources: Sequence[Source], request: str) -> Path:
    if options.output_prefix is not None:
        return Path(options.output_prefix).expanduser()
    if options.cache_dir is None:
        raise UserError("--output-prefix is missing (with --cache-dir instead, a name is chosen there)")
    first = Path(sources[0].path)
    name = first.name.split(".")[0] if len(sources) == 1 else first.parent.name
    return Path(options.cache_dir).expanduser() / f"{name}-{request[:12]}"


def _up_to_date(target: str, request: str, max_reject_rate: float) -> bool:
    try:
        meta = read_meta(target)
    except UserError:  # a damaged record: make it anew
        return False
    if meta is None or meta.request != request or meta.rejects > max_reject_rate * meta.records:
        return False
    return is_complete(target, meta)


@contextlib.contextmanager
def _exclusive(prefix: Path) -> Iterator[None]:
    """Let one run at a time work on a prefix; a second one waits, and then finds the result."""
    path = prefix.with_name(f".{prefix.name}.lock")
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"{prefix}: another process is converting it; waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before us may have removed the file that we opened; then nobody else sees our lock.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


class _Run:
    """One conversion that has to be done."""

    def __init__(
        self,
        options: Options,
        info: TokenizerInfo,
        sources: Sequence[Source],
        request: str,
        prefix: Path,
        targets: dict[str, str],
    ) -> None:
        self._options = options
        self._info = info
        self._sources = sources
        self._request = request
        self._prefix = prefix
        self._targets = targets
        self._shards = plan_shards(sources, options.n_subs)
        self._parts = prefix.with_name(prefix.name + PARTS)
        if options.cache_dir:  # where outputs of one name in different places must not meet
            place = hashlib.sha256(os.fsencode(prefix.resolve())).hexdigest()[:8]
            self._parts = Path(options.cache_dir).expanduser() / f"{prefix.name}-{place}{PARTS}"

    def run(self) -> None:
        """Shards to parts, parts to the final files."""
        start = time.monotonic()
        directory = self._part_directory()
        reports = self._convert_shards(directory)
        self._check_rejects(directory, reports)
        for key, target in self._targets.items():
            self._publish(directory, reports, key, target)
        shutil.rmtree(self._parts)
        read, seconds = sum(shard.bytes for shard in self._shards), time.monotonic() - start
        _say(f"done in {seconds:.1f} s ({read / 1e6 / seconds:.1f} MB/s)")

    def _part_directory(self) -> Path:
        """Where this request's parts are; those of other requests for the same output are dropped."""
        plan = [self._request, [[s.source.path, s.start, s.stop] for s in self._shards]]
        name = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
        directory = self._parts / name
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        for entry in self._parts.iterdir():
            if entry.name != name or self._options.overwrite:
                shutil.rmtree(entry)
        directory.mkdir(exist_ok=True)
        for leftover in directory.glob(".*.tmp-*"):  # of killed workers
            leftover.unlink(missing_ok=True)
        return directory

    def _convert_shards(self, directory: Path) -> list[Report]:
        """Run the shards that are not done yet; returns all reports in input order."""
        options, info, shards = self._options, self._info, self._shards
        reports = finished(directory, len(shards))
        todo = [Task(number, shard) for number, shard in enumerate(shards) if number not in reports]
        backend = load_encoder(options.tokenizer, options.backend).name
        _say(
            f"{self._prefix}: {len(self._sources)} files, {len(shards)} shards"
            + (f" ({len(reports)} done before)" if reports else "")
            + f", {min(options.workers, len(todo))} workers, tokenizer backend {backend}"
        )
        progress = multiprocessing.get_context("spawn").RawArray("q", 2 * max(1, len(shards)))
        job = Job(
            directory,
            options.tokenizer,
            backend,
            options.handler,
            options.keys,
            options.dtype,
            info.bos_id if options.prepend_bos else None,
            info.eos_id if options.append_eod else None,
            options.seq_length,
            options.max_reject_rate,
            progress,
        )
        done_before = sum(report.bytes for report in reports.values())
        display = Progress(sum(shard.bytes for shard in shards), done_before)
        with contextlib.closing(display):
            tick = lambda: display.show(sum(progress[::2]), sum(progress[1::2]))  # noqa: E731
            for report in run_tasks(ShardConverter, job, todo, options.workers, tick):
                reports[report.number] = report
        return [reports[number] for number in range(len(shards))]

    def _check_rejects(self, directory: Path, reports: Sequence[Report]) -> None:
        """Collect the rejects beside the output, name the first, and stop if they are too many.

        Raises:
            UserError: above the tolerated rate, or nothing usable at all.
        """
        rejects, records = sum(r.rejects for r in reports), sum(r.records for r in reports)
        path = self._prefix.with_name(f"{self._prefix.name}.rejects.jsonl")
        path.unlink(missing_ok=True)
        if rejects:
            self._collect_rejects(directory, reports, path)
            _say(f"{rejects} of {records} records rejected; all of them: {path}")
        if rejects > self._options.max_reject_rate * records:
            raise UserError(
                f"{rejects} of {records} records cannot be used ({rejects / records:.3%}), more than --max-reject-rate "
                f"{self._options.max_reject_rate:g} allows; nothing was written. They are listed in {path}: repair the "
                "input, or raise the rate"
            )
        for key in self._options.keys:
            if not sum(report.tokens[key] for report in reports):
                raise UserError(f"input {self._options.input}: no text under {key!r} in {records} records")

    def _collect_rejects(self, directory: Path, reports: Sequence[Report], path: Path) -> None:
        lines_before = lines_before_each(self._shards, reports)
        shown = 0
        with atomic_file(path) as out:
            for report, offset in zip(reports, lines_before, strict=True):
                with open(rejects_path(directory, report.number), encoding="utf-8") as file:
                    for line in file:
                        entry = json.loads(line)
                        entry["line"] += offset
                        out.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
                        if shown < SHOWN_REJECTS:
                            shown += 1
                            _say(f"rejected: {entry['file']}, line {entry['line']}: {entry['reason']}")

    def _publish(self, directory: Path, reports: Sequence[Report], key: str, target: str) -> None:
        """Put one key's dataset in place, its record last."""
        with disk_errors(bin_path(target)):
            meta_path(target).unlink(missing_ok=True)
            written = merge([part_prefix(directory, report.number, key) for report in reports], target)
        options = self._options
        meta = DatasetMeta(
            request=self._request,
            handler=options.handler,
            key=key,
            dtype=options.dtype,
            append_eod=options.append_eod,
            prepend_bos=options.prepend_bos,
            seq_length=options.seq_length,
            tokenizer=self._info,
            written=written,
            records=sum(report.records for report in reports),
            rejects=sum(report.rejects for report in reports),
            empty=sum(report.empty[key] for report in reports),
            too_long=sum(report.too_long for report in reports),
            sources=[SourceRecord(source.path, source.size, source.mtime_ns) for source in self._sources],
        )
        write_meta(target, meta)
        _say(
            f"{target}: {written.documents:,} documents, {written.tokens:,} tokens, "
            f"{(written.bin_bytes + written.idx_bytes) / 1e6:.1f} MB; left out: {meta.rejects:,} rejected, "
            f"{meta.empty:,} empty, {meta.too_long:,} too long"
        )

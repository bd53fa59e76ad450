"""Convert raw files to indexed datasets: `<prefix>_<key>_document.bin/.idx/.meta.json`.

    python preprocess_data.py --input data/sample.jsonl --output-prefix data/sample \\
        --tokenizer-name-or-path data/tokenizer --prepend-bos --append-eod --workers 2

Without an output prefix, `convert` derives a name from the request. A repeated call finds the finished result:

    [prefix] = convert(Options("data/sample.jsonl", "data/tokenizer", cache_dir="data/cache"))

Conversations become several datasets with MindSpeed-LLM's names:
`data/sft_packed_input_ids_document`, `..._attention_mask_...`, `..._labels_...`. Tasks for reinforcement
learning become the ids of their prompts. `data/rl_packed_prompts.jsonl` has one line per task, in the
same order, with `prompt`, `messages`, `tools`, `open_thinking` and the record's other fields (`gt`).

The input is split into shards. Worker processes convert each shard to part files, which are then concatenated
in input order or packed, so the result does not depend on `workers`, `n_subs` or the tokenizer backend.
`<prefix>.parts/` keeps the finished parts of an interrupted run, and the next run with the same request uses
them. The final files are renamed into place at the end: `.bin`, `.idx`, then the record `.meta.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import multiprocessing
import operator
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.check import digest_problems
from minimind_mcore.preprocess.handlers import ChatHandler
from minimind_mcore.preprocess.indexed import Written, bin_path, copy_chunks, datasets_at, merge
from minimind_mcore.preprocess.messages import report_unused
from minimind_mcore.preprocess.meta import DatasetMeta, SourceRecord, is_complete, meta_path, read_meta, write_meta
from minimind_mcore.preprocess.options import (
    Options,
    beside_file,
    data_paths,
    dataset_prefixes,
    output_prefix,
    request_fingerprint,
    template_digest,
    validate,
)
from minimind_mcore.preprocess.packing import Filling, Plan, SamplesOfKey, plan_packs, write_packed
from minimind_mcore.preprocess.pool import run_tasks
from minimind_mcore.preprocess.readers import PARTS, InputFile, Reject, ShardReader, find_sources, plan_shards
from minimind_mcore.preprocess.shards import (
    Report,
    ShardContext,
    ShardConverter,
    ShardTask,
    beside_path,
    finished,
    lines_before_each,
    part_prefix,
    rejects_path,
)
from minimind_mcore.preprocess.stages import make_stage
from minimind_mcore.preprocess.tokenize import TokenizerInfo, load_encoder, tokenizer_info
from minimind_mcore.progress import ProgressBar
from minimind_mcore.storage import atomic_file, disk_errors, sha256

logger = logging.getLogger(__name__)

SHOWN_REJECTS = 5
PREVIEWED = 1000


def convert(options: Options) -> list[str]:
    """Convert raw files, unless a finished result exists.

    Returns:
        The values of --data-path: the prefix of each key's dataset, or the common prefix of conversations.

    Raises:
        UserError: invalid options, unusable input, too many rejects, a full disk, or a dead worker.
        RuntimeError: a bug, with the traceback of the worker.
    """
    sources, info, request, prefix = _prepare(options)
    with disk_errors(prefix):
        prefix.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(prefix):
        if _done(options, prefix, request):
            logger.info(f"{prefix}: up to date, nothing to do")
        else:
            _refuse_others(options, prefix)
            _Run(options, info, sources, request, prefix).run()
    return data_paths(options, prefix)


def _prepare(options: Options) -> tuple[list[InputFile], TokenizerInfo, str, Path]:
    """Check the options. Return the input files, the tokenizer, the digest of the request and the output prefix."""
    sources = find_sources(options.input)
    info = tokenizer_info(options.tokenizer)
    validate(options, info)
    if options.prepend_bos and info.bos_id is None:
        logger.info(f"tokenizer {info.path}: it has no bos_token; documents begin with their text")
    request = request_fingerprint(options, info, sources)
    prefix = output_prefix(options, sources, request)
    return sources, info, request, prefix


def preview(options: Options) -> list[str]:
    """Check everything that can be checked without converting, and log the conversion.

    Returns:
        The result of `convert` if it is already finished, else an empty list.

    Raises:
        UserError: an error that `convert` would raise at once, or none of the first records is usable.
    """
    sources, info, request, prefix = _prepare(options)
    if _done(options, prefix, request):
        logger.info(f"{prefix}: up to date, nothing to do")
        return data_paths(options, prefix)
    _try_first_records(options, info, sources)
    size = sum(source.size for source in sources) / 1e6
    logger.info(f"would convert {len(sources)} files, {size:.1f} MB, to {', '.join(data_paths(options, prefix))}")
    return []


def _try_first_records(options: Options, info: TokenizerInfo, sources: Sequence[InputFile]) -> None:
    """Check that the first non-empty file has records that the handler can use."""
    stage = make_stage(options, info, load_encoder(options.tokenizer, options.backend))
    reason = "it has no records"
    shards = plan_shards(sources, 1)
    if not shards:
        raise UserError(f"input {options.input}: it has no records")
    for number, record in itertools.islice(ShardReader(shards[0], stage.columns), PREVIEWED):
        if record is None:  # a blank line
            continue
        found = record if isinstance(record, Reject) else stage.prepare(record)
        if not isinstance(found, Reject):
            unusable = stage.encode([found]).unusable
            if not unusable:
                return
            found = Reject(unusable[0][1], "")
        reason = f"record {number}: {found.reason}"
    raise UserError(f"input {shards[0].source.path}: no usable record at its beginning; {reason}. {_repair(options)}")


def _repair(options: Options) -> str:
    """Return what to do about records that cannot be used."""
    if isinstance(options.find_handler(), ChatHandler):
        names = "its format with --handler-name (HANDLER_NAME) and its fields with --map-keys (MAP_KEYS)"
    else:
        names = "the field of its text with --json-keys (JSON_KEYS)"
    return f"Repair the input, or name {names}"


def _done(options: Options, prefix: Path, request: str) -> bool:
    beside = beside_file(options, prefix)
    targets = dataset_prefixes(options, prefix).values()
    found = all(_up_to_date(target, request, options.max_reject_rate) for target in targets)
    return found and (beside is None or beside.is_file()) and not options.overwrite


def _refuse_others(options: Options, prefix: Path) -> None:
    """Refuse a prefix that other conversions have used, because readers of conversations load all datasets of a prefix.

    Raises:
        UserError: there are datasets that this conversion would not replace.
    """
    others = set(datasets_at(prefix)) - set(dataset_prefixes(options, prefix).values()) - {str(prefix)}
    if isinstance(options.find_handler(), ChatHandler) and others:
        raise UserError(f"--output-prefix {prefix}: it holds other datasets ({min(others)}); choose another prefix")


def _unused(reports: Sequence[Report]) -> Counter[str]:
    """Return how often each key of the input was not read, over all shards."""
    return sum((Counter(report.unused) for report in reports), Counter[str]())


def _up_to_date(target: str, request: str, max_reject_rate: float) -> bool:
    try:
        meta = read_meta(target)
    except UserError:  # a damaged record: convert again
        return False
    if meta is None or meta.request != request or meta.rejects > max_reject_rate * meta.records:
        return False
    return is_complete(target, meta) and not digest_problems(target, meta)


@contextlib.contextmanager
def _exclusive(prefix: Path) -> Iterator[None]:
    """Lock a prefix. A second run waits, and then finds the result."""
    path = prefix.with_name(f".{prefix.name}.lock")
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info(f"{prefix}: another process is converting it; waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            # The previous holder may have removed the file that we opened. Other processes would not see our lock.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


@dataclass
class _Run:
    """One conversion that has no finished result."""

    _options: Options
    _info: TokenizerInfo
    _sources: Sequence[InputFile]
    _request: str
    _prefix: Path

    def __post_init__(self) -> None:
        options, prefix = self._options, self._prefix
        self._targets = dataset_prefixes(options, prefix)
        self._shards = plan_shards(self._sources, options.n_subs)
        self._parts = prefix.with_name(prefix.name + PARTS)
        if options.cache_dir:  # outputs of the same name in different directories must not collide
            place = hashlib.sha256(os.fsencode(prefix.resolve())).hexdigest()[:8]
            self._parts = Path(options.cache_dir).expanduser() / f"{prefix.name}-{place}{PARTS}"

    def run(self) -> None:
        """Convert shards to parts, then parts to the final files."""
        start = time.monotonic()
        directory = self._part_directory()
        reports = self._convert_shards(directory)
        self._check_rejects(directory, reports)
        report_unused(_unused(reports))
        self._publish_beside(directory, reports)
        plan = self._plan(directory, reports)
        for key, target in self._targets.items():
            self._publish(directory, reports, key, target, plan)
        shutil.rmtree(self._parts)
        read, seconds = sum(shard.bytes for shard in self._shards), time.monotonic() - start
        logger.info(f"done in {seconds:.1f} s ({read / 1e6 / seconds:.1f} MB/s)")

    def _part_directory(self) -> Path:
        """Return the directory of this request's parts, and remove parts of other requests for the same output."""
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
        """Convert the remaining shards. Return all reports in input order."""
        options, info, shards = self._options, self._info, self._shards
        reports = finished(directory, len(shards))
        todo = [ShardTask(number, shard) for number, shard in enumerate(shards) if number not in reports]
        backend = load_encoder(options.tokenizer, options.backend).name
        logger.info(
            f"{self._prefix}: {len(self._sources)} files, {len(shards)} shards"
            + (f" ({len(reports)} done before)" if reports else "")
            + f", {min(options.workers, len(todo))} workers, tokenizer backend {backend}"
        )
        progress = multiprocessing.get_context("spawn").RawArray("q", 2 * max(1, len(shards)))
        job = ShardContext(directory, options, info, backend, progress)
        done_before = sum(report.bytes for report in reports.values())
        with ProgressBar("converting", sum(shard.bytes for shard in shards), done_before) as display:
            tick = lambda: display.show(sum(progress[::2]), sum(progress[1::2]))  # noqa: E731
            for report in run_tasks(ShardConverter, job, todo, options.workers, tick):
                reports[report.number] = report
        return [reports[number] for number in range(len(shards))]

    def _check_rejects(self, directory: Path, reports: Sequence[Report]) -> None:
        """Collect the rejects next to the output, log the first ones, and stop if there are too many.

        Raises:
            UserError: the rate is above the limit, or no record is usable.
        """
        rejects, records = sum(r.rejects for r in reports), sum(r.records for r in reports)
        path = self._prefix.with_name(f"{self._prefix.name}.rejects.jsonl")
        path.unlink(missing_ok=True)
        if rejects:
            self._collect_rejects(directory, reports, path)
            logger.info(f"{rejects} of {records} records rejected; all of them: {path}")
        if rejects > self._options.max_reject_rate * records:
            raise UserError(
                f"{rejects} of {records} records cannot be used ({rejects / records:.3%}), more than --max-reject-rate "
                f"{self._options.max_reject_rate:g} allows; nothing was written. They are listed in {path}. "
                f"{_repair(self._options)}, or raise the rate"
            )
        if not records:
            raise UserError(f"input {self._options.input}: it has no records; nothing was written")
        for key in self._targets:
            if not sum(report.tokens[key] for report in reports):
                long = sum(report.too_long for report in reports)
                why = f" ({long} are too long for --seq-length {self._options.seq_length})" if long else ""
                raise UserError(f"input {self._options.input}: no text under {key!r} in {records} records{why}")

    def _collect_rejects(self, directory: Path, reports: Sequence[Report], path: Path) -> None:
        lines_before = lines_before_each(self._shards, reports)
        shown = 0
        with atomic_file(path) as out:
            for report, offset in zip(reports, lines_before, strict=True):
                with open(rejects_path(directory, report.number), encoding="utf-8") as file:
                    for entry in sorted(map(json.loads, file), key=operator.itemgetter("line")):
                        entry["line"] += offset
                        out.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
                        if shown < SHOWN_REJECTS:
                            shown += 1
                            logger.info(f"rejected: {entry['file']}, line {entry['line']}: {entry['reason']}")

    def _plan(self, directory: Path, reports: Sequence[Report]) -> Plan | None:
        """Plan which samples share a sequence, if packing is enabled."""
        if not self._options.chat.pack:
            return None
        samples = SamplesOfKey([part_prefix(directory, report.number, "input_ids") for report in reports])
        return plan_packs(samples.lengths, (self._options.seq_length or 0) - 1)

    def _publish_beside(self, directory: Path, reports: Sequence[Report]) -> None:
        """Concatenate the shards' records of tasks to the records file, if the handler writes tasks."""
        path = beside_file(self._options, self._prefix)
        if path is not None:
            with atomic_file(path) as out:
                for report in reports:
                    out.writelines(copy_chunks(beside_path(directory, report.number)))

    def _publish(self, directory: Path, reports: Sequence[Report], key: str, target: str, plan: Plan | None) -> None:
        """Write one key's dataset from the parts. `.meta.json` comes last, because it marks a finished dataset."""
        parts = [part_prefix(directory, report.number, key) for report in reports]
        with disk_errors(bin_path(target)):
            meta_path(target).unlink(missing_ok=True)
            if plan is None:
                written = merge(parts, target)
            else:
                options, pad = self._options, self._info.pad_id or 0
                filling = Filling(options.seq_length or 0, pad, options.chat.pack == "neat-pack")
                written = write_packed(parts, key, plan, target, filling)
        meta = self._meta(reports, key, written, plan)
        write_meta(target, meta)
        packed = f" of {meta.samples:,} samples" if plan is not None else ""
        logger.info(
            f"{target}: {written.documents:,} documents{packed}, {written.tokens:,} tokens, "
            f"{(written.bin_bytes + written.idx_bytes) / 1e6:.1f} MB; left out: {meta.rejects:,} rejected, "
            f"{meta.empty:,} empty, {meta.too_long:,} too long; cut: {meta.truncated:,}"
        )

    def _meta(self, reports: Sequence[Report], key: str, written: Written, plan: Plan | None) -> DatasetMeta:
        options, chat = self._options, None
        if isinstance(handler := options.find_handler(), ChatHandler):
            chat = dataclasses.asdict(options.chat.resolved(handler, self._info))
            chat["template"] = template_digest(options)
        return DatasetMeta(
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
            truncated=sum(report.truncated for report in reports),
            samples=written.documents if plan is None else len(plan.order),
            chat=chat,
            unused=dict(_unused(reports)),
            prompts_sha256=sha256(prompts) if (prompts := beside_file(options, self._prefix)) else None,
        )

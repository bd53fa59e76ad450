"""Run a conversion: read, write, verify, publish.

    result = convert(open_source(path), HFTarget(source, native=False, folder=None), Path("out"))

Each tensor of the whole megatron-core model is read once, hashed, and written to the target, whose files are hashed
while they fill. Then the output is opened with the ordinary readers and must give the same tensors: both sides compute
a digest. After that the output is moved to its final path in one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import xxhash
from torch import Tensor

from minimind_mcore.checkpoint.source import Lazy, Source, require_finite
from minimind_mcore.checkpoint.tensors import TensorWriter, as_bytes
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.documents import read_object
from minimind_mcore.platform.processor import usable_cores
from minimind_mcore.progress import ProgressBar
from minimind_mcore.storage import (
    MANIFEST,
    FileEntry,
    check_manifest,
    disk_errors,
    free_bytes,
    fsync,
    publish_directory,
    remove_abandoned,
    temporary_beside,
)


class Sealing(contextlib.AbstractContextManager["Sealing"]):
    """Hashes files in its own threads while other threads write. A file is hashed in order, by one thread at a time.

    Args:
        writers: writers of the files.
    """

    def __init__(self, writers: Sequence[TensorWriter]) -> None:
        self._writers = writers
        self._hashing: dict[Path, Future[None]] = {}
        self._closing: dict[Path, Future[FileEntry]] = {}
        self._executor = ThreadPoolExecutor(max(2, min(4, usable_cores())))

    def advance(self) -> None:
        """Continue hashing where new bytes are complete."""
        for writer in self._writers:
            running = self._hashing.get(writer.path)
            if writer.can_hash and (running is None or running.done()):
                if running is not None:
                    running.result()
                self._hashing[writer.path] = self._executor.submit(writer.hash_written)

    def finish(self) -> None:
        """Start to close the files after the last write."""
        self._closing = {writer.path: self._executor.submit(writer.close) for writer in self._writers}

    def entries(self, root: Path) -> dict[str, FileEntry]:
        """Wait for the files, and return their manifest entries by path below the root.

        Raises:
            UserError: the disk is full.
        """
        return {str(path.relative_to(root)): future.result() for path, future in self._closing.items()}

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


class Target(contextlib.AbstractContextManager["Target"]):
    """The files that a conversion fills. Base class of the output formats.

    A conversion calls `create`, then `write` for each tensor, `finish` for the files without tensors, and `record` for
    the manifest.

    Args:
        source: source of the conversion.
        kind: format, for messages.
        nbytes: size of all tensors in bytes.
    """

    single_file: str | None = None  # name of the file, if the output is not a directory

    def __init__(self, source: Source, kind: str, nbytes: int) -> None:
        self.source, self.kind, self.nbytes = source, kind, nbytes
        self.root = Path()  # `convert` sets the directory to fill
        self.writers: list[TensorWriter] = []

    @abstractmethod
    def create(self) -> None:
        """Create the files at full size in the empty directory `root`."""

    @abstractmethod
    def write(self, name: str, whole: Tensor) -> None:
        """Write all tensors of the target that are made from one tensor of the whole megatron-core model."""

    def finish(self) -> None:  # most formats have no other files
        """Write the files without tensors. Afterwards the target can be opened."""

    @abstractmethod
    def record(self, manifest: Mapping[str, FileEntry], about: Mapping[str, object]) -> None:
        """Write the manifest, and files that must come last.

        Args:
            manifest: size and digest of every tensor file, by its path below the root.
            about: further entries of the manifest.
        """

    def reopen(self) -> Mapping[str, Lazy]:
        """Return the tensors of the whole megatron-core model, read from the output."""
        from minimind_mcore.checkpoint.opening import open_source

        return open_source(self.root).tensors

    def unwritten(self) -> list[str]:
        """Return the names of tensors with a byte that was not written, or was written twice."""
        return [f"{writer.path.name}: {name}" for writer in self.writers for name in writer.unwritten()]

    def __exit__(self, *error: object) -> None:
        for writer in self.writers:
            writer.abandon()


# Space for small files, headers and directories besides the tensors.
SLACK_BYTES = 16 << 20
DIGEST = "xxh3_128"  # key of the digest of the weights in the manifest
Digests = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """The result of a conversion.

    Attributes:
        path: path of the output.
        tensors: number of tensors of the whole megatron-core model.
        nbytes: number of bytes written.
        seconds: duration.
        digest: digest of the weights, independent of the format.
    """

    path: Path
    tensors: int
    nbytes: int
    seconds: float
    digest: str


def convert(
    source: Source, target: Target, output: Path, probe: Callable[[Mapping[str, Lazy], Path], None] | None = None
) -> Result:
    """Convert, verify and publish.

    Args:
        source: the source.
        target: the target.
        output: path of the directory or file to create.
        probe: a further check of the output. It gets the tensors of the output and its directory.

    Raises:
        UserError: the source, the target or the disk has a fault. The output is not created then.
    """
    started = time.monotonic()
    require_free(output)
    require_space(output, target.nbytes)
    with staging(output) as tmp, target, ThreadPool() as pool, disk_errors(output):
        require_whole(source)
        target.root = tmp
        target.create()
        with Sealing(target.writers) as sealing:
            digests = stream(source, target, sealing, pool)
            target.finish()
            written = target.reopen()
            sealing.finish()
            verify(source, written, digests, pool)  # while the files are hashed
            digest = combined(digests)
            require_digest(source, digest)
            entries = sealing.entries(tmp)
        target.record(entries, {"weights": {DIGEST: digest, "tensors": len(digests)}})
        if probe:
            probe(written, tmp)
        publish(tmp, output, target.single_file)
    return Result(output, len(digests), target.nbytes, time.monotonic() - started, digest)


# ------------------------------------------------------------------------------------------------------- pass


def stream(source: Source, target: Target, sealing: Sealing, pool: ThreadPool) -> Digests:
    """Read every tensor once and write it to the target. Return the digests of the tensors by name."""

    def pass_on(name: str) -> str:
        tensor = source.tensors[name].read()
        digest = checked_digest(name, source.tensors[name], tensor)
        require_finite(name, tensor)
        target.write(name, tensor)
        return digest

    for check in source.checks:
        check()
    digests: Digests = {}
    with ProgressBar("converting", source.nbytes) as progress:
        for name, digest in pool.map(pass_on, source.tensors):
            digests[name] = digest
            progress.add(source.tensors[name].nbytes)
            sealing.advance()
    _require_nothing("not read, or read twice, in the source", source.unread())
    _require_nothing("not written, or written twice", target.unwritten())
    return digests


def checked_digest(name: str, expected: Lazy, tensor: Tensor) -> str:
    """Check shape and dtype of a tensor, and return its digest: dtype, shape, 128-bit XXH3 of its bytes.

    XXH3 detects accidental damage at memory speed. It need not resist forgery, because the manifest has SHA-256
    digests of the files.

    Raises:
        UserError: shape or dtype differ from the expected ones.
    """
    if (tuple(tensor.shape), tensor.dtype) != (expected.shape, expected.dtype):
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise UserError(f"{name}: found {found}, expected {expected.shape} {expected.dtype}")
    return f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(as_bytes(tensor))}"


def combined(digests: Mapping[str, str]) -> str:
    """Return one digest of all tensors."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


def require_whole(source: Source) -> None:
    """Verify the source's files with its manifest, if there is one.

    Files of torch have checksums that are verified while reading, and a converter's manifest has a digest of the
    weights. Whole files are hashed only if both are missing.

    Raises:
        UserError: files differ. The message names them.
    """
    if (source.path / MANIFEST).is_file():
        by_itself = recorded_digest(source) or all(file.has_checksums for file in source.files)
        _require_undamaged(check_manifest(source.path, contents=not by_itself))


def require_digest(source: Source, digest: str) -> None:
    """Compare the digest of the weights with the manifest, if the manifest has one.

    Raises:
        UserError: the digests differ. The message names the files.
    """
    recorded = recorded_digest(source)
    if recorded not in (None, digest):
        problem = f"{source.path}: the weights have digest {digest}, but {MANIFEST} has {recorded}"
        _require_undamaged(check_manifest(source.path) or [problem])


def recorded_digest(source: Source) -> str | None:
    """Return the digest of the source's tensors in its manifest, unless the tensors were changed after reading."""
    if not source.as_stored or not (source.path / MANIFEST).is_file():
        return None
    weights = read_object(source.path / MANIFEST, "the source is damaged; get it again").get("weights", {})
    digest = weights.get(DIGEST) if isinstance(weights, dict) else weights
    if digest is not None and not isinstance(digest, str):
        raise UserError(f"{source.path / MANIFEST}: weights: found {weights!r}, expected digests; get it again")
    return digest


def _require_undamaged(problems: list[str]) -> None:
    if problems:
        raise UserError("\n  ".join(["the source is damaged; get it again:", *problems]))


# ----------------------------------------------------------------------------------------------------- verify


def verify(source: Source, written: Mapping[str, Lazy], digests: Mapping[str, str], pool: ThreadPool) -> None:
    """Read the output, and compare it with the source.

    Raises:
        UserError: a tensor is missing, or differs.
    """
    _require_nothing("written and not read back", [name for name in digests if name not in written])

    def digest_of(name: str) -> str:
        return checked_digest(name, source.tensors[name], written[name].read())

    differ = []
    with ProgressBar("checking", source.nbytes) as progress:
        for name, found in pool.map(digest_of, digests):
            differ += [name] if found != digests[name] else []
            progress.add(written[name].nbytes)
    _require_nothing("not the same when read back", differ)


def _require_nothing(what: str, names: list[str]) -> None:
    if names:
        more = ", ..." if len(names) > 4 else ""
        raise UserError(f"self-check: {len(names)} tensors {what}: {', '.join(names[:4])}{more}; nothing is written")


# ---------------------------------------------------------------------------------------------------- publish


def require_free(output: Path) -> None:
    """Refuse to overwrite an existing output."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists already: give another --save-dir, or remove it")


def require_space(output: Path, nbytes: int) -> None:
    """Check the free disk space before anything is read."""
    free = free_bytes(output)
    if free < nbytes + SLACK_BYTES:
        raise UserError(
            f"{output}: {(nbytes + SLACK_BYTES) / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free; "
            "free some space or choose another disk"
        )


@contextlib.contextmanager
def staging(output: Path) -> Iterator[Path]:
    """Yield a temporary directory next to the output, and remove it at the end.

    The temporary directories of killed conversions are removed first.
    """
    remove_abandoned(output)
    tmp = temporary_beside(output)
    missing = [p for p in tmp.absolute().parents if not p.exists()]
    try:
        tmp.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be created ({error.strerror})") from error
    try:
        yield tmp
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        with contextlib.suppress(OSError):  # a parent that holds the output is not empty
            for parent in missing:
                parent.rmdir()


def publish(tmp: Path, output: Path, single_file: str | None) -> None:
    """Move the output to its final path."""
    if single_file is None:
        publish_directory(tmp, output)
        return
    os.replace(tmp / single_file, output)
    fsync(output.parent)


# ---------------------------------------------------------------------------------------------------- threads


class ThreadPool(contextlib.AbstractContextManager["ThreadPool"]):
    """Worker threads. Reading, hashing and writing release the GIL, so the threads run in parallel."""

    def __init__(self) -> None:
        self._workers = max(2, min(4, usable_cores()))
        # torch gets one core per worker, because the workers already use all cores
        self._executor = ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, work: Callable[[str], T], names: Iterable[str]) -> Iterator[tuple[str, T]]:
        """Yield (name, result) in order of completion. At most one task per thread runs, which bounds the memory.

        Raises:
            UserError: raised by a task.
        """
        running: dict[Future[T], str] = {}
        for name in names:
            if len(running) == self._workers:
                yield from self._ready(running)
            running[self._executor.submit(work, name)] = name
        while running:
            yield from self._ready(running)

    def _ready(self, running: dict[Future[T], str]) -> Iterator[tuple[str, T]]:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

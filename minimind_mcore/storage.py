"""Files that are either whole or absent: atomic writes, checksummed directories.

    with atomic_file(path) as f:          # f is a binary file; path appears when the block ends
        f.write(b"...")

    with atomic_directory(path) as tmp:   # tmp is a pathlib.Path beside `path`
        (tmp / "weights.pt").write_bytes(...)

A crash, a kill or a full disk inside the block leaves whatever stood at `path` before.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import psutil

from minimind_mcore.errors import NO_SPACE, UserError

MANIFEST = "manifest.json"
FileEntry = dict[str, int | str]  # of a file in a manifest: "bytes" and "sha256"


def fsync(path: Path) -> None:
    """Make a file, or the entries of a directory, durable; a rename is durable only after this."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_errors(path: Path, written: Path | None = None) -> Iterator[None]:
    """Turn the errors of a full disk, and of a file-size limit, into a `UserError` that names the file.

    Libraries wrap the system's error (megatron-core), or hide it (torch.save says "unexpected pos", numpy gives no
    errno): then a disk with next to nothing left, or a file that is as large as the limit, is the reason.

    Args:
        path: what is written in the block.
        written: the temporary file or directory that becomes `path`, if there is one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        where, free = existing(path), free_bytes(path)
        code = _no_space(error)
        hidden = code is None and getattr(error, "errno", None) is None
        if code in (errno.ENOSPC, errno.EDQUOT) or (hidden and free < 1 << 20):
            raise disk_full(path, free, where) from error
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        met = hidden and limit != resource.RLIM_INFINITY and _largest(written or path) >= limit
        if code == errno.EFBIG or met:
            raise UserError(
                f"file too large while writing {path}: the limit is {limit} bytes a file (ulimit -f), or that of the "
                "filesystem; nothing that was finished before is lost. Raise the limit and run the same command again."
            ) from error
        raise


def existing(path: Path) -> Path:
    """Return a path, or the nearest directory above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def free_bytes(path: Path) -> int:
    """Return the free bytes where a path is, or will be."""
    return shutil.disk_usage(existing(path)).free


def set_aside(path: Path) -> Path | None:
    """Give a file or directory a free name; return that name. Nothing if it does not exist or is an empty directory."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    number = 1
    while (free := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(free)


def _no_space(error: BaseException | None) -> int | None:
    """Return the number of the system's error behind an exception, if it is one of `NO_SPACE`."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _largest(path: Path) -> int:
    """Return the size of the largest file at or below a path."""
    files = path.rglob("*") if path.is_dir() else [path]
    return max((file.stat().st_size for file in files if file.is_file()), default=0)


def disk_full(path: Path, free: int, where: Path) -> UserError:
    """Return the error of a full disk."""
    return UserError(
        f"disk full while writing {path}: {free / 2**20:.1f} MiB free at {where}; "
        "nothing that was finished before is lost. Free some space and run the same command again."
    )


def append_line(path: Path, text: str, advice: str) -> None:
    """Append a line to a text file.

    Args:
        path: of the file.
        text: without the line's end.
        advice: what to do where the file cannot be written.

    Raises:
        UserError: the file cannot be written, or the disk is full.
    """
    with writing(path, advice), open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")


# What a place that cannot be written answers: no permission, a read-only disk, a file where a directory should be.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT)


@contextlib.contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Turn the errors of a place that cannot be written, and of a full disk, into a `UserError`.

    Args:
        path: what is written in the block.
        advice: what to do.
    """
    with disk_errors(path):
        try:
            yield
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise
            raise UserError(f"{path}: cannot be written ({error.strerror}); {advice}") from error


def require_writable(directory: Path, advice: str) -> None:
    """Refuse a directory in which, or below whose nearest existing parent, this process cannot write.

    Raises:
        UserError: see above; nothing is created.
    """
    place = existing(directory.absolute())
    if not place.is_dir():
        code = errno.ENOTDIR
    elif os.access(place, os.W_OK | os.X_OK):
        return
    else:
        code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
    raise UserError(f"{directory}: cannot be written ({os.strerror(code)}); {advice}")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write `path` through a temporary file beside it: fsync, then rename.

    Raises:
        UserError: the disk is full (the temporary file is removed, the old `path` is untouched).
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with disk_errors(path, tmp):  # inside: the file that has filled the disk, or has met a limit, is still there
            with open(tmp, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
            fsync(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def write_json_lines(path: str | os.PathLike[str], records: Sequence[Mapping[str, object]]) -> None:
    """Write one JSON object a line, as `atomic_file` does."""
    with atomic_file(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file atomically (UTF-8)."""
    with atomic_file(path) as f:
        f.write(text.encode("utf-8"))


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a temporary directory beside `path`, then rename it to `path`, replacing what was there.

    Raises:
        UserError: the disk is full (the temporary directory is removed).
    """
    path = Path(path)
    tmp = temporary_beside(path)
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        with disk_errors(path, tmp):
            tmp.mkdir(parents=True)
            yield tmp
            publish_directory(tmp, path)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def temporary_beside(path: Path) -> Path:
    """Return this process's temporary path for `path`: hidden, unique, and on the same filesystem."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def remove_abandoned(path: Path) -> None:
    """Remove temporary files of `path` that killed processes of this host left."""
    prefix = temporary_beside(path).name.removesuffix(str(os.getpid()))
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        owner = left.name.removeprefix(prefix)
        if left.name.startswith(prefix) and owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def publish_directory(tmp: Path, path: Path) -> None:
    """Fsync every file below `tmp` and rename `tmp` to `path`, replacing a directory there."""
    for file in sorted(p for p in tmp.rglob("*") if p.is_file()):
        fsync(file)
    fsync(tmp)
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        os.replace(path, old)
    os.replace(tmp, path)
    fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 18))  # small enough to stay in a core's cache
    with open(path, "rb", buffering=0) as f:
        while count := f.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def file_entry(path: Path) -> FileEntry:
    """Return size and SHA-256 of a file, for a manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_manifest(directory: Path, entries: dict[str, FileEntry], **about: object) -> None:
    """Write `manifest.json` with the files of a directory by relative name, and further entries by keyword."""
    _write_entries(directory / MANIFEST, entries, **about)


def _write_entries(manifest: Path, entries: dict[str, FileEntry], **about: object) -> None:
    atomic_write_text(manifest, json.dumps({"files": entries, **about}, indent=1) + "\n")


def record_files(record: Path, files: Sequence[Path]) -> None:
    """Write a manifest of some files in the directory of `record`, under the name of `record`. See `check_manifest`."""
    _write_entries(record, {file.name: file_entry(file) for file in files})


def check_manifest(
    directory: Path, share: int = 0, shares: int = 1, contents: bool = True, name: str = MANIFEST
) -> list[str]:
    """Compare a directory's files, or one of `shares` equal shares of them, with the manifest.

    Args:
        directory: directory of the files.
        share: number of the share.
        shares: number of shares.
        contents: hash the files; otherwise check only existence and size.
        name: file name of the manifest.

    Returns:
        One line per problem (missing, wrong size, wrong digest).
    """
    entries = read_entries(directory / name)
    if entries is None:
        return [f"{directory / name}: not a readable manifest"]
    problems = []
    for listed, want in list(entries.items())[share::shares]:
        file = directory / listed
        if not file.is_file():
            problems.append(f"{file}: missing, but listed in {name}")
        elif file.stat().st_size != want["bytes"]:
            problems.append(f"{file}: {file.stat().st_size} bytes, expected {want['bytes']}")
        elif contents and sha256(file) != want["sha256"]:
            problems.append(f"{file}: content differs from its SHA-256 in {name}")
    return problems


def read_entries(manifest: Path) -> dict[str, FileEntry] | None:
    """Return the files that a manifest lists, or None if the manifest is damaged.

    A single changed byte can leave valid JSON of another shape, so every entry is checked.
    """
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if not (isinstance(entries, dict) and entries):
        return None
    for name, entry in entries.items():
        if not (isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and "sha256" in entry):
            return None
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            return None
    return entries

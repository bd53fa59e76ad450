"""Tensor files: memory-mapped for reading, preallocated for writing. They count the bytes read or written.

file = open_tensors(path)                      # .safetensors, or a file of torch.save
tensor = file.read("model.norm.weight")        # maps only these bytes
file.unread()                                  # names of tensors that were not read exactly once

with create_safetensors(path, slots) as writer:
    writer.write("model.norm.weight", tensor)
    writer.hash_written()                      # at any time: hashes the complete prefix of the file
    writer.close()                             # {"bytes": ..., "sha256": ...}
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.storage import FileEntry, disk_errors

Shape = tuple[int, ...]
HASHED_AT_ONCE = 1 << 19  # small enough to stay in a core's cache
# For a larger write Linux looks for an equally large piece of free memory. On virtual machines the host has usually
# reclaimed that memory, and the write takes ten times the CPU time.
WRITTEN_AT_ONCE = 1 << 16

# The weight dtypes of https://github.com/huggingface/safetensors
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Slot:
    """Shape and dtype of a tensor, stored in row-major order."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Entry(Slot):
    """The location of a tensor in a file.

    Attributes:
        offset: offset of the first byte.
        crc: CRC-32 that the file records for the tensor's bytes, or for the bytes of `span`. None: not recorded.
        span: offset and number of the bytes that the checksum covers, if it covers more than the tensor.
    """

    offset: int
    crc: int | None = None
    span: tuple[int, int] | None = None


class TensorFile:
    """A file of named tensors. Each read maps only its own bytes, so memory holds only tensors in use."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self.entries = path, dict(entries)
        self._read: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._checked: set[tuple[int, int]] = set()  # verified spans that several tensors share
        size = path.stat().st_size
        end = max((entry.offset + entry.nbytes for entry in entries.values()), default=0)
        if end > size:
            raise UserError(f"{path}: truncated: {size:,} bytes, its tensors need {end:,}; get the file again")

    def read(self, name: str, block: int = 0, blocks: int = 1) -> Tensor:
        """Read a tensor, or one of `blocks` equal parts of its bytes as a flat tensor. Changes do not reach the file.

        Raises:
            UserError: the bytes do not match the CRC-32 that the file records.
        """
        entry = self.entries[name]
        nbytes = entry.nbytes // blocks
        with self._lock:
            self._read[name] += nbytes
        if nbytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.crc is not None and block == 0:
            self._check(name, entry)
        tensor = self._map(entry.dtype, entry.offset + block * nbytes, nbytes)
        return tensor if blocks > 1 else tensor.view(entry.shape)

    def _check(self, name: str, entry: Entry) -> None:
        """Compare the checksum of a tensor, or of the span that contains it."""
        span = entry.span or (entry.offset, entry.nbytes)
        with self._lock:
            if span in self._checked:
                return
        if zlib.crc32(as_bytes(self._map(torch.uint8, *span))) != entry.crc:
            raise UserError(f"{self.path}: {name} does not have the CRC-32 of the file's index: the file is damaged")
        if entry.span is not None:
            with self._lock:
                self._checked.add(span)

    def _map(self, dtype: torch.dtype, offset: int, nbytes: int) -> Tensor:
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as f:
            mapped = mmap.mmap(f.fileno(), offset - start + nbytes, access=mmap.ACCESS_COPY, offset=start)
        return torch.frombuffer(mapped, dtype=dtype, count=nbytes // dtype.itemsize, offset=offset - start)

    @property
    def has_checksums(self) -> bool:
        """Whether reading verifies a checksum of every tensor."""
        return all(entry.crc is not None for entry in self.entries.values())

    def unread(self) -> list[str]:
        """Return the names of tensors with a byte that was not read, or was read twice."""
        return [name for name, entry in self.entries.items() if self._read[name] != entry.nbytes]


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy if the tensor is contiguous."""
    values = tensor.contiguous().view(-1).view(torch.uint8)
    return values.numpy().data  # numpy has no bfloat16


def open_safetensors(path: Path) -> TensorFile:
    """Open a safetensors file.

    The safetensors library checks the header: it refuses offsets that overlap, leave gaps, decrease, or do not fit
    the shapes. Only the offsets are parsed here, because the library does not return them before version 0.6.

    Raises:
        UserError: the file does not exist, the library refuses its header, or a dtype cannot hold weights.
    """
    try:
        with safe_open(path, framework="numpy") as library:
            slices = {name: library.get_slice(name) for name in library.keys()}  # noqa: SIM118 (it has no __iter__)
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        size = path.stat().st_size
        if "not fully covered" in str(error):
            raise UserError(
                f"{path}: truncated: {size:,} bytes, its header describes another size ({error}); get the file again"
            ) from error
        raise UserError(f"{path}: truncated, or not a safetensors file ({error}); get it again") from error
    entries = {}
    for name, (dtype, shape) in found.items():
        if dtype not in SAFETENSORS_DTYPES:
            raise _not_weights(path, name, dtype)
        entries[name] = Entry(shape, SAFETENSORS_DTYPES[dtype], 8 + length + header[name]["data_offsets"][0])
    return TensorFile(path, entries)


def require_weights_dtype(path: Path, name: str, dtype: torch.dtype) -> None:
    """Raise a `UserError` if a dtype cannot hold weights: integers, complex numbers, 8-bit floats."""
    if dtype not in SAFETENSORS_DTYPES.values():
        raise _not_weights(path, name, str(dtype))


def _not_weights(path: Path, name: str, dtype: str) -> UserError:
    return UserError(
        f"{path}: {name} has dtype {dtype}, expected one of {[*SAFETENSORS_DTYPES]}; MiniMind's weights are "
        "floating-point numbers, so save the model again without quantization"
    )


class TensorWriter(AbstractContextManager["TensorWriter"]):
    """Writes a file tensor by tensor at fixed offsets, and hashes it meanwhile.

    Args:
        path: the file. A file that exists keeps its bytes outside the entries, such as a header.
        entries: location of each tensor.
        size: size of the file.

    Raises:
        UserError: the disk is full.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], size: int) -> None:
        self.path, self.entries = path, dict(entries)
        self._written: Counter[str] = Counter()
        self._lock, self._hash_lock = threading.Lock(), threading.Lock()
        self._size, self._hashed, self._sha256 = size, 0, hashlib.sha256()
        self._to_hash = deque(sorted(entries, key=lambda name: entries[name].offset))
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with disk_errors(path):
            os.ftruncate(self._fd, size)  # not fallocate: writing to reserved blocks takes twice the time on ext4

    def write(self, name: str, tensor: Tensor, block: int = 0, blocks: int = 1) -> None:
        """Write a tensor, or one of `blocks` equal parts of its bytes.

        Raises:
            UserError: dtype or size differ from the entry, or the disk is full.
        """
        entry = self.entries[name]
        nbytes = entry.nbytes // blocks
        if (tensor.dtype, tensor.nbytes) != (entry.dtype, nbytes):
            found = f"{tensor.dtype} of {tensor.nbytes} bytes"
            raise UserError(f"{self.path.name}: {name}: found {found}, expected {entry.dtype} of {nbytes}")
        data = as_bytes(tensor)
        with disk_errors(self.path):
            done = 0
            while done < nbytes:
                piece = data[done : done + WRITTEN_AT_ONCE]
                done += os.pwrite(self._fd, piece, entry.offset + block * nbytes + done)
        with self._lock:
            self._written[name] += nbytes

    def unwritten(self) -> list[str]:
        """Return the names of tensors with a byte that was not written, or was written twice."""
        return [name for name in self.entries if not self._is_written(name)]

    def _is_written(self, name: str) -> bool:
        return self._written[name] == self.entries[name].nbytes

    @property
    def can_hash(self) -> bool:
        """Whether `hash_written` has complete tensors to hash."""
        return bool(self._to_hash) and self._is_written(self._to_hash[0])

    def hash_written(self) -> None:
        """Read back and hash the file, from the end of the last call to the first incomplete tensor."""
        with self._hash_lock:
            while self.can_hash:
                name = self._to_hash[0]
                entry = self.entries[name]
                self._hash(entry.offset)  # the bytes before the tensor
                self._hash(entry.offset + entry.nbytes, name)
                self._to_hash.popleft()

    def _hash(self, end: int, name: str | None = None) -> None:
        """Hash up to the offset `end`.

        Args:
            end: the offset.
            name: tensor whose bytes these are, if any.
        """
        buffer = memoryview(bytearray(min(HASHED_AT_ONCE, end - self._hashed)))
        while self._hashed < end:
            count = os.preadv(self._fd, [buffer[: end - self._hashed]], self._hashed)
            if count == 0:
                raise UserError(f"{self.path}: became shorter while it was written; expected {self._size:,} bytes")
            self._hashed += count
            self._sha256.update(buffer[:count])
            if name is not None:
                self._passed(name, buffer[:count])

    def _passed(self, name: str, data: memoryview) -> None:
        """Hook that gets all bytes of each tensor, in order, as they are read back."""

    def _complete(self) -> None:
        """Hook that writes the bytes after the last tensor, when all tensors have been hashed."""

    def close(self) -> FileEntry:
        """Hash the rest and sync the file. Return size and SHA-256."""
        with disk_errors(self.path):
            self.hash_written()
            self._complete()
            self._hash(self._size)
            os.fsync(self._fd)
        self.abandon()
        return {"bytes": self._size, "sha256": self._sha256.hexdigest()}

    def abandon(self) -> None:
        """Close without syncing."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __exit__(self, *error: object) -> None:
        self.abandon()


def lay_out(slots: Mapping[str, Slot], start: int) -> Iterator[tuple[str, Entry]]:
    """Yield entries of consecutive tensors, from `start` on."""
    for name, slot in slots.items():
        yield name, Entry(slot.shape, slot.dtype, start)
        start += slot.nbytes


def create_safetensors(path: Path, slots: Mapping[str, Slot]) -> TensorWriter:
    """Create a safetensors file with its header and with space for the tensors.

    Raises:
        UserError: the disk is full.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, entry in lay_out(slots, 0):
        header[name] = {
            "dtype": names[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.offset, entry.offset + entry.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # align the data to eight bytes
    start = 8 + len(text)
    with disk_errors(path):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
    return TensorWriter(path, dict(lay_out(slots, start)), start + sum(slot.nbytes for slot in slots.values()))

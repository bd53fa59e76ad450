"""Files of tensors: mapped for reading, laid out in advance for writing, every byte counted.

file = open_tensors(path)                      # .safetensors, or what torch.save writes
tensor = file.read("model.norm.weight")        # maps just these bytes
file.unread()                                  # names of which not every byte was read once

with create_safetensors(path, slots) as writer:
    writer.write("model.norm.weight", tensor)
    writer.hash_written()                      # whenever one likes: what is complete from the beginning on
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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.storage import FileEntry, disk_errors

Shape = tuple[int, ...]
HASHED_AT_ONCE = 1 << 19  # small enough to stay in a core's cache
# A larger write has Linux look for as large a piece of free memory to put it in, which on virtual machines is
# mostly what the host has taken back: ten times the CPU time.
WRITTEN_AT_ONCE = 1 << 16

# https://github.com/huggingface/safetensors: the dtypes that weights come in
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Slot:
    """Shape and dtype of a tensor, its bytes in the order of the first axis."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Entry(Slot):
    """Where a tensor lies in a file.

    Attributes:
        offset: of its first byte.
        crc: CRC-32 that the file records for its bytes, or for those of `span`; None for none.
        span: offset and number of the bytes with that checksum, where they are more than the tensor's.
    """

    offset: int
    crc: int | None = None
    span: tuple[int, int] | None = None


class TensorFile:
    """A file of tensors by name. Each read maps its own bytes, so that memory holds what is in use only."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self.entries = path, dict(entries)
        self._read: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._checked: set[tuple[int, int]] = set()  # spans that several tensors share
        size = path.stat().st_size
        end = max((entry.offset + entry.nbytes for entry in entries.values()), default=0)
        if end > size:
            raise UserError(f"{path}: truncated: {size:,} bytes, its tensors need {end:,}; get the file again")

    def read(self, name: str, block: int = 0, blocks: int = 1) -> Tensor:
        """A tensor, or one of `blocks` equal parts of its bytes, flat. Writing to it does not change the file.

        Raises:
            UserError: the bytes do not have the CRC-32 that the file records.
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
        """Compare the bytes of a tensor, or of the span in which it lies, with their checksum."""
        span = entry.span or (entry.offset, entry.nbytes)
        with self._lock:
            if span in self._checked:
                return
        if zlib.crc32(as_bytes(self._map(torch.uint8, *span))) != entry.crc:
            raise UserError(f"{self.path}: {name} does not have the CRC-32 of the file's index: damaged")
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
        """Whether every tensor is compared with a checksum when it is read."""
        return all(entry.crc is not None for entry in self.entries.values())

    def unread(self) -> list[str]:
        """Tensors of which some byte was not read, or was read twice."""
        return [name for name, entry in self.entries.items() if self._read[name] != entry.nbytes]


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    values = tensor.contiguous().view(-1).view(torch.uint8)
    return values.numpy().data  # numpy has no bfloat16


def open_safetensors(path: Path) -> TensorFile:
    """Open a safetensors file.

    The safetensors library judges the header: it refuses offsets that overlap, leave gaps, run backwards or do not
    fit the shapes. Only the offsets are read here, because the library does not tell them before version 0.6.

    Raises:
        UserError: no such file, a header that the library refuses, or a tensor of a dtype that weights cannot have.
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
                f"{path}: truncated: {size:,} bytes, its header describes another number ({error}); get the file again"
            ) from error
        raise UserError(f"{path}: truncated, or no safetensors file ({error}); get it again") from error
    entries = {}
    for name, (dtype, shape) in found.items():
        if dtype not in SAFETENSORS_DTYPES:
            raise _not_weights(path, name, dtype)
        entries[name] = Entry(shape, SAFETENSORS_DTYPES[dtype], 8 + length + header[name]["data_offsets"][0])
    return TensorFile(path, entries)


def require_weights_dtype(path: Path, name: str, dtype: torch.dtype) -> None:
    """Raise a `UserError` if a tensor has a dtype that weights cannot have: integers, complex numbers, 8-bit floats."""
    if dtype not in SAFETENSORS_DTYPES.values():
        raise _not_weights(path, name, str(dtype))


def _not_weights(path: Path, name: str, dtype: str) -> UserError:
    return UserError(
        f"{path}: {name} has dtype {dtype}, expected one of {[*SAFETENSORS_DTYPES]}; MiniMind's weights are "
        "floating-point numbers, so save the model again without quantization"
    )


class TensorWriter:
    """A file that is filled in tensor by tensor, each at its place, and hashed as it fills.

    Args:
        path: exists already where `offset`s lie behind something that is kept.
        entries: where each tensor goes.
        size: of the file.

    Raises:
        UserError: the disk has no room.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], size: int) -> None:
        self.path, self.entries = path, dict(entries)
        self._written: Counter[str] = Counter()
        self._lock, self._hash_lock = threading.Lock(), threading.Lock()
        self._size, self._hashed, self._sha256 = size, 0, hashlib.sha256()
        self._to_hash = deque(sorted(entries, key=lambda name: entries[name].offset))
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with disk_errors(path):
            os.ftruncate(self._fd, size)  # not fallocate: writing to what it reserves takes twice the time on ext4

    def write(self, name: str, tensor: Tensor, block: int = 0, blocks: int = 1) -> None:
        """Write a tensor, or one of `blocks` equal parts of its bytes.

        Raises:
            UserError: it has another dtype or size than its place, or the disk is full.
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
        """Tensors of which some byte was not written, or was written twice."""
        return [name for name in self.entries if not self._is_written(name)]

    def _is_written(self, name: str) -> bool:
        return self._written[name] == self.entries[name].nbytes

    @property
    def can_hash(self) -> bool:
        """Whether `hash_written` has something to do."""
        return bool(self._to_hash) and self._is_written(self._to_hash[0])

    def hash_written(self) -> None:
        """Read and hash the file, from where the last call ended to the first tensor that is not there yet."""
        with self._hash_lock:
            while self.can_hash:
                name = self._to_hash[0]
                entry = self.entries[name]
                self._hash(entry.offset)  # what lies before it
                self._hash(entry.offset + entry.nbytes, name)
                self._to_hash.popleft()

    def _hash(self, end: int, name: str | None = None) -> None:
        """Hash up to there; the bytes are those of that tensor."""
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
        """Called with all bytes of each tensor, in order, as they are read back."""

    def _complete(self) -> None:
        """Write what depends on all tensors; it lies behind them."""

    def close(self) -> FileEntry:
        """Hash the rest and make all bytes durable; returns size and SHA-256."""
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

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()


def lay_out(slots: Mapping[str, Slot], start: int) -> Iterator[tuple[str, Entry]]:
    """Entries of tensors one after the other from `start` on."""
    for name, slot in slots.items():
        yield name, Entry(slot.shape, slot.dtype, start)
        start += slot.nbytes


def create_safetensors(path: Path, slots: Mapping[str, Slot]) -> TensorWriter:
    """A safetensors file with a place for each of these tensors, its header written.

    Raises:
        UserError: the disk has no room.
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
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    start = 8 + len(text)
    with disk_errors(path):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
    return TensorWriter(path, dict(lay_out(slots, start)), start + sum(slot.nbytes for slot in slots.values()))

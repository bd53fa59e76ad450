"""The file format of `torch.save`: read without executing anything in the file, written with space for tensors.

The file is an uncompressed zip archive. `data.pkl` is a pickle in which a tensor is a call of a torch function with a
reference to `data/N`, its bytes. The reader builds only tensors, containers, numbers and namespaces. Other classes that
`unpickling` allows become an `Opaque`, which holds nothing and runs nothing. All other classes are refused.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import skip_data

from minimind_mcore.checkpoint import unpickling
from minimind_mcore.checkpoint.tensors import Entry, Shape, Slot, TensorFile, TensorWriter, require_weights_dtype
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import TRUST_FLAG
from minimind_mcore.storage import disk_errors


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not loaded. `storage` is the number of its record, `start` the offset in elements."""

    shape: Shape
    strides: Shape
    dtype: torch.dtype
    storage: str
    start: int
    elements: int

    @property
    def contiguous(self) -> bool:
        """Whether the values are contiguous."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class Opaque:
    """Placeholder for an object of a class that is not loaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept and ignore any arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Opaque:
        """Return a placeholder for the result of a call."""
        return Opaque()

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""

    # a pickle may fill a subclass of dict or list
    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore the item."""

    def append(self, value: Any) -> None:
        """Ignore the value."""

    def extend(self, values: Any) -> None:
        """Ignore the values."""


@dataclass(frozen=True)
class UnreadableTensor:
    """Placeholder for a tensor whose values are not in one storage: a quantized or sparse one, or a subclass."""

    kind: str

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""


def _unreadable(kind: str) -> Callable[..., UnreadableTensor]:
    """Return the function that the pickle calls for a tensor of that kind."""
    return lambda *_: UnreadableTensor(kind)


def _tensor(storage: Any, start: int, shape: Shape, strides: Shape, *_: Any) -> Any:
    dtype, key, elements = storage
    if dtype is None:
        raise pickle.UnpicklingError("a tensor with an unsupported dtype")
    return StoredTensor(tuple(shape), tuple(strides), dtype, key, start, elements)


def _tensor_of_bytes(
    storage: Any, start: int, shape: Shape, strides: Shape, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Any:
    """Return a tensor whose dtype is in the pickle and not in the storage, as torch saves 8-bit floats."""
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor with an unsupported dtype")
    _, key, elements = storage
    return StoredTensor(tuple(shape), tuple(strides), dtype, key, start, elements)


def _parameter(data: Any, *_: Any) -> Any:
    return data


# Pickled references to storages name a torch class for the dtype.
_STORAGES = torch.storage._storage_type_to_dtype_map()
_BUILT: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_bytes,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("torch", "Size"): tuple,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
}
_UNREADABLE = {
    ("torch._utils", "_rebuild_qtensor"): _unreadable("quantized"),
    ("torch._utils", "_rebuild_sparse_tensor"): _unreadable("sparse"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _unreadable("sparse"),
    ("torch._utils", "_rebuild_nested_tensor"): _unreadable("nested"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unreadable("meta"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _unreadable("wrapped"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _unreadable("device"),
    ("torch._tensor", "_rebuild_from_type_v2"): _unreadable("subclassed"),
    # quantization schemes, which are never called
    ("torch", "per_tensor_affine"): None,
    ("torch", "per_tensor_symmetric"): None,
    ("torch", "per_channel_affine"): None,
    ("torch", "per_channel_symmetric"): None,
    ("torch", "per_channel_affine_float_qparams"): None,
}


_DAMAGED = (zipfile.BadZipFile, KeyError, EOFError, pickle.UnpicklingError, struct.error)
# Exceptions that Python raises for an invalid pickle.
_SENSELESS = (AttributeError, TypeError, ValueError, IndexError, OverflowError, RecursionError, NotImplementedError)


class _Unpickler(pickle.Unpickler):
    """Build what `_BUILT` lists, `Opaque` for other allowed classes, and refuse the rest."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _UNREADABLE:  # placeholders, so that the message can name the tensor; nothing runs
            return _UNREADABLE[module, name]
        unpickling.require_allowed(module, name)
        module = unpickling.current_module(module)
        if (module, name) in _BUILT:
            return _BUILT[module, name]
        if module == "torch":
            value = _STORAGES.get(name) or getattr(torch, name, None)
            if isinstance(value, torch.dtype):
                return value
        return type(name, (Opaque,), {"__module__": module})

    def persistent_load(self, saved: Any) -> Any:
        _, dtype, key, _, elements = saved
        return dtype if isinstance(dtype, torch.dtype) else None, key, elements


@dataclass(frozen=True)
class Record:
    """A file in the archive: offset of its bytes, their number, and their CRC-32 (0: not recorded)."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """The contents of a file of `torch.save`: the object, with a `StoredTensor` for each tensor, and its records."""

    path: Path
    content: Any
    records: Mapping[str, Record]

    def entry(self, tensor: StoredTensor, name: str) -> Entry:
        """Return the location of a tensor's bytes.

        Raises:
            UserError: the bytes are not contiguous, are incomplete, or are not floating-point numbers.
        """
        require_weights_dtype(self.path, name, tensor.dtype)
        record = self.records.get(tensor.storage)
        if record is None or tensor.start < 0 or any(size < 0 for size in tensor.shape):
            raise UserError(f"{self.path}: {name} has no bytes in the file; get it again")
        offset = record.offset + tensor.start * tensor.dtype.itemsize
        whole = tensor.shape and torch.Size(tensor.shape).numel() * tensor.dtype.itemsize == record.size
        # The archive has one checksum per storage. A view is only a part of its storage.
        span = None if whole else (record.offset, record.size)
        entry = Entry(tensor.shape, tensor.dtype, offset, record.crc or None, span)
        if not tensor.contiguous or offset + entry.nbytes > record.offset + record.size:
            raise UserError(f"{self.path}: {name} is not contiguous; save it again with .contiguous()")
        return entry

    def tensors(self, state: Mapping[str, Any]) -> TensorFile:
        """Return the tensors of a state dict in the content.

        Raises:
            UserError: a tensor is quantized, sparse or of another unsupported kind.
        """
        for name, value in state.items():
            if isinstance(value, UnreadableTensor):
                raise UserError(
                    f"{self.path}: {name} is a {value.kind} tensor; expected a dense tensor of floating-point numbers. "
                    "Save the weights of the model as they were before that conversion"
                )
        return TensorFile(self.path, {n: self.entry(t, n) for n, t in state.items() if isinstance(t, StoredTensor)})


def read_archive(path: Path, offset: int = 0, size: int | None = None) -> Archive:
    """Read the structure of a file of `torch.save`, or of one inside another file. No tensor is read.

    Raises:
        UserError: the file does not exist, is truncated, or has another format.
    """
    try:
        with open(path, "rb") as f:
            part: IO[bytes] = f if size is None else _Part(f, offset, size)  # type: ignore[assignment]
            with zipfile.ZipFile(part) as archive:
                infos = _members(path, archive)
                content = _Unpickler(io.BytesIO(_small_records(archive, infos)["data.pkl"])).load()
                records = {
                    name.removeprefix("data/"): Record(offset + _data_offset(part, info), info.file_size, info.CRC)
                    for name, info in infos.items()
                    if name.startswith("data/")
                }
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except unpickling.UnsafeGlobal as error:
        raise unpickling.refusal(path, error) from None
    except (*_DAMAGED, *_SENSELESS) as error:
        raise UserError(f"{path}: truncated, or not what torch.save writes ({error}); get it again") from error
    return Archive(path, content, records)


def check_records(path: Path) -> list[str]:
    """Verify the CRC-32 of every record of a file of `torch.save`. A torch_dist file contains several archives.

    Returns:
        One line per problem. Records without a checksum (torch can leave it out) pass.
    """
    problems = []
    try:
        with open(path, "rb") as f:
            # The directory of a zip archive is at its end, so the archives are read from last to first.
            end = path.stat().st_size
            while end > 0:
                part: IO[bytes] = _Part(f, 0, end)  # type: ignore[assignment]
                with zipfile.ZipFile(part) as archive:
                    infos = archive.infolist()
                for info in infos:
                    if info.CRC and _crc_of(f, _data_offset(part, info), info.file_size) != info.CRC:
                        problems.append(f"{path}: record {info.filename} differs from its CRC-32")
                start = min((info.header_offset for info in infos), default=end)
                if start >= end:
                    raise zipfile.BadZipFile("an archive without records")
                end = start
    except FileNotFoundError:
        return [f"{path}: missing"]
    except (*_DAMAGED, OSError, ValueError, NotImplementedError) as error:
        return [f"{path}: truncated, or not what torch.save writes ({error})"]
    return problems


def _crc_of(file: IO[bytes], offset: int, size: int) -> int:
    crc = 0
    file.seek(offset)
    while size > 0 and (data := file.read(min(size, 1 << 20))):
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc


def _small_records(archive: zipfile.ZipFile, infos: Mapping[str, zipfile.ZipInfo]) -> dict[str, bytes]:
    """Read all records except tensors completely, because zipfile checks a CRC-32 only at the end of a record."""
    for info in infos.values():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise zipfile.BadZipFile(f"{info.filename} is compressed")
    return {name: archive.read(info) for name, info in infos.items() if not name.startswith("data/")}


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the records by their names without the folder.

    torch's reader ignores case when it finds records, and uses the folder of the first record. An archive in which
    torch could find another pickle than this reader is refused. So is TorchScript, which is code.
    """
    infos = archive.infolist()
    folders = {info.filename.split("/", 1)[0] for info in infos}
    names = {info.filename.casefold() for info in infos}
    if len(folders) != 1 or len(names) != len(infos) or (infos and min(info.header_offset for info in infos) != 0):
        raise UserError(f"{path}: contains several archives; torch.save writes one. Get the file again")
    members = {info.filename.split("/", 1)[-1]: info for info in infos}
    if "constants.pkl" in members:
        raise UserError(f"{path}: is a TorchScript program; expected weights saved by torch.save")
    return members


class _Part:
    """A region of an open file, as a file object."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = 0) -> int:
        self._at = to + (0, self._at, self._size)[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        count = left if count < 0 else min(count, left)
        self._file.seek(self._offset + self._at)
        data = self._file.read(count)
        self._at += len(data)
        return data


def _data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Return the offset of a record's bytes: after its local header, whose padding aligns them."""
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return int(info.header_offset + 30 + name + extra)


class TorchWriter(TensorWriter):
    """Writes a file for `torch.load`. Tensors go to fixed offsets, and their checksums are set at the end."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], storages: Mapping[str, str]) -> None:
        super().__init__(path, entries, path.stat().st_size)
        self._storages = storages
        self._crcs = dict.fromkeys(entries, 0)

    def _passed(self, name: str, data: memoryview) -> None:
        self._crcs[name] = zlib.crc32(data, self._crcs[name])

    def _complete(self) -> None:
        with open(self.path, "r+b") as f:
            _patch_checksums(f, {f"data/{self._storages[name]}": crc for name, crc in self._crcs.items()})


def _patch_checksums(file: IO[bytes], crcs: Mapping[str, int]) -> None:
    """Set the CRC-32 of records in the archive's directory, which readers use (APPNOTE.TXT, 4.3.12)."""
    with zipfile.ZipFile(file, "r") as archive:
        at, count = archive.start_dir, len(archive.infolist())
    for _ in range(count):
        file.seek(at)
        header = file.read(46)
        name, extra, comment = struct.unpack("<HHH", header[28:34])
        record = file.read(name).decode().split("/", 1)[-1]
        if record in crcs:
            file.seek(at + 16)
            file.write(struct.pack("<I", crcs[record]))
        at += 46 + name + extra + comment


def create_torch(path: Path, content: Mapping[str, Any], states: Mapping[str, Mapping[str, Slot]]) -> TorchWriter:
    """Create a file of `torch.save` with space for each tensor.

    Args:
        path: the file.
        content: the contents other than tensors.
        states: state dicts by their key in the object. The key "" is the object itself.

    Returns:
        A writer, in which a tensor of `states[key]` has the name "key/name", or "name" if the key is "".
    """
    whole: dict[str, Any] = dict(content)
    for key, slots in states.items():
        # The memory of these tensors is never touched. Only their size is written, as a hole in the file.
        tensors = {name: torch.empty(slot.shape, dtype=slot.dtype) for name, slot in slots.items()}
        whole |= {key: tensors} if key else tensors
    with disk_errors(path), skip_data():
        torch.save(whole, path)
    archive = read_archive(path)
    entries, storages = {}, {}
    for key in states:
        for name, tensor in (archive.content[key] if key else archive.content).items():
            if isinstance(tensor, StoredTensor):
                full = f"{key}/{name}" if key else name
                entry = archive.entry(tensor, name)
                # The checksum is left out, because the values do not exist yet.
                entries[full], storages[full] = Entry(entry.shape, entry.dtype, entry.offset), tensor.storage
    return TorchWriter(path, entries, storages)


# ---------------------------------------------------------------------------------------------------- checking


def load_torch(path: Path) -> Any:
    """Load a file of `torch.save` onto the CPU.

    Raises:
        UserError: the file is damaged, or names a class outside `ALLOWED`.
    """
    if unpickling.is_trusted():
        return torch.load(path, map_location="cpu", weights_only=False)
    check_file(path)
    try:
        with unpickling.restricted():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: cannot be loaded safely ({error}); if you trust it, give {TRUST_FLAG}") from error


def check_file(path: Path, offset: int = 0, size: int | None = None) -> None:
    """Refuse a file of `torch.save`, or one inside another file, that names a class outside `ALLOWED`.

    Nothing of the file is executed and no tensor is read.
    """
    read_archive(path, offset, size)


def check_checkpoint(directory: Path) -> None:
    """Refuse the checkpoint of an iteration, of either format, if a pickle in it names a class outside `ALLOWED`.

    Reads only the pickles, which takes milliseconds for a checkpoint of any size.

    Raises:
        UserError: such a pickle, or a damaged one; the message names the file.
    """
    if unpickling.is_trusted():
        return
    for path in sorted(p for p in directory.rglob("*.pt") if p.is_file()):
        check_file(path)
    if (directory / ".metadata").is_file():
        _check_objects(directory)


def _check_objects(directory: Path) -> None:
    """Check the pickled objects that a torch_dist checkpoint stores between its tensors."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = unpickling.load_pickle(directory / ".metadata")
    for index, place in (metadata.storage_data or {}).items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            check_file(directory / place.relative_path, place.offset, place.length)

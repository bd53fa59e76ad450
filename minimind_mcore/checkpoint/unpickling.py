"""The classes that a checkpoint may name. Unpickling any other class can run code.

`.pth`, `model_optim_rng.pt`, `common.pt` and `.metadata` are pickles, and a pickle can call any function that it names.
Checkpoints come from other people, so every reader of this kit refuses a file that names a class outside `ALLOWED`:

    torch_zip.check_checkpoint(directory)    before Megatron, or MindSpeed-LLM, loads a checkpoint
    torch_zip.load_torch(file)               in place of torch.load
    load_pickle(file)                        in place of pickle.load, for `.metadata` of torch_dist
    restricted()                             around Megatron's own loading

`trust()`, also available as `--trust-checkpoints`, lifts the restriction for this process and its child processes.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import contextlib
import functools
import importlib
import os
import pickle
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import TRUST_FLAG

_TRUST_VARIABLE = "MINIMIND_TRUST_CHECKPOINTS"

# Names by module. None of them runs code of the file: they are containers, numbers, arrays, tensors, enumerations and
# configurations. Sources: torch/_weights_only_unpickler.py (torch 2.13), megatron/core/safe_globals.py
# (megatron-core 0.16.1), and the classes that megatron-core 0.16.1 writes into `.metadata` of torch_dist.
ALLOWED: dict[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "argparse": "Namespace",
        "types": "SimpleNamespace",
        "builtins": "set frozenset dict list tuple bytearray complex int float bool str bytes slice",
        "collections": "OrderedDict defaultdict Counter deque",
        "pathlib": "Path PosixPath PurePosixPath",
        "pathlib._local": "Path PosixPath PurePosixPath",  # Python 3.13's name of the same classes
        "datetime": "timedelta datetime",
        "signal": "Signals",
        "io": "BytesIO",
        "_io": "BytesIO",
        "_codecs": "encode",  # pickle protocol 2 uses it for bytes
        "numpy": "ndarray dtype",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "torch": "Size device Tensor",
        "torch._utils": (
            "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter _rebuild_parameter_with_state"
        ),
        "torch._tensor": "_rebuild_from_type_v2",
        "torch.nn.parameter": "Parameter",
        "torch.storage": "TypedStorage UntypedStorage",
        "torch.serialization": "_get_layout",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
            "TensorStorageMetadata _MEM_FORMAT_ENCODING"
        ),
        "torch.distributed.checkpoint.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
        "megatron.core.dist_checkpointing.strategies.torch": "MCoreSavePlan",
        "megatron.core.enums": "ModelType",
        "megatron.core.transformer.enums": "AttnBackend CudaGraphScope AttnMaskType LayerType AttnType",
        "megatron.core.optimizer": "OptimizerConfig",
        "megatron.core.optimizer.optimizer_config": "OptimizerConfig",
        "megatron.core.rerun_state_machine": "RerunDiagnostic RerunMode RerunState",
    }.items()
}


# torch.FloatStorage, and the storages of each kind of device
_STORAGE = re.compile(r"torch\.([a-z]+\.)?[A-Z][A-Za-z0-9]*Storage")


class UnsafeGlobal(pickle.UnpicklingError):
    """A pickle names a class or function outside `ALLOWED`."""


class _Trust(argparse.Action):
    """Call `trust()` if the flag is given."""

    def __call__(self, *_: Any) -> None:
        """Lift the restriction."""
        trust()


def add_trust_flag(group: argparse._ActionsContainer) -> None:
    """Add `--trust-checkpoints` to the flags of a program."""
    group.add_argument(
        TRUST_FLAG,
        action=_Trust,
        nargs=0,
        default=False,
        help="unpickle any class that a checkpoint names, which lets the author of the checkpoint run code here",
    )


def trust() -> None:
    """Allow this process and its child processes to unpickle every class that a checkpoint names."""
    os.environ[_TRUST_VARIABLE] = "1"


def is_trusted() -> bool:
    """Return whether `trust()` was called here or in a parent process."""
    return os.environ.get(_TRUST_VARIABLE) == "1"


def current_module(module: str) -> str:
    """Return the Python 3 name of a module: pickles of protocol 2 have the names of Python 2."""
    return _compat_pickle.IMPORT_MAPPING.get(module, module)


def is_allowed(module: str, name: str) -> bool:
    """Return whether a checkpoint may name `module.name`."""
    module = current_module(module)
    if name in ALLOWED.get(module, ()):
        return True
    found = getattr(torch, name, None) if module == "torch" else None
    if isinstance(found, torch.dtype) or _STORAGE.fullmatch(f"{module}.{name}"):
        return True
    return module == "numpy.dtypes" and name.endswith("DType")


def require_allowed(module: str, name: str) -> None:
    """Raise `UnsafeGlobal` unless `module.name` is allowed or checkpoints are trusted."""
    if not (is_allowed(module, name) or is_trusted()):
        raise UnsafeGlobal(f"{module}.{name}")


def refusal(path: Path, name: object) -> UserError:
    """Return the error for a file that names a class outside `ALLOWED`."""
    return UserError(
        f"{path}: names {name}, which no checkpoint needs: loading it could run code of the file's author. Nothing "
        f"was loaded. Get the checkpoint from a source that you trust; if you trust this one, give {TRUST_FLAG}"
    )


class _Unpickler(pickle.Unpickler):
    """Resolve allowed names only."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class, or raise `UnsafeGlobal`."""
        require_allowed(module, name)
        return super().find_class(module, name)


def load_pickle(path: Path) -> Any:
    """Unpickle a file that is not in torch's format.

    Raises:
        UserError: the file is missing or damaged, or names a class outside `ALLOWED`.
    """
    try:
        with open(path, "rb") as file:
            return _Unpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except UnsafeGlobal as error:
        raise refusal(path, error) from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError) as error:
        raise UserError(f"{path}: truncated, or not a pickle ({error}); get it again") from error
    except (TypeError, ValueError, MemoryError, OverflowError) as error:  # valid opcodes with invalid operands
        raise UserError(f"{path}: damaged ({error}); get it again") from error


@contextlib.contextmanager
def restricted() -> Iterator[None]:
    """Make `torch.load`, and the reader of `.metadata`, refuse classes outside `ALLOWED`.

    Megatron's and torch's own checkpoint readers pass `weights_only=False` (torch 2.13,
    distributed/checkpoint/default_planner.py; megatron-core 0.12.1, strategies/common.py).
    """
    if is_trusted():
        yield
        return
    from torch.distributed.checkpoint import filesystem

    original = torch.load

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "weights_only": True})

    def load_metadata(file: IO[bytes]) -> Any:
        return _Unpickler(file).load()

    shim = types.SimpleNamespace(**{**vars(pickle), "load": load_metadata})
    reader: Any = filesystem
    with torch.serialization.safe_globals(_allowed_objects()):
        torch.load, reader.pickle = load, shim
        try:
            yield
        finally:
            torch.load, reader.pickle = original, pickle


@functools.cache
def _allowed_objects() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return the objects of `ALLOWED` that are installed, with the names that files use."""
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    for module, names in ALLOWED.items():
        with contextlib.suppress(ImportError):
            home = importlib.import_module(module)
            found += [
                (getattr(home, name), f"{module}.{name}") for name in names if callable(getattr(home, name, None))
            ]
    import numpy as np

    dtypes = (getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType"))
    return found + [(kind, f"numpy.dtypes.{kind.__name__}") for kind in dtypes]

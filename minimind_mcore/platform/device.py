"""The device: found, not asked for; and the CPU made into one that megatron-core runs on.

    from minimind_mcore.platform import device

    device.setup()              # once, before the first import of megatron
    device.current().kind       # "npu", "cuda" or "cpu"; DEVICE=cpu in the environment overrides

Megatron reaches its accelerator through `torch.cuda` and `nccl`. `torch_npu` makes it run on an NPU by redirecting
both; `cpu_as_cuda.py` does the same for the CPU and gloo. `patches.py` lists what is changed in megatron-core. Only
this package, `mindspeed/`, `hosts.py` (connects hosts) and `doctor/` (examines a host) name devices and their backends.

torch is imported where it is used: the launcher asks for the device, and with DEVICE=cpu it starts without torch.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from minimind_mcore.errors import UserError
from minimind_mcore.hosts import own_addresses
from minimind_mcore.imports import importing
from minimind_mcore.platform import processor

if TYPE_CHECKING:
    import torch

KINDS = ("npu", "cuda", "cpu")
BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}

IMAGES = {"npu": "ascend"}  # kinds whose Docker image has another name
DAVINCI = Path("/dev/davinci_manager")  # device file of Ascend's driver


@dataclass(frozen=True)
class Device:
    """What a job runs on.

    Attributes:
        kind: "npu", "cuda" or "cpu".
        name: the maker's name of the device.
        count: devices on this host (for a CPU: its cores).
        memory: bytes of memory of one device (for a CPU: of the host).
    """

    kind: str
    name: str
    count: int
    memory: int

    @property
    def backend(self) -> str:
        """The `torch.distributed` backend of its collectives."""
        return BACKENDS[self.kind]

    @property
    def is_ascend(self) -> bool:
        """Whether it is one that MindSpeed is for."""
        return self.kind == "npu"

    @property
    def torch_device(self) -> torch.device:
        """This process's device, for `tensor.to`."""
        import torch

        return torch.device("cpu") if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def index(self) -> int:
        """This process's device among those of the host."""
        return _device_index(self.count)


def local_rank() -> int:
    """Rank of this process on its host, as torchrun numbers it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _works(kind: str) -> bool:
    """Return whether torch can use a kind of device here."""
    if kind == "npu":
        return _npu_works()
    return kind == "cpu" or bool(_api(kind).is_available())


def _npu_works() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    import torch

    try:
        import torch_npu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError):  # installed, but its CANN libraries are not loadable
        return False
    return bool(torch.npu.is_available())  # type: ignore[attr-defined]


@functools.cache
def current() -> Device:
    """The device in use: an NPU if `torch_npu` works, else CUDA, else the CPU.

    Raises:
        UserError: the environment's DEVICE is no device's name, or names one that is not usable.
    """
    asked = _asked()
    if asked and not _works(asked):
        raise UserError(
            f"DEVICE={asked} was asked for, but torch {version('torch')} sees no {asked} device here; "
            "unset DEVICE to use what there is"
        )
    kind = asked or next(kind for kind in KINDS if _works(kind))
    return _describe(kind)


def kind_of_host() -> str:
    """Return the kind of this host's device, from its driver: for a job in a container, which brings its own torch.

    Raises:
        UserError: the environment's DEVICE is no device's name.
    """
    if asked := _asked():
        return asked
    if DAVINCI.exists():
        return "npu"
    lists = shutil.which("nvidia-smi")
    return "cuda" if lists and subprocess.run([lists, "-L"], capture_output=True).returncode == 0 else "cpu"


def _asked() -> str:
    asked = os.environ.get("DEVICE", "")
    if asked and asked not in KINDS:
        raise UserError(f"DEVICE={asked!r} is not a device; expected one of {', '.join(KINDS)}, or nothing")
    return asked


def _device_index(count: int) -> int:
    """Return this process's device among `count`; processes share devices where there are more of them."""
    return local_rank() % count


def _api(kind: str) -> Any:
    """Return torch's module of a kind of device, such as `torch.cuda`."""
    import torch

    return getattr(torch, kind)


def _describe(kind: str) -> Device:
    if kind == "cpu":
        return Device("cpu", processor.cpu_name(), processor.usable_cores(), psutil.virtual_memory().total)
    api = _api(kind)
    count = api.device_count()
    index = _device_index(count)
    # Asking for a name opens a context on the current device: without this line every rank takes memory of device 0.
    api.set_device(index)
    return Device(kind, api.get_device_name(index), count, api.get_device_properties(index).total_memory)


def setup() -> Device:
    """Make the device ready for megatron-core in this process; call it before megatron is imported.

    Raises:
        UserError: see `current`.
    """
    # CUDA reads both when it starts, which `current` may cause. The first is for Megatron's overlap of gradients and
    # matrix products; without the second cuBLAS fails under --deterministic-mode.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from minimind_mcore.platform import ascend, cpu, cpu_as_cuda, patches

    device = current()
    if device.kind == "cpu":
        cpu_as_cuda.emulate()
        cpu.tune()
    else:
        _api(device.kind).set_device(device.index)  # `current` may have run in another thread
        if device.kind == "npu":
            ascend.adapt()
    with importing("megatron.core"):
        patches.apply()
    return device


def backend(asked: str) -> str:
    """The `torch.distributed` backend of this process's collectives.

    Args:
        asked: `--distributed-backend`. "gloo" lets several processes share a GPU; any other name is the device's own.

    Raises:
        UserError: NCCL, and more processes on this host than GPUs: NCCL needs one for each.
    """
    found, processes = current(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if found.kind == "cuda" and asked == "gloo":
        return "gloo"
    if found.kind == "cuda" and processes > found.count:
        raise UserError(
            f"{processes} processes were started on this host, which has {found.count} GPU(s); NCCL needs one for each "
            "process. Start fewer (NPROC, --nproc-per-node), or give --distributed-backend gloo, under which they "
            "share the GPU"
        )
    return found.backend


def use_interface(address: str) -> None:
    """Let collectives go over the interface that has `address`, by which this host is known to others.

    Left to themselves the backends take the interface of the host's name, which need not be reachable.
    """
    if interface := own_addresses().get(address):
        for backend in ("GLOO", "NCCL", "HCCL"):
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", interface)


def name_interface(interface: str) -> None:
    """Let the collectives of this process, and of those that it starts, go over an interface."""
    for backend in ("GLOO", "NCCL", "HCCL", "TP"):
        os.environ[f"{backend}_SOCKET_IFNAME"] = interface


def synchronize() -> None:
    """Wait until the device has done all that was asked of it."""
    if current().kind != "cpu":
        _api(current().kind).synchronize()


def peak_memory() -> int:
    """Largest memory that this process has held, in bytes: allocated on the device, or resident on a CPU."""
    if current().kind != "cpu":
        return int(_api(current().kind).max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rng_state() -> torch.Tensor:
    """State of the device's random generator (uint8)."""
    import torch

    kind = current().kind
    return torch.get_rng_state() if kind == "cpu" else _api(kind).get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Restore what `rng_state` returned."""
    import torch

    kind = current().kind
    torch.set_rng_state(state) if kind == "cpu" else _api(kind).set_rng_state(state)


def main() -> None:
    """Print the kind and the number of devices of this host, for the shell scripts."""
    found = current()
    print(found.kind, found.count)


if __name__ == "__main__":
    from minimind_mcore import errors

    errors.run(main)

"""The device: found, not asked for; and the CPU made into one that megatron-core runs on.

    from minimind_mcore import device

    device.setup()              # once, before the first import of megatron
    device.current().kind       # "npu", "cuda" or "cpu"; DEVICE=cpu in the environment overrides

Megatron reaches its accelerator through `torch.cuda` and `nccl`. `torch_npu` makes it run on an NPU
by redirecting both; the second half of this file does the same for the CPU and gloo. With
`minimind_mcore/mindspeed/` this is the only place that names devices and their backends.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist

from minimind_mcore import cpu
from minimind_mcore.errors import UserError

KINDS = ("npu", "cuda", "cpu")
BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}

# Peak dense bf16 TFLOP/s by a piece of the device's name, from the makers' data sheets. Where the
# name matches nothing (every CPU among them) no MFU is reported.
PEAK_TFLOPS = {
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "4090": 165.0,
    "3090": 71.0,
    "910B1": 400.0,
    "910B2": 376.0,
    "910B3": 313.0,
    "910B4": 280.0,
}


@dataclass(frozen=True)
class Device:
    """What a job runs on.

    Attributes:
        kind: "npu", "cuda" or "cpu".
        name: the maker's name of the device.
        count: devices on this host (for a CPU: its cores).
        memory: bytes of memory of one device (for a CPU: of the host).
        peak_tflops: dense bf16 peak of one device; None where it is not known.
    """

    kind: str
    name: str
    count: int
    memory: int
    peak_tflops: float | None

    @property
    def backend(self) -> str:
        """The `torch.distributed` backend of its collectives."""
        return BACKENDS[self.kind]

    @property
    def torch_device(self) -> torch.device:
        """This process's device, for `tensor.to`."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device(self.kind, local_rank())


def local_rank() -> int:
    """Rank of this process on its host, as torchrun numbers it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _npu_works() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # installed, but its CANN libraries are not loadable
        return False
    return bool(torch.npu.is_available())  # type: ignore[attr-defined]


@functools.cache
def current() -> Device:
    """The device in use: an NPU if `torch_npu` works, else CUDA, else the CPU.

    Raises:
        UserError: the environment's DEVICE is no device's name, or names one that is not usable.
    """
    works: dict[str, Callable[[], bool]] = {"npu": _npu_works, "cuda": torch.cuda.is_available, "cpu": lambda: True}
    asked = os.environ.get("DEVICE", "")
    if asked and asked not in KINDS:
        raise UserError(f"DEVICE={asked!r} is not a device; expected one of {', '.join(KINDS)}, or nothing")
    if asked and not works[asked]():
        raise UserError(
            f"DEVICE={asked} was asked for, but torch {torch.__version__} sees no {asked} device here; "
            "unset DEVICE to use what there is"
        )
    kind = asked or next(kind for kind in KINDS if works[kind]())
    return _describe(kind)


def _describe(kind: str) -> Device:
    if kind == "cpu":
        return Device("cpu", _cpu_name(), usable_cores(), psutil.virtual_memory().total, None)
    api: Any = getattr(torch, kind)
    name = api.get_device_name(0)
    peak = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
    return Device(kind, name, api.device_count(), api.get_device_properties(0).total_memory, peak)


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    import platform

    return platform.processor() or platform.machine()


def setup() -> Device:
    """Make the device ready for megatron-core in this process; call it before megatron is imported.

    Raises:
        UserError: see `current`.
    """
    device = current()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlap of gradients and matmuls
    if device.kind == "cpu":
        _emulate_cuda_on_cpu()
        cpu.tune()
    else:
        getattr(torch, device.kind).set_device(local_rank())
    from minimind_mcore import megatron_fixes
    from minimind_mcore.fused.install import install

    megatron_fixes.apply()
    install()
    return device


def synchronize() -> None:
    """Wait until the device has done all that was asked of it."""
    if current().kind != "cpu":
        getattr(torch, current().kind).synchronize()


def peak_memory() -> int:
    """Largest memory that this process has held, in bytes: allocated on the device, or resident on a CPU."""
    if current().kind != "cpu":
        return int(getattr(torch, current().kind).max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rng_state() -> torch.Tensor:
    """State of the device's random generator (uint8)."""
    kind = current().kind
    return torch.get_rng_state() if kind == "cpu" else getattr(torch, kind).get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Restore what `rng_state` returned."""
    kind = current().kind
    torch.set_rng_state(state) if kind == "cpu" else getattr(torch, kind).set_rng_state(state)


# ----------------------------------------------------------------------------------------------------
# The CPU as Megatron's accelerator. Functions are replaced one by one rather than through a
# TorchFunctionMode: a mode costs microseconds on every torch call and is local to a thread.

# fmt: off
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "logspace",
    "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm",
    "scalar_tensor", "tensor", "zeros", "zeros_like",
)
# fmt: on
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _on_cpu(device: Any) -> Any:
    """`device`, or the CPU where it names a CUDA device: "cuda", "cuda:1", 1, torch.device("cuda")."""
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    return "cpu" if isinstance(device, int) and not isinstance(device, bool) else device


def _with_cpu_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return wrapper


class _Stream:
    """A CUDA stream on a device that does everything at once and in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    synchronize = wait_event = wait_stream = _nothing

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event


class _Event:
    """A CUDA event; it can time, as the real one does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end.seconds - self.seconds) * 1e3

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _nothing() -> Callable[..., None]:
    """A function that does nothing; a new one each time, as torch._dynamo refuses one under two names."""
    return lambda *args, **kwargs: None


def _no_context() -> Callable[..., Any]:
    """A context manager that does nothing."""
    return lambda *args, **kwargs: contextlib.nullcontext()


def _replace_tensor_methods() -> None:
    to, kind = torch.Tensor.to, torch.Tensor.type

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return to(self, *map(_on_cpu, args[:1]), *args[1:], **kwargs)

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizers sort parameters by the names "torch.cuda.FloatTensor" and the like.
        name = kind(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    tensor: Any = torch.Tensor
    tensor.to, tensor.type = tensor_to, tensor_type
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    for name in _TENSOR_FACTORIES:
        setattr(torch.Tensor, name, _with_cpu_device(getattr(torch.Tensor, name)))


def _replace_cuda_functions() -> None:
    stream = _Stream()
    properties = types.SimpleNamespace(
        name=_cpu_name(),
        major=0,
        minor=0,
        multi_processor_count=usable_cores(),
        total_memory=psutil.virtual_memory().total,
    )
    replacements: dict[str, Any] = {
        "Event": _Event,
        "Stream": _Stream,
        "_lazy_call": lambda call, **kwargs: call(),
        "_lazy_init": _nothing(),
        "current_device": lambda: 0,
        "current_stream": lambda device=None: stream,
        "default_generators": (torch.default_generator,),
        "default_stream": lambda device=None: stream,
        "device": _no_context(),
        "device_count": lambda: 1,
        "empty_cache": _nothing(),
        "get_device_capability": lambda device=None: (0, 0),
        "get_device_properties": lambda device=None: properties,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "ipc_collect": _nothing(),
        "is_available": lambda: False,
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": _nothing(),  # torch.manual_seed seeds the one generator, then calls this
        "set_device": _nothing(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "set_stream": _nothing(),
        "stream": _no_context(),
        "synchronize": _nothing(),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = replacements["get_rng_state"]
    torch.cuda.random.set_rng_state = replacements["set_rng_state"]
    # Megatron's own set_rng_state calls this directly where torch has it.
    torch._C._cuda_setRNGState = torch.set_rng_state  # type: ignore[attr-defined]


def _replace_collectives() -> None:
    """gloo for nccl, and the two places where gloo is used differently from it."""
    c10d = dist.distributed_c10d
    new_group, isend, all_to_all = dist.new_group, dist.isend, dist.all_to_all_single

    @functools.wraps(new_group)
    def new_gloo_group(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        return new_group(*args, **kwargs)

    @functools.wraps(isend)
    def isend_copy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron frees a pipeline output as soon as its send is queued; gloo reads it later.
        return isend(tensor.clone(), *args, **kwargs)

    @functools.wraps(all_to_all)
    def all_to_all_ints(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **kwargs: Any
    ) -> Any:
        # The MoE dispatcher leaves its split sizes in tensors that it believes to be on the device.
        out, into = (s.tolist() if isinstance(s, torch.Tensor) else s for s in (output_split_sizes, input_split_sizes))
        return all_to_all(output, input, out, into, **kwargs)

    modules: tuple[Any, ...] = (dist, c10d)
    for module in modules:
        module.new_group = new_gloo_group
        module.isend = isend_copy
        module.all_to_all_single = all_to_all_ints


@functools.cache
def _emulate_cuda_on_cpu() -> None:
    """Redirect `torch.cuda` and nccl to the CPU and gloo, in this process, for good."""
    if any(name.startswith("megatron.core.") for name in sys.modules):
        raise RuntimeError("device.setup() must come before the first import of megatron.core")
    for name in _FACTORIES:
        setattr(torch, name, _with_cpu_device(getattr(torch, name)))
    _replace_tensor_methods()
    _replace_cuda_functions()
    _replace_collectives()
    # Megatron's random tracker warns when "the CPU's" generator moves while "the device's" is in use.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def main() -> None:
    """Print the kind and the number of devices of this host, for the shell scripts."""
    found = current()
    print(found.kind, found.count)


if __name__ == "__main__":
    from minimind_mcore import errors

    errors.run(main)

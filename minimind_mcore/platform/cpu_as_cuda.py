"""Make the CPU Megatron's accelerator: redirect `torch.cuda` to the CPU, and nccl to gloo.

Functions are replaced one by one rather than through a TorchFunctionMode: a mode costs microseconds on
every torch call and is local to a thread.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.utils._device

from minimind_mcore.platform.processor import cpu_name, usable_cores

# fmt: off
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "logspace",
    "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm",
    "scalar_tensor", "tensor", "zeros", "zeros_like",
)
# fmt: on
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _on_cpu(device: Any) -> Any:
    """Return `device`, or the CPU if it names a CUDA device: "cuda", "cuda:1", 1, torch.device("cuda")."""
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
    """A CUDA stream on a device that runs everything synchronously and in order."""

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
    """A CUDA event, which can measure time like a real one."""

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
    """Return a function that does nothing, a new one each time, because torch._dynamo refuses one under two names."""
    return lambda *args, **kwargs: None


def _no_context() -> Callable[..., Any]:
    """Return a context manager that does nothing."""
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
        name=cpu_name(),
        major=0,
        minor=0,
        multi_processor_count=usable_cores(),
        total_memory=psutil.virtual_memory().total,
        gcnArchName="",  # torch.compile asks for it
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


def _gather_uneven(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Gather tensors of different shapes, which gloo does not support: with TP, experts get unequal numbers of
    tokens."""

    @functools.wraps(all_gather)
    def wrapper(outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **kwargs: Any) -> Any:
        if len({out.shape for out in outputs}) == 1:
            return all_gather(outputs, tensor, group, **kwargs)
        outputs[dist.get_rank(group)].copy_(tensor)
        for rank, out in enumerate(outputs):
            if out.numel():
                dist.broadcast(out, group=group, group_src=rank)
        return None

    return wrapper


def _reduce_scatter_uneven(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """Scatter parts of different shapes, the backward pass of `_gather_uneven`."""

    @functools.wraps(reduce_scatter)
    def wrapper(
        output: torch.Tensor, inputs: list[torch.Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None, **kwargs: Any
    ) -> Any:
        if len({part.shape for part in inputs}) == 1:
            return reduce_scatter(output, inputs, op, group, **kwargs)
        for rank, part in enumerate(inputs):
            total = part.clone()  # gloo leaves partial sums in the other ranks' tensors
            if total.numel():
                dist.reduce(total, op=op, group=group, group_dst=rank)
            if rank == dist.get_rank(group):
                output.copy_(total)
        return None

    return wrapper


def _replace_collectives() -> None:
    """Replace nccl by gloo, and adapt calls that gloo handles differently."""
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
        # The MoE dispatcher leaves its split sizes in tensors, which it assumes to be on the device.
        out, into = (s.tolist() if isinstance(s, torch.Tensor) else s for s in (output_split_sizes, input_split_sizes))
        return all_to_all(output, input, out, into, **kwargs)

    all_gather, reduce_scatter = _gather_uneven(dist.all_gather), _reduce_scatter_uneven(dist.reduce_scatter)
    modules: tuple[Any, ...] = (dist, c10d)
    for module in modules:
        module.all_gather = all_gather
        module.reduce_scatter = reduce_scatter
        module.new_group = new_gloo_group
        module.isend = isend_copy
        module.all_to_all_single = all_to_all_ints


@functools.cache
def emulate() -> None:
    """Redirect `torch.cuda` and nccl to the CPU and gloo, in this process, permanently."""
    if any(name.startswith("megatron.core.") for name in sys.modules):
        raise RuntimeError("device.setup() must come before the first import of megatron.core")
    # torch caches the factories that `with torch.device(...)` affects at the first call. It must see the original ones.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _with_cpu_device(getattr(torch, name)))
    _replace_tensor_methods()
    _replace_cuda_functions()
    _replace_collectives()
    # Megatron's random tracker warns when "the CPU's" generator moves while "the device's" is in use.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)

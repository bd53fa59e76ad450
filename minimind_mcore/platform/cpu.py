"""What makes torch fast on a CPU. Precision and results stay; only the order of additions may differ."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import warnings
from typing import Any

import torch

_backends: Any = torch.backends
_library: Any = None  # the replacement lives as long as this

# Names of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def tune() -> None:
    """Set up this process; call it before torch starts its threads, which inherit some of it."""
    # Adam's moments of rare tokens and the softmax of a sure model hold numbers below 1e-38, on which a CPU
    # multiplies matrices at a third of its speed.
    torch.set_flush_denormal(True)
    keep_freed_memory()
    use_onednn()


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors, which it otherwise returns to the system at once.

    torch has no cache for the CPU as it has for devices: each step would fault in and clear its
    gigabytes of activations again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_ARENA_MAX, 1)  # the arenas of threads give their memory back all the same


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The maker's name of the CPU."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def mkl_is_slow() -> bool:
    """Whether torch multiplies with MKL on a CPU that MKL treats as foreign."""
    if platform.machine() not in ("x86_64", "AMD64") or not _backends.mkl.is_available():
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return "GenuineIntel" not in f.read()
    except OSError:  # not Linux: leave torch as it is
        return False


@functools.cache
def use_onednn() -> None:
    """Let `torch.mm` of fp32 matrices on the CPU go to oneDNN, in forward and backward passes alike.

    torch's x86 builds multiply fp32 matrices with MKL, which takes its slow path on any CPU that is not
    Intel's. oneDNN is in the same builds and does not: on an AMD EPYC it is 2.2 times as fast.
    """
    global _library
    get_kernel = getattr(torch.library, "get_kernel", None)  # torch 2.9 and later
    if not mkl_is_slow() or get_kernel is None or not _backends.mkldnn.is_available():
        return
    mkl = get_kernel("aten::mm", "CPU")
    linear = torch.ops.mkldnn._linear_pointwise.default

    def mm(keys: Any, left: torch.Tensor, right: torch.Tensor) -> Any:
        # oneDNN knows no empty matrices (an expert without tokens); small ones are not worth its set-up.
        if left.dtype is torch.float32 and left.numel() * right.shape[1] > 1 << 20:
            return linear(left, right.t(), None, "none", [], "")
        return mkl.call_boxed(keys, left, right)

    _library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells that a kernel is replaced
        _library.impl("mm", mm, "CPU", with_keyset=True)

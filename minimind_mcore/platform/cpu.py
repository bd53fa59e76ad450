"""Settings that make torch faster on a CPU. The precision is unchanged; only the order of additions may differ."""

from __future__ import annotations

import ctypes
import functools
import warnings
from typing import Any

import torch

from minimind_mcore.platform import processor

_backends: Any = torch.backends
_library: Any = None  # keeps the replaced kernel registered

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def tune() -> None:
    """Set up this process. Call this before torch starts its threads, which inherit the floating-point mode."""
    # Adam's moments of rare tokens and a confident softmax contain denormal numbers (below 1e-38). A CPU multiplies
    # matrices with denormals at a third of its speed.
    torch.set_flush_denormal(True)
    keep_freed_memory()
    use_onednn()


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors instead of returning it to the system at once.

    torch has a caching allocator for GPUs but not for the CPU. Without this, each step would page in and clear
    gigabytes of activations again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has mallopt
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_ARENA_MAX, 1)  # arenas of other threads ignore these settings


def mkl_is_slow() -> bool:
    """Return whether torch uses MKL on a CPU that is not from Intel and has AVX-512, which MKL does not use there."""
    return bool(_backends.mkl.is_available()) and processor.avx512_without_intel()


def onednn_in_use() -> bool:
    """Return whether `use_onednn` has replaced MKL in this process."""
    return _library is not None


@functools.cache
def use_onednn() -> None:
    """Compute `torch.mm` of fp32 matrices on the CPU with oneDNN, in forward and backward passes.

    torch's x86 builds multiply fp32 matrices with MKL, which does not use AVX-512 on CPUs that are not from Intel. The
    same builds contain oneDNN, which does, and is 2.2 times as fast on an AMD EPYC with AVX-512. On one without
    AVX-512 (Zen 3) MKL is faster, by an eighth.
    """
    global _library
    get_kernel = getattr(torch.library, "get_kernel", None)  # torch 2.9 and later
    if not mkl_is_slow() or get_kernel is None or not _backends.mkldnn.is_available():
        return
    mkl = get_kernel("aten::mm", "CPU")
    linear = torch.ops.mkldnn._linear_pointwise.default

    def mm(keys: Any, left: torch.Tensor, right: torch.Tensor) -> Any:
        # oneDNN does not support empty matrices (an expert without tokens), and its setup cost dominates small ones.
        if left.dtype is torch.float32 and left.numel() * right.shape[1] > 1 << 20:
            return linear(left, right.t(), None, "none", [], "")
        return mkl.call_boxed(keys, left, right)

    _library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a kernel is replaced
        _library.impl("mm", mm, "CPU", with_keyset=True)

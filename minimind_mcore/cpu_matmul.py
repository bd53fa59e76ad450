"""Matrix products by oneDNN where MKL is slow.

torch's x86 builds multiply fp32 matrices with MKL, which takes its slow path on any CPU that is not
Intel's. oneDNN is in the same builds and does not: on an AMD EPYC it is 2.2 times as fast (see
docs/benchmarks.md). The precision is the same, only the order of the additions differs.
"""

from __future__ import annotations

import functools
import platform
import warnings
from typing import Any

import torch

_backends: Any = torch.backends
_library: Any = None  # the replacement lives as long as this


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
    """Let `torch.mm` of fp32 matrices on the CPU go to oneDNN, in forward and backward passes alike."""
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

"""The processor of this host. The launcher imports this module, so it does without torch, a slow import."""

from __future__ import annotations

import contextlib
import os
import platform


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the model name of the CPU."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def multiplies_bf16() -> bool:
    """Return whether the CPU has bf16 matrix instructions (AVX512-BF16 or AMX), at least twice as fast as fp32."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpuinfo("flags").split())


def avx512_without_intel() -> bool:
    """Return whether the CPU has AVX-512, and is not from Intel."""
    return "avx512f" in _cpuinfo("flags").split() and _cpuinfo("vendor_id") != "GenuineIntel"


def _cpuinfo(field: str) -> str:
    """Return a field of the first core in /proc/cpuinfo. Empty where there is none, as on other systems than Linux."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""

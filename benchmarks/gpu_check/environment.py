"""Part `environment`: the machine and software, and the matrix and copy rates for comparison."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from gpu_check.rows import MATMUL_RATE, emit

SHOWN = ("torch", "triton", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "peft", "pytest")
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    emit("python", platform.python_version())
    for name in SHOWN:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            emit(name, importlib.metadata.version(name))
    if sys.version_info >= (3, 11):  # 3.10 has no tomllib
        emit("requirements that are missing", ", ".join(missing_requirements()) or "none")
    _device(args.tiny)


def missing_requirements() -> list[str]:
    """Return the packages that pyproject.toml requires for training and LoRA and that are not installed."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lacking = []
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["lora"]]:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
    return lacking


def _device(tiny: bool) -> None:
    import torch

    from minimind_mcore.platform import device
    from minimind_mcore.training.mfu import matmul_rate

    found = device.current()
    emit("device", found.name, note=f"{found.kind}, {found.count} on this host")
    emit("CUDA of torch", torch.version.cuda or "none")
    emit("CPU cores", len(os.sched_getaffinity(0)))
    if found.kind == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.split()
            emit("driver", ", ".join(dict.fromkeys(driver)) or "unknown")
        capability = torch.cuda.get_device_capability()
        emit("compute capability", f"{capability[0]}.{capability[1]}")
        emit("memory, free", torch.cuda.mem_get_info()[0] / 1e9, "GB")
    emit("memory", found.memory / 1e9, "GB")
    largest = 512 if tiny else 8192
    emit(MATMUL_RATE, matmul_rate(torch.bfloat16, largest) / 1e12, "TFLOP/s")
    emit("matrix products, fp32", matmul_rate(torch.float32, largest) / 1e12, "TFLOP/s", note="TF32 is off")
    emit("copy bandwidth", copy_rate(1 << 22 if tiny else 1 << 30) / 1e9, "GB/s", note="bytes read and written")


def copy_rate(size: int) -> float:
    """Return the bandwidth of a copy of `size` bytes on the device, in bytes per second read plus written."""
    import torch

    from minimind_mcore.platform import device

    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device.current().torch_device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        device.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size / sorted(seconds[1:])[2]


if __name__ == "__main__":
    main()

"""Part 4: the ten operators that take most of one training step."""

from __future__ import annotations

import argparse

import torch
from native_engine import NativeEngine
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from gpu_check.rows import emit
from minimind_mcore.models.presets import get_preset
from minimind_mcore.platform import device

OPERATORS = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    on_gpu = device.setup().kind == "cuda"
    name, batch, seq = ("minimind3_tiny", 2, 34) if args.tiny else ("minimind3", 96, 340)
    config = get_preset(name)
    engine = NativeEngine(config, batch, seq, bf16=True)
    ids = torch.randint(0, config.vocab_size, (batch, seq + 1), device=device.current().torch_device)
    for _ in range(1 if args.tiny else 3):
        engine.step(ids)
    device.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        engine.step(ids)
        device.synchronize()
    kind = "device" if on_gpu else "cpu"
    # The time of an operator includes its kernels, which also have rows of their own.
    operators = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    times = {event.key: getattr(event, f"self_{kind}_time_total") for event in operators}
    total = sum(times.values())
    emit(f"{name}, {batch} x {seq}: operators of a step", total / 1e3, "ms", note=f"sum of all, time of the {kind}")
    for key, spent in sorted(times.items(), key=lambda item: -item[1])[:OPERATORS]:
        emit(f"operator {key[:80]}", spent / 1e3, "ms", note=f"{spent / max(total, 1e-9):.1%}")


if __name__ == "__main__":
    main()

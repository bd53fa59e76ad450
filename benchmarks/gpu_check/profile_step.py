"""Part `rest`: the ten operators that take the most time in one training step."""

from __future__ import annotations

import argparse

import torch
from native_engine import NativeEngine
from step_profile import profiled, totals

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
    entries = profiled(lambda: engine.step(ids))
    total = sum(entry.seconds for entry in entries)
    kind = "device" if on_gpu else "cpu"
    emit(f"{name}, {batch} x {seq}: operators of a step", total * 1e3, "ms", note=f"sum of all, time of the {kind}")
    for key, spent in totals(entries, lambda entry: entry.operator)[:OPERATORS]:
        emit(f"operator {key[:80]}", spent * 1e3, "ms", note=f"{spent / max(total, 1e-9):.1%}")


if __name__ == "__main__":
    main()

"""Part `speed`: the training speed of one side of benchmarks/train.py at two sequence lengths."""

from __future__ import annotations

import argparse
import os

import torch
import train

from gpu_check.plan import RATE
from gpu_check.rows import emit
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.platform import device
from minimind_mcore.training.mfu import matmul_rate, mfu

# (batch size, sequence length), with about the same number of tokens.
SHAPES = ((96, 340), (16, 2048))
TINY_SHAPES = ((2, 34), (1, 64))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--side", choices=("native", "plain"), required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    steps, warmup = (2, 1) if args.tiny else (12, 4)
    common = argparse.Namespace(
        side=args.side,
        dtype="bf16",
        threads=torch.get_num_threads(),
        steps=steps,
        warmup=warmup,
        compile_backend="aot_eager" if args.tiny else "inductor",
    )
    train.prepare(common)
    # Part `environment` measures the rate once for all rows. Without that part it is measured here.
    known = os.environ.get(RATE)
    rate = float(known) * 1e12 if known else matmul_rate(torch.bfloat16, 512 if args.tiny else 8192)
    side = "native engine" if args.side == "native" else "plain loop"
    for name in (f"{model}_tiny" if args.tiny else model for model in args.models):
        for batch, seq in TINY_SHAPES if args.tiny else SHAPES:
            if device.current().kind == "cuda":
                torch.cuda.reset_peak_memory_stats()  # forget the peak of the previous shape
            found = train.measure(argparse.Namespace(**vars(common), model=[name], batch=batch, seq=seq))
            share = mfu(PRESETS[name], seq, found["wall"], rate)
            label = f"{name}, {batch} x {seq}: {side}"
            emit(label, found["wall"], "tokens/s", note=f"{found['memory'] / 1e9:.2f} GB at most")
            emit(f"{label}, MFU", 100 * share, "%", note=f"over {rate / 1e12:.1f} TFLOP/s, measured in this run")


if __name__ == "__main__":
    main()

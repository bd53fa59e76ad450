"""Part `rest`: generation speed at batch 1 and 64, of inference.py's decoder and of a plain loop."""

from __future__ import annotations

import argparse
import time

import generate
import torch

from gpu_check.rows import emit
from minimind_mcore.models.presets import get_preset
from minimind_mcore.platform import device

PROMPT = 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    name, tokens = ("minimind3_tiny", 4) if args.tiny else ("minimind3", 64)
    config, dtype = get_preset(name), "fp32" if args.tiny else "bf16"
    torch.manual_seed(1)
    settings = argparse.Namespace(tokens=tokens, dtype=dtype)
    for batch in (1, 4 if args.tiny else 64):
        prompts = torch.randint(3, config.vocab_size, (batch, PROMPT), device=device.current().torch_device)
        for side, build in (("kit", generate.kit_run), ("plain loop", generate.plain_run)):
            run = build(config, settings)
            run(prompts)  # warm-up
            device.synchronize()
            started = time.perf_counter()
            run(prompts)
            device.synchronize()
            rate = batch * tokens / (time.perf_counter() - started)
            emit(f"{name}, {dtype}, batch {batch}: {side}", rate, "tokens/s", note=f"{tokens} new tokens a prompt")


if __name__ == "__main__":
    main()

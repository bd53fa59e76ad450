"""Part `rest`: the embedded server on the device: greedy answers compared with transformers, and speed."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx  # pyright: ignore[reportMissingImports]
import serve
import torch

from gpu_check.rows import emit
from minimind_mcore.platform import device

PROMPTS = [[40 + n + step for step in range(4 + n)] for n in range(6)]
TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    torch_device = device.setup().torch_device
    with tempfile.TemporaryDirectory() as name:
        folder = serve.write_model(Path(name) / "tiny", "minimind3_tiny", vocab_size=serve.VOCABULARY)
        with serve.server(_command(folder, "fp32"), Path(name) / "log") as address:
            found = [row["token_ids"] for row in _complete(address, PROMPTS)["choices"]]
            emit("serving, fp32: greedy tokens are transformers'", "equal", ok=found == _expected(folder, torch_device),
                 note=f"{len(PROMPTS)} prompts of one request")  # fmt: skip
        preset, dtype, batches = ("minimind3_tiny", "fp32", (1, 4)) if args.tiny else ("minimind3", "bf16", (1, 16, 64))
        folder = serve.write_model(Path(name) / "model", preset)
        with serve.server(_command(folder, dtype), Path(name) / "log") as address:
            for batch in batches:
                serve.rate(address, batch, 0)  # warm-up
                note = f"tokens of answers; prompts of {serve.PROMPT}, answers of {serve.ANSWER}"
                emit(f"serving, {preset}, {dtype}, {batch} at a time", serve.rate(address, batch, 1), "tokens/s",
                     note=note)  # fmt: skip


def _command(folder: Path, dtype: str) -> list[str]:
    words = [
        sys.executable,
        "-m",
        "minimind_mcore.cli",
        "serve",
        "--load",
        str(folder),
        "--raw",
        "--params-dtype",
        dtype,
    ]
    return [*words, "--engine", "embedded", "--max-model-len", "512", "--max-num-seqs", "64"]


def _complete(address: str, prompts: list[list[int]]) -> dict[str, list[dict[str, list[int]]]]:
    body = {"model": "minimind", "prompt": prompts, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    reply = httpx.post(f"{address}/v1/completions", json=body, timeout=120)
    reply.raise_for_status()
    found: dict[str, list[dict[str, list[int]]]] = reply.json()
    return found


def _expected(folder: Path, torch_device: torch.device) -> list[list[int]]:
    """Return the tokens that transformers generates, one prompt at a time."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(torch_device)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=torch_device)
        model.generation_config.eos_token_id = None
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS)
        found.append(out[0, len(prompt) :].tolist())
    return found


if __name__ == "__main__":
    main()

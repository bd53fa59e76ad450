"""Measure serving: tokens per second of the embedded server at batch 1 and 16, and of vLLM.

    .venv/bin/python benchmarks/serve.py
    .venv/bin/python benchmarks/serve.py --model minimind3 --vllm .venv-vllm/bin/python --rounds 5

Both engines run the same random float32 weights on the same threads, with the client on the same cores. Each request
has a prompt of 32 tokens and an answer of 128 tokens at temperature 0. The engines alternate, so that other load on the
machine affects both, and the median of the rounds is printed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx  # pyright: ignore[reportMissingImports]
import torch

from minimind_mcore.hosts import free_port
from minimind_mcore.models.presets import get_preset
from minimind_mcore.platform import processor
from minimind_mcore.preprocess import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PROMPT, ANSWER, BATCHES = 32, 128, (1, 16)
VOCABULARY = 296  # vocab size of the tokenizer
VLLM = (
    "--dtype float32 --max-model-len 512 --enforce-eager --max-num-seqs 16 --no-enable-prefix-caching "
    "--disable-log-stats --served-model-name minimind"
).split()


def write_model(folder: Path, preset: str, **changes: int) -> Path:
    """Write a Hugging Face directory with random weights and a small tokenizer. `changes` modify the preset's shape."""
    import transformers

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(get_preset(preset).replace(**changes).hf_config())
    model.float().save_pretrained(folder)
    train_tokenizer.save(train_tokenizer.train(iter(["hello " * 50]), VOCABULARY), str(folder / "tokenizer"))
    for file in (folder / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@contextlib.contextmanager
def server(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """Run a server on a free port, and yield its address."""
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=output, env={**os.environ, **environment}
        )
    try:
        for _ in range(300):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            if process.poll() is not None:
                sys.exit(f"{command[0]} has ended:\n{log.read_text()[-3000:]}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def rate(address: str, batch: int, seed: int) -> float:
    """Return the answer tokens per second with `batch` concurrent requests."""
    numbers = random.Random(seed)
    bodies = [
        {"model": "minimind", "prompt": [numbers.randrange(40, 260) for _ in range(PROMPT)], "max_tokens": ANSWER,
         "temperature": 0, "ignore_eos": True}
        for _ in range(batch)
    ]  # fmt: skip
    with httpx.Client(timeout=600) as client, concurrent.futures.ThreadPoolExecutor(batch) as pool:
        began = time.perf_counter()
        replies = list(pool.map(lambda body: client.post(f"{address}/v1/completions", json=body), bodies))
        seconds = time.perf_counter() - began
    written = sum(reply.json()["usage"]["completion_tokens"] for reply in replies)
    assert written == batch * ANSWER, [reply.text[:200] for reply in replies]
    return written / seconds


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minimind2_small")
    parser.add_argument("--vllm", default=str(ROOT / ".venv-vllm/bin/python"), help="interpreter that has vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    threads = str(processor.usable_cores())
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = write_model(Path(temporary) / "model", args.model)
        embedded = [sys.executable, "-m", "minimind_mcore.cli", "serve", "--load", str(folder), "--raw"]
        embedded += ["--engine", "embedded", "--max-model-len", "512", "--max-num-seqs", "16"]
        environment = {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        engines = {"embedded": stack.enter_context(server(embedded, Path(temporary) / "embedded.log", **environment))}
        if Path(args.vllm).exists():
            command = [args.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *VLLM]
            environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": threads}
            engines["vllm"] = stack.enter_context(server(command, Path(temporary) / "vllm.log", **environment))
        found: dict[tuple[str, int], list[float]] = {}
        for number in range(args.rounds + 1):  # the first round warms up
            for batch in BATCHES:
                for name, address in engines.items():
                    time.sleep(2)  # until the other engine's threads sleep
                    found.setdefault((name, batch), []).append(rate(address, batch, number))
    medians = {key: statistics.median(values[1:]) for key, values in found.items()}
    print(f"{args.model}, float32, {threads} threads, tokens/s of answers:")
    for (name, batch), value in sorted(medians.items()):
        print(f"  {name:9} batch {batch:2}  {value:8.1f}")
    print(f"  embedded: batch 16 is {medians['embedded', 16] / medians['embedded', 1]:.2f} x one at a time (bar: 4)")
    for batch in BATCHES if "vllm" in engines else ():
        ratio = medians["embedded", batch] / medians["vllm", batch]
        print(f"  batch {batch:2}: embedded is {ratio:.2f} x vLLM (bar: 1)")


if __name__ == "__main__":
    main()

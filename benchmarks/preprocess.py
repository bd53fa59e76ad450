"""Measure speed and memory of the conversion of raw text.

    python benchmarks/preprocess.py                    # speed, side by side on one generated input
    python benchmarks/preprocess.py --memory           # peak memory for a 100 MB and a 1 GB input

The baseline is a loop like Megatron-LM's tools/preprocess_data.py: a pool with the same number of workers,
`imap` over the lines in chunks of 32, `json.loads` and the Hugging Face tokenizer on one document at
a time, megatron-core's `IndexedDatasetBuilder` in the parent. All sides write int32 and append eos, and their
files must be equal before times are reported. Times are of whole runs, including process start and loading of the
tokenizer. CPU seconds of all processes together hardly depend on other load, so on a busy machine they are the
better comparison.

Required: with gigatoken at least 8 times the baseline's speed, without gigatoken never slower; equal memory for both
inputs within 10 %, below 1 GiB per worker.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIRED_RATIO = 8.0
MIB = 1 << 20


# ------------------------------------------------------------------ input


def write_input(path: Path, size: int, seed: int) -> None:
    """Write different Chinese and English documents of 50 to 2000 characters, `size` bytes in total."""
    from minimind_mcore.preprocess.corpus import build

    generator = random.Random(seed)
    texts = build(seed)
    written = 0
    with open(path, "wb") as file:
        while written < size:
            text = "\n".join(generator.sample(texts, 2))
            start = generator.randrange(max(1, len(text) - 2000))
            text = f"{generator.randrange(10**9)} {text[start : start + generator.randint(50, 2000)]}"
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            written += len(line)


def sample_tokenizer(directory: Path) -> Path:
    """Train a tokenizer of 6400 ids on the sample corpus."""
    module = [sys.executable, "-m"]
    corpus, tokenizer = directory / "sample.jsonl", directory / "tokenizer"
    subprocess.run([*module, "minimind_mcore.preprocess.corpus", "--output", str(corpus)], check=True, cwd=REPOSITORY)
    arguments = ["minimind_mcore.preprocess.train_tokenizer", "--input", str(corpus), "--output", str(tokenizer)]
    subprocess.run([*module, *arguments], check=True, cwd=REPOSITORY)
    return tokenizer


# ------------------------------------------------------------------ the baseline


class DocumentEncoder:
    """Encodes one JSON line at a time. The tokenizer is loaded in the worker process."""

    tokenizer: Any = None

    def __init__(self, path: str) -> None:
        self.path = path

    def initialize(self) -> None:
        from transformers import AutoTokenizer

        DocumentEncoder.tokenizer = AutoTokenizer.from_pretrained(self.path)

    def encode(self, line: str) -> list[int]:
        tokenizer = DocumentEncoder.tokenizer
        ids: list[int] = tokenizer(json.loads(line)["text"]).input_ids
        return [*ids, tokenizer.eos_token_id] if ids else ids


def one_document_at_a_time(source: str, tokenizer: str, prefix: str, workers: int) -> None:
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = DocumentEncoder(tokenizer)
    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=numpy.int32)
    with open(source, encoding="utf-8") as file, multiprocessing.Pool(workers, encoder.initialize) as pool:
        for ids in pool.imap(encoder.encode, file, 32):
            if ids:
                builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}_text_document.idx")


# ------------------------------------------------------------------ speed


def ours(source: Path, tokenizer: Path, prefix: Path, workers: int, backend: str) -> list[str]:
    return [
        *(sys.executable, str(REPOSITORY / "preprocess_data.py"), "--input", str(source), "--append-eod"),
        *("--tokenizer-name-or-path", str(tokenizer), "--output-prefix", str(prefix), "--workers", str(workers)),
        *("--n-subs", str(4 * workers), "--tokenizer-backend", backend, "--overwrite-cache"),
    ]


def theirs(source: Path, tokenizer: Path, prefix: Path, workers: int) -> list[str]:
    return [sys.executable, __file__, "--opponent", str(source), str(tokenizer), str(prefix), str(workers)]


def timed(command: list[str]) -> tuple[float, float]:
    """Return wall-clock seconds, and CPU seconds of all processes."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"failed: {' '.join(command)}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def speed(directory: Path, tokenizer: Path, megabytes: float, workers: int, repeats: int) -> bool:
    from minimind_mcore.preprocess.indexed import read_index

    source = directory / "input.jsonl"
    write_input(source, int(megabytes * 1e6), seed=0)
    commands: dict[str, Callable[[Path], list[str]]] = {
        "one document at a time": lambda prefix: theirs(source, tokenizer, prefix, workers),
        "ours, tokenizers": lambda prefix: ours(source, tokenizer, prefix, workers, "tokenizers"),
        "ours, gigatoken": lambda prefix: ours(source, tokenizer, prefix, workers, "gigatoken"),
    }
    prefixes = {name: directory / name.replace(" ", "_") for name in commands}
    # Interleaved, so that other load affects all of them.
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            times[name].append(timed(command(prefixes[name])))
    contents = {
        tuple(Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx"))
        for prefix in prefixes.values()
    }
    if len(contents) != 1:
        sys.exit("the outputs differ")
    tokens = int(read_index(f"{prefixes['ours, tokenizers']}_text_document").lengths.sum())
    size = source.stat().st_size
    print(f"\n{size / 1e6:.0f} MB, {tokens:,} tokens, {workers} workers, median of {repeats} runs; equal files\n")
    print(f"{'':24}{'MB/s':>8}{'Mtok/s':>9}{'ratio':>8}{'CPU s':>8}{'ratio':>8}   (all runs, s)")
    wall = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in times.items()}
    cpu = {name: statistics.median(seconds for _, seconds in runs) for name, runs in times.items()}
    base = "one document at a time"
    for name, runs in times.items():
        rates = f"{size / 1e6 / wall[name]:8.1f}{tokens / 1e6 / wall[name]:9.2f}{wall[base] / wall[name]:8.2f}"
        print(
            f"{name:24}{rates}{cpu[name]:8.1f}{cpu[base] / cpu[name]:8.2f}   ({', '.join(f'{t:.2f}' for t, _ in runs)})"
        )
    fast, plain = wall[base] / wall["ours, gigatoken"], wall[base] / wall["ours, tokenizers"]
    return fast >= REQUIRED_RATIO and plain >= 1.0


# ------------------------------------------------------------------ memory


class PeakMemory:
    """Peak resident memory of a process's largest child, and of all children (shared libraries count in each)."""

    def __init__(self, pid: int) -> None:
        self.worker = self.total = 0
        self._process = psutil.Process(pid)
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while self._process.is_running():
            try:
                sizes = [p.memory_info().rss for p in self._process.children(recursive=True)]
                own = self._process.memory_info().rss
            except psutil.Error:
                continue
            self.worker = max(self.worker, *sizes, 0) if sizes else self.worker
            self.total = max(self.total, own + sum(sizes))
            time.sleep(0.02)


def memory(directory: Path, tokenizer: Path, workers: int, backends: list[str]) -> bool:
    peaks: dict[tuple[str, int], PeakMemory] = {}
    for megabytes in (100, 1000):
        source = directory / f"{megabytes}.jsonl"
        write_input(source, megabytes * 1_000_000, seed=0)
        for backend in backends:
            command = ours(source, tokenizer, directory / "out", workers, backend)
            command[command.index("--n-subs") + 1] = "1"
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
            peaks[backend, megabytes] = PeakMemory(process.pid)
            if process.wait():
                sys.exit("the conversion failed")
        source.unlink()
    print(f"\n{'backend':12}{'input':>10}{'per worker':>12}{'all':>10}   (MiB resident, {workers} workers)")
    for (backend, megabytes), peak in peaks.items():
        print(f"{backend:12}{megabytes:7} MB{peak.worker / MIB:12.0f}{peak.total / MIB:10.0f}")
    good = True
    for backend in backends:
        small, large = peaks[backend, 100], peaks[backend, 1000]
        growth = max(large.worker / small.worker, large.total / small.total) - 1
        print(f"{backend}: ten times the input takes {growth:+.1%} memory")
        good &= growth <= 0.10 and large.worker < 1024 * MIB
    return good


def main() -> None:
    if sys.argv[1:2] == ["--opponent"]:
        source, tokenizer, prefix, workers = sys.argv[2:]
        one_document_at_a_time(source, tokenizer, prefix, int(workers))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="default: one trained on the sample corpus")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--backends", nargs="+", default=["gigatoken", "tokenizers"], help="of --memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer = args.tokenizer or sample_tokenizer(directory)
        if args.memory:
            good = memory(directory, tokenizer, args.workers, args.backends)
        else:
            good = speed(directory, tokenizer, args.megabytes, args.workers, args.repeats)
    print("requirements met" if good else "REQUIREMENTS NOT MET")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

"""Compare conversions with copying the same bytes, and with loading and saving in transformers.

    python benchmarks/convert.py --work DIRECTORY            # speed, on a checkpoint of 2.3 GB
    python benchmarks/convert.py --work DIRECTORY --memory   # peak memory, on one of 4.6 GB

The copy does the minimum of any program that writes a checkpoint: read and write, SHA-256 of the output (as for a
manifest), fsync. All sides run alternately, each in a process of its own, on files in the page cache. Times start after
the imports. The time of a conversion includes the self-check, which reads everything back.

Required: at least 0.7 of the copy's speed from Hugging Face to Megatron (TP 2, PP 2) and back; peak memory
below the largest output file + 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.checkpoint.tensors import Slot, create_safetensors
from minimind_mcore.converters.convert import convert
from minimind_mcore.converters.hf import HFTarget, hf_config
from minimind_mcore.converters.megatron import MegatronTarget
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform.cpu import keep_freed_memory
from minimind_mcore.storage import sha256

# MiniMind's architecture with forty times its size.
MODEL = ModelConfig(
    vocab_size=32000,
    hidden_size=2048,
    num_layers=22,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    ffn_hidden_size=6144,
    qk_layernorm=True,
    norm_eps=1e-6,
)
LAYOUT = ParallelLayout(tp=2, pp=2)
REQUIRED_RATIO = 0.7
GIB = 1 << 30


def make(folder: Path, layers: int) -> None:
    """Write a Hugging Face directory with random bf16 weights."""
    folder.mkdir(parents=True)
    config = MODEL.replace(num_layers=layers)
    shapes = {n: s for rule in weights.rules(config) if rule.written for n, s in zip(rule.hf, rule.shapes, strict=True)}
    slots = {name: Slot(shape, torch.bfloat16) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(1)
    with create_safetensors(folder / "model.safetensors", slots) as writer:
        for name, shape in shapes.items():
            writer.write(name, (0.02 * torch.randn(shape, generator=generator)).bfloat16())
        writer.close()
    (folder / "config.json").write_text(json.dumps(hf_config(config) | {"torch_dtype": "bfloat16"}))


# The measured functions `work(source, output)`, each in a process of its own.


def copy(source: Path, output: Path) -> None:
    """Copy, hash and sync."""
    output.mkdir()
    for file in sorted(p for p in source.rglob("*") if p.stat().st_size > 1 << 20):
        target = output / f"{file.parent.name}-{file.name}"
        shutil.copyfile(file, target)
        sha256(target)
        with open(target, "r+b") as f:
            os.fsync(f.fileno())


def to_mcore(source: Path, output: Path) -> None:
    """Convert Hugging Face to Megatron, TP 2 x PP 2."""
    opened = open_source(source)
    convert(opened, MegatronTarget(opened, LAYOUT), output)


def to_hf(source: Path, output: Path) -> None:
    """Convert Megatron to Hugging Face."""
    opened = open_source(source)
    convert(opened, HFTarget(opened, native=False, folder=None), output)


def load_and_save(source: Path, output: Path) -> None:
    """Run from_pretrained and save_pretrained of transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(output)


WORK = {function.__name__: function for function in (copy, to_mcore, to_hf, load_and_save)}


def run_one(name: str, source: Path, output: Path) -> None:
    """Print seconds, CPU seconds and peak memory."""
    import transformers  # noqa: F401

    if name.startswith("to_"):
        keep_freed_memory()  # as the programs do
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    WORK[name](source, output)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rise = (after.ru_maxrss - before.ru_maxrss) * 1024  # mapped file pages included
    print(json.dumps({"seconds": seconds, "cpu": cpu, "rise": rise, "peak": after.ru_maxrss * 1024}))


def measure(name: str, source: Path, output: Path) -> dict[str, float]:
    """Run one function of `WORK` in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # pending writes of an earlier run must not count
    command = [sys.executable, __file__, "--one", name, str(source), str(output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def size(folder: Path) -> int:
    """Return the size of a folder's files in bytes."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def speed(work: Path, rounds: int) -> None:
    """Print GB/s of all sides."""
    hf, mcore = work / "hf", work / "mcore"
    make(hf, MODEL.num_layers)
    to_mcore(hf, mcore)
    sides = {
        "copy the Hugging Face files": ("copy", hf),
        "Hugging Face -> Megatron": ("to_mcore", hf),
        "copy the Megatron files": ("copy", mcore),
        "Megatron -> Hugging Face": ("to_hf", mcore),
        "transformers, load and save": ("load_and_save", hf),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    cpus: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (name, source) in sides.items():
            found = measure(name, source, work / "out")
            times[side].append(found["seconds"])
            cpus[side].append(found["cpu"])
    print(f"{size(hf) / 1e9:.2f} GB in Hugging Face's form, {size(mcore) / 1e9:.2f} GB in Megatron's; {rounds} rounds")
    for side, (_, source) in sides.items():
        gb = size(source) / 1e9
        best, median = gb / min(times[side]), gb / statistics.median(times[side])
        print(f"{side:<30} best {best:.2f} GB/s, median {median:.2f} GB/s, {statistics.median(cpus[side]):.1f} CPU s")
    for ours, theirs in (
        ("Hugging Face -> Megatron", "copy the Hugging Face files"),
        ("Megatron -> Hugging Face", "copy the Megatron files"),
        ("Hugging Face -> Megatron", "transformers, load and save"),
        ("Megatron -> Hugging Face", "transformers, load and save"),
    ):
        pairs = [their / our for our, their in zip(times[ours], times[theirs], strict=True)]
        print(
            f"{ours} against {theirs}: {statistics.median(pairs):.2f} (rounds: {', '.join(f'{p:.2f}' for p in pairs)})"
        )


def memory(work: Path) -> None:
    """Print the peak memory of both directions."""
    hf, mcore = work / "hf", work / "mcore"
    make(hf, 2 * MODEL.num_layers)
    for name, source, output in (("to_mcore", hf, mcore), ("to_hf", mcore, work / "out")):
        found = measure(name, source, output)
        largest = max(p.stat().st_size for p in output.rglob("*") if p.is_file())
        print(
            f"{name}: {size(source) / GIB:.2f} GiB, largest output file {largest / GIB:.2f} GiB, peak memory "
            f"{found['peak'] / GIB:.2f} GiB, of that {found['rise'] / GIB:.2f} since the imports; "
            f"required: less than {largest / GIB + 1:.2f} GiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="an empty directory with 12 GB of space; what is made there is removed"
    )
    parser.add_argument("--memory", action="store_true", help="measure peak memory in place of speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(args.one[0], Path(args.one[1]), Path(args.one[2]))
        return
    work = args.work / "convert-benchmark"
    try:
        memory(work) if args.memory else speed(work, args.rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()

"""Compare the training speed of the native engine with a plain PyTorch loop, in one run.

    python benchmarks/train.py --model minimind2_small minimind3          # a CPU, fp32
    python benchmarks/train.py --model minimind3 --dtype bf16 --batch 32  # a GPU: the loop uses autocast and compile

The loop trains as MiniMind does: its own modules, scaled-dot-product attention, AdamW, gradient clipping; on a GPU
also autocast, torch.compile of one layer, whose code all layers share, and fused AdamW. Both sides have the same sizes,
batches, precision and threads. Each runs in a process of its own, and they alternate several times. The program prints
the medians and their ratio. `minimind_mcore.training.mfu` computes the MFU: the same process measures the matrix
multiplication rate in the same dtype.
The table has tokens per second and tokens per CPU second, which depend less on other load.
On a CPU that is not Intel's the loop also runs with this kit's matrix products (see cpu.py), which
shows their part of the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from native_engine import NativeEngine
from plain_model import PlainModel
from torch import Tensor

from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import get_preset
from minimind_mcore.platform import cpu, device, processor
from minimind_mcore.training.mfu import matmul_rate, mfu

Step = Callable[[], None]


class Trained(PlainModel):
    """The loss of a micro-batch."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        logits, _ = super().forward(ids)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), labels.reshape(-1))
        if self.c.moe:
            layers: Any = self.layers
            loss = loss + sum(layer.mlp.aux_loss for layer in layers)
        return loss


def batches(config: ModelConfig, args: argparse.Namespace) -> Iterator[Tensor]:
    """Yield new random token ids [batch, seq + 1] on the device, the same for both sides."""
    numbers = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(0, config.vocab_size, (args.batch, args.seq + 1), generator=numbers)
        yield ids.to(device.current().torch_device)


def plain_step(config: ModelConfig, args: argparse.Namespace) -> tuple[Step, Step]:
    """Return one update of the plain loop, and a function that ends it."""
    kind = device.current().torch_device
    model: Any = Trained(config, args.seq).to(kind)
    gpu, half = kind.type != "cpu", args.dtype == "bf16"
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=gpu or None)
    if gpu or args.compile_backend != "inductor":
        torch._dynamo.reset()
        for layer in model.layers:  # all layers share one code, which is compiled once
            layer.compile(backend=args.compile_backend, dynamic=False)
    data = batches(config, args)

    def step() -> None:
        ids = next(data)
        with torch.autocast(kind.type, torch.bfloat16, enabled=half):
            loss = model(ids[:, :-1], ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, lambda: None


def native_step(config: ModelConfig, args: argparse.Namespace) -> tuple[Step, Step]:
    """Return one update of the native engine, as in pretrain_gpt.py, and a function that ends it."""
    engine = NativeEngine(config, args.batch, args.seq, args.dtype == "bf16")
    data = batches(config, args)

    def step() -> None:
        engine.step(next(data))

    return step, engine.close


def prepare(args: argparse.Namespace) -> None:
    """Set up the measured process for its side."""
    torch.set_num_threads(args.threads)
    if args.side == "native":
        device.setup()
    elif args.side == "onednn":
        cpu.use_onednn()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Time each step of one side: the medians of tokens/s and of tokens per CPU second, and the peak memory."""
    config = get_preset(args.model[0])
    build = native_step if args.side == "native" else plain_step
    step, close = build(config, args)
    wall, busy = [], []
    for _ in range(args.warmup + args.steps):
        device.synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        device.synchronize()
        wall.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu_start)
    close()
    tokens = args.batch * args.seq
    rates = [tokens / statistics.median(seconds[args.warmup :]) for seconds in (wall, busy)]
    return dict(zip(("wall", "cpu", "memory"), [*rates, float(device.peak_memory())], strict=True))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_side(side: str, model: str, args: argparse.Namespace) -> dict[str, float]:
    """Run `measure` for one side in a process of its own."""
    names = ("batch", "seq", "dtype", "threads", "steps", "warmup", "compile-backend")
    options = [word for name in names for word in (f"--{name}", str(getattr(args, name.replace("-", "_"))))]
    command = [sys.executable, __file__, "--side", side, "--model", model, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def compare(model: str, args: argparse.Namespace) -> None:
    """Run both sides alternately, `--rounds` times; print a table row per side and the ratio."""
    found, config = device.current(), get_preset(model)
    uses_mkl = found.kind == "cpu" and cpu.mkl_is_slow() and args.dtype == "fp32"
    sides = args.sides or ["native", "plain", *(["onednn"] if uses_mkl else [])]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides[:: -1 if number % 2 else 1]:
            runs[side].append(run_side(side, model, args))
            print(f"  round {number + 1} {side:<7}{runs[side][-1]['wall']:>12,.0f} tokens/s", flush=True)
    medians: dict[tuple[str, str], float] = {}
    for side, results in runs.items():
        wall = sorted(run["wall"] for run in results)
        medians[side, "wall"] = middle = statistics.median(wall)
        medians[side, "cpu"] = statistics.median(run["cpu"] for run in results)
        share = mfu(config, args.seq, middle, statistics.median(run["matmul"] for run in results))
        memory = max(run["memory"] for run in results)
        print(
            f"{model:<20}{side:<8}{middle:>9,.0f} tokens/s ({wall[0]:,.0f} to {wall[-1]:,.0f}), "
            f"{medians[side, 'cpu']:,.0f} per CPU second, MFU {share:.1%}, {memory / 2**30:.2f} GiB"
        )
    for other in sides[1:]:
        clock, busy = (medians["native", kind] / medians[other, kind] for kind in ("wall", "cpu"))
        pairs = ", ".join(f"{n['wall'] / p['wall']:.2f}" for n, p in zip(runs["native"], runs[other], strict=True))
        name = "plain loop" if other == "plain" else "plain loop with oneDNN"
        print(f"{model:<20}native to {name}: {clock:.2f} by the clock (rounds {pairs}), {busy:.2f} by CPU seconds")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["minimind2_small", "minimind3"], help="presets")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=340)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=processor.usable_cores())
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=("native", "plain", "onednn"), help="default: all that differ")
    parser.add_argument(
        "--compile-backend",
        default="inductor",
        help="of torch.compile, for the loop; a CPU compiles only under another one, such as aot_eager",
    )
    parser.add_argument("--side", choices=("native", "plain", "onednn"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        prepare(args)
        rate = matmul_rate(DTYPES[args.dtype])
        print(json.dumps(measure(args) | {"matmul": rate}))
        return
    found = device.current()
    print(f"{found.kind}: {found.name}, {args.threads} threads, torch {torch.__version__}, {args.dtype}")
    print(f"batch {args.batch} x {args.seq}, {args.steps} steps a round after {args.warmup} of warm-up\n")
    for model in args.model:
        compare(model, args)


if __name__ == "__main__":
    main()

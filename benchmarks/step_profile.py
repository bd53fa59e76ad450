"""Profile a training step by phase and operator, on a CPU or a GPU.

    python benchmarks/step_profile.py --model minimind3 --batch 4 --seq 340 --dtype bf16
    torchrun --nproc-per-node 2 benchmarks/step_profile.py --model minimind3 -- --tensor-model-parallel-size 2

Flags after `--` are flags of pretrain_gpt.py: the layout, recomputation, the optimizer. The program prints the speed,
the share of the matrix multiplication rate measured in the same process, the time of each phase and of the largest
operators, and the largest loss compared with a step that only multiplies matrices at that rate. It writes the flame
graph of rank 0 as folded stacks to `--output`: open the file at speedscope.app, or with flamegraph.pl.

The file is not called profile.py, because Python's cProfile imports a module of that name.
"""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from native_engine import NativeEngine
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile, record_function

from minimind_mcore.models.presets import get_preset
from minimind_mcore.platform import device
from minimind_mcore.training.mfu import matmul_rate, mfu

PHASES = ("data", "forward", "backward", "gradient reduction", "optimizer", "other")
PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear", "aten::_grouped_mm",
    # A GPU's attention kernels, whose products are among the model FLOPs.
    "aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention", "aten::_cudnn_attention",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """The time of one operator without the operators that it called.

    Attributes:
        stack: names from the phase to the operator.
        seconds: time on the device (on a GPU the time of the kernels).
    """

    stack: tuple[str, ...]
    seconds: float

    @property
    def phase(self) -> str:
        """One of `PHASES`."""
        return self.stack[0]

    @property
    def operator(self) -> str:
        """Name of the operator in torch's profiler."""
        return self.stack[-1]


def mark_phases(engine: NativeEngine) -> None:
    """Name the phases of the engine's steps for the profiler. The backward phase is the work of autograd."""
    assert engine.engine is not None
    core: Any = engine.model[0].config
    core.finalize_model_grads_func = _named("gradient reduction", core.finalize_model_grads_func)
    optimizer: Any = engine.engine.optimizer
    optimizer.step = _named("optimizer", optimizer.step)
    job: Any = engine.job
    job.forward_step = _named("forward", job.forward_step)
    split: Any = engine
    split.batches = _named("data", engine.batches)


def _named(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(phase):
            return function(*args, **kwargs)

    return call


def profiled(step: Callable[[], object]) -> list[Entry]:
    """Run a step under torch's profiler."""
    on_gpu = device.current().kind == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        step()
        device.synchronize()
    kind = "device" if on_gpu else "cpu"
    # The time of an operator includes its kernels, which also have their own events.
    events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CPU]
    return [Entry(_stack(event), getattr(event, f"self_{kind}_time_total") / 1e6) for event in events]


def _stack(event: Any) -> tuple[str, ...]:
    names: list[str] = []
    while event is not None:
        names.insert(0, event.name)
        event = event.cpu_parent
    # On a CPU the backward pass runs within the call of autograd's engine, on a GPU in a thread of its own.
    phase = next((name for name in names if name in PHASES), "")
    autograd = any(name.startswith("autograd::engine") for name in names)
    phase = "backward" if autograd and phase in ("", "forward") else phase or "other"
    return (phase, *(name for name in names if name not in PHASES)) if names[-1] not in PHASES else (phase, "(python)")


def totals(entries: list[Entry], key: Callable[[Entry], str]) -> list[tuple[str, float]]:
    """Return the seconds of each phase or operator, the largest first."""
    sums: dict[str, float] = collections.defaultdict(float)
    for entry in entries:
        sums[key(entry)] += entry.seconds
    return sorted(sums.items(), key=lambda item: -item[1])


def largest_loss(entries: list[Entry], step: float, ideal: float) -> tuple[str, float]:
    """Return the largest loss compared with a step that multiplies matrices at the measured rate, and its seconds.

    Args:
        step: seconds of a step without the profiler.
        ideal: seconds of the model's FLOPs at the matrix multiplication rate.
    """
    operators = dict(totals(entries, lambda entry: entry.operator))
    products = sum(spent for name, spent in operators.items() if name.startswith(PRODUCTS))
    losses = {name: spent for name, spent in operators.items() if not name.startswith(PRODUCTS)}
    losses["matrix products below the rate"] = products - ideal
    losses["time in which no operator runs"] = step - sum(operators.values())
    return max(losses.items(), key=lambda item: item[1])


def report(entries: list[Entry], step: float, ideal: float, rows: int) -> Iterator[str]:
    """Yield the table line by line. `step` and `ideal`: see `largest_loss`."""
    whole = sum(entry.seconds for entry in entries)
    yield f"{'phase':<60}{'ms':>10}{'share':>8}"
    for name, spent in totals(entries, lambda entry: entry.phase):
        yield f"{name:<60}{spent * 1e3:>10.1f}{spent / whole:>8.1%}"
    yield f"\n{'operator':<60}{'ms':>10}{'share':>8}"
    for name, spent in totals(entries, lambda entry: entry.operator)[:rows]:
        yield f"{name[:58]:<60}{spent * 1e3:>10.1f}{spent / whole:>8.1%}"
    name, spent = largest_loss(entries, step, ideal)
    yield f"\nlargest loss: {name}, {spent * 1e3:.1f} ms, {spent / step:.1%} of a step"


def write_flame_graph(entries: list[Entry], path: Path) -> None:
    """Write folded stacks, one line each with its microseconds: the input of speedscope and of flamegraph.pl."""
    sums = totals(entries, lambda entry: ";".join(name.replace(";", ",") for name in entry.stack))
    lines = [f"{stack} {round(spent * 1e6)}" for stack, spent in sums if spent >= 1e-6]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minimind3", help="a preset")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--seq", type=int, default=340)
    parser.add_argument("--micro-batches", type=int, default=1, help="of each data-parallel rank")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed before the profiled one")
    parser.add_argument("--rows", type=int, default=15, help="operators in the table")
    parser.add_argument("--output", type=Path, default=Path("outputs/step_profile.folded"))
    parser.add_argument("flags", nargs="*", help="of pretrain_gpt.py")
    args = parser.parse_args()
    found = device.setup()
    rate = matmul_rate(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    config = get_preset(args.model)
    engine = NativeEngine(config, args.batch, args.seq, args.dtype == "bf16", args.micro_batches, args.flags)
    mark_phases(engine)
    numbers = torch.Generator().manual_seed(0)
    sizes = (args.batch * args.micro_batches, args.seq + 1)
    ids = torch.randint(0, config.vocab_size, sizes, generator=numbers).to(found.torch_device)
    seconds = []
    for _ in range(2 + args.steps):
        device.synchronize()
        start = time.perf_counter()
        engine.step(ids)
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[2:])
    entries = profiled(lambda: engine.step(ids))
    # A rank computes 1 / (TP x PP) of the model for its sequences.
    tokens = ids.shape[0] * args.seq / (engine.config.layout.tp * engine.config.layout.pp)
    engine.close()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{found.name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}")
        print(f"{args.model}: a step of {ids.shape[0]} x {args.seq} tokens takes {step * 1e3:.1f} ms")
        share = mfu(config, args.seq, tokens / step, rate)
        print(f"{share:.1%} of the rate of matrix products, {rate / 1e12:.3f} TFLOP/s in this process\n")
        ideal = config.flops_per_token(args.seq) * tokens / rate
        print("\n".join(report(entries, step, ideal, args.rows)))
        write_flame_graph(entries, args.output)
        print(f"flame graph: {args.output}")


if __name__ == "__main__":
    main()

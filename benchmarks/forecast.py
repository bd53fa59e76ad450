"""Compare forecasts with training runs on this CPU: eight pairs of model and layout, with one and two processes.

    python benchmarks/forecast.py --output outputs/forecast

First six constants are fitted on five other pairs: the memory of a process besides the model, the share of the matrix
rate that training reaches, the fragmentation of the heap in dense models, with TP and with experts, and the bandwidth
between processes. The matrix rate itself is measured. Then the eight pairs are trained on the sample data. The
program prints one row per pair, writes forecast.json and forecast.png, and exits with status 1 if the memory of a
pair is wrong by more than 15 %, or the median time by more than 20 %. It takes 15 to 35 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from minimind_mcore import arguments
from minimind_mcore.forecast import machines, memory, speed
from minimind_mcore.forecast.machines import Machine
from minimind_mcore.forecast.memory import Workload
from minimind_mcore.models.presets import get_preset
from minimind_mcore.platform import processor
from minimind_mcore.training.metrics import read_history
from minimind_mcore.training.mfu import matmul_rate
from minimind_mcore.validation import validate

ROOT = Path(__file__).resolve().parents[1]
STEPS, WARM_UP = 12, 4


@dataclass(frozen=True)
class Pair:
    """A model, a layout and a micro-batch size. A step has two micro-batches per data-parallel rank."""

    model: str
    processes: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    samples: int = 4
    length: int = 340

    @property
    def batch(self) -> int:
        """Number of samples of a step."""
        return 2 * self.samples * self.processes // (self.tp * self.pp)


FITTED = {  # pairs, with the constant fitted on each
    Pair("minimind3_tiny", samples=1, length=64): ("program",),
    Pair("minimind2_small"): ("efficiency", "fragmentation"),
    Pair("minimind2_small", processes=2): ("host_bandwidth",),
    Pair("minimind2_small", processes=2, tp=2): ("fragmentation_tp",),
    Pair("minimind3_moe", samples=2): ("fragmentation_moe",),
}
PAIRS = [
    Pair("minimind3"),
    Pair("minimind3", processes=2),
    Pair("minimind3", processes=2, tp=2),
    Pair("minimind3", processes=2, pp=2),
    Pair("minimind2_small", processes=2, tp=2, samples=8),
    Pair("minimind2_small", processes=2, pp=2, length=768),
    Pair("minimind2", samples=2),
    Pair("minimind2_moe", processes=2, ep=2, samples=2),
]


def workload(pair: Pair) -> Workload:
    """Return the forecast's workload of a pair."""
    model = get_preset(pair.model)
    sizes = {
        "seq-length": pair.length, "micro-batch-size": pair.samples, "global-batch-size": pair.batch,
        "tensor-model-parallel-size": pair.tp, "pipeline-model-parallel-size": pair.pp,
        "expert-model-parallel-size": pair.ep, "train-iters": STEPS, "lr": 1e-4,
    }  # fmt: skip
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    args = arguments.parse([*model.megatron_flags(), *words, "--sequence-parallel", "--use-distributed-optimizer"])
    return Workload.from_flags(vars(args), validate(args, pair.processes), model)


def train(pair: Pair, folder: Path) -> tuple[float, float]:
    """Train a pair. Return the median seconds of a step and the largest resident memory of a process."""
    settings = {
        "MODEL": pair.model, "NPUS_PER_NODE": pair.processes, "TP": pair.tp, "PP": pair.pp, "EP": pair.ep,
        "MBS": pair.samples, "GBS": pair.batch, "SEQ_LENGTH": pair.length, "TRAIN_ITERS": STEPS, "LOG_INTERVAL": 1,
        "EVAL_INTERVAL": 1000, "SAVE_INTERVAL": 1000, "OUTPUT_DIR": folder / "run", "DATA_DIR": folder.parent / "data",
    }  # fmt: skip
    command = [sys.executable, "-m", "minimind_mcore.cli", "pretrain", "--no-save-optim"]
    environment = os.environ | {name: str(value) for name, value in settings.items()} | {"DEVICE": "cpu"}
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    peak = 0
    while run.poll() is None:
        for process in psutil.Process(run.pid).children(recursive=True):
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)
    if run.returncode:
        raise SystemExit(f"the training of {pair} ended with exit status {run.returncode}")
    rows = [row for row in read_history(folder / "run/metrics.jsonl") if "seconds_per_iteration" in row]
    return statistics.median(row["seconds_per_iteration"] for row in rows[WARM_UP:]), peak


def fit(machine: Machine, name: str, pair: Pair, seconds: float, peak: float) -> Machine:
    """Return the device with one constant changed so that the forecast of the pair equals the measurement."""
    work = workload(pair)
    held = memory.of_training(work, machine)
    if name == "program":
        return dataclasses.replace(machine, program=peak - sum(held.values()))
    if name.startswith("fragmentation"):
        changing = held["activations"] + held["logits"]
        fragments = peak - machine.program - sum(held.values()) + held.get("fragmentation", 0.0)
        return dataclasses.replace(machine, **{name: 1 + fragments / changing})
    parts = speed.of_training(work, machine)
    if name == "efficiency":
        share = machine.efficiency * parts["compute"] / (seconds - parts["update"])
        return dataclasses.replace(machine, efficiency=share, efficiency_compiled=share)
    waiting = max(1e-3, seconds - sum(parts.values()) + parts["DP"])
    return dataclasses.replace(machine, host_bandwidth=speed.volume(work)["DP"] / waiting)


def plot(rows: list[dict[str, float | str]], file: Path) -> None:
    """Plot measured against predicted values, for time and memory."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5))
    for axis, name, unit in zip(axes, ("seconds", "bytes"), ("s per step", "bytes per process"), strict=True):
        measured, predicted = ([float(row[f"{kind} {name}"]) for row in rows] for kind in ("measured", "predicted"))
        axis.loglog(measured, predicted, "o")
        ends = [min(measured) * 0.8, max(measured) * 1.25]
        axis.loglog(ends, ends, "-", color="gray", linewidth=1)
        axis.set_xlabel(f"measured, {unit}")
        axis.set_ylabel(f"predicted, {unit}")
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    """Fit, train the pairs, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/forecast"))
    out = parser.parse_args().output
    out.mkdir(parents=True, exist_ok=True)
    cores = processor.usable_cores()
    core = matmul_rate(torch.float32) / torch.get_num_threads()
    machine = dataclasses.replace(machines.machine("cpu"), matmul_flops=core)
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (pair, names) in enumerate(FITTED.items()):
            seconds, peak = train(pair, Path(folder, f"fitted-{number}"))
            for name in names:
                # Only the fitted constant is copied, because `machine` describes one core.
                fitted = fit(machine.with_cores(cores / pair.processes), name, pair, seconds, peak)
                machine = dataclasses.replace(machine, **{name: getattr(fitted, name)})
                machine = dataclasses.replace(machine, efficiency_compiled=machine.efficiency)
                print(f"{name}: {getattr(machine, name):.4g}", flush=True)
        for number, pair in enumerate(PAIRS):
            seconds, peak = train(pair, Path(folder, str(number)))
            work, here = workload(pair), machine.with_cores(cores / pair.processes)
            rows.append(
                {
                    "pair": f"{pair.model} TP{pair.tp} PP{pair.pp} EP{pair.ep} on {pair.processes}",
                    "measured seconds": seconds,
                    "predicted seconds": sum(speed.of_training(work, here).values()),
                    "measured bytes": peak,
                    "predicted bytes": sum(memory.of_training(work, here).values()) + here.program,
                }
            )
            print({name: f"{v:.4g}" if isinstance(v, float) else v for name, v in rows[-1].items()}, flush=True)
    (out / "forecast.json").write_text(json.dumps({"machine": vars(machine), "pairs": rows}, indent=1))
    plot(rows, out / "forecast.png")
    errors = {
        name: [abs(float(row[f"predicted {name}"]) / float(row[f"measured {name}"]) - 1) for row in rows]
        for name in ("seconds", "bytes")
    }
    median, worst = statistics.median(errors["seconds"]), max(errors["bytes"])
    print(f"time: median error {median:.0%} (goal 20 %); memory: largest error {worst:.0%} (goal 15 %)")
    sys.exit(median > 0.2 or worst > 0.15)


if __name__ == "__main__":
    main()

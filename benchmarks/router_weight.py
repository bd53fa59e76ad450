"""Train minimind3_moe_tiny from scratch with each router weight, and compare validation loss and expert loads.

    python benchmarks/router_weight.py --output outputs/router_weight             # nine runs
    python benchmarks/router_weight.py --output outputs/router_weight --report    # only the table and the picture

The sample corpus is the data; every 20th record is held out. A seed fixes the initial weights and the order of the
samples, so that the three rules start from the same model and read the same batches. The held-out batches are the
same for every run. Finished runs are skipped, so an interrupted experiment continues with the same command.

Written below --output: one folder per run, results.json, table.md and router_weight.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_mcore import arguments
from minimind_mcore.errors import run
from minimind_mcore.models.config import ROUTER_WEIGHTS
from minimind_mcore.models.presets import get_preset
from minimind_mcore.models.recipes import get_recipe
from minimind_mcore.platform import device
from minimind_mcore.preprocess.corpus import build
from minimind_mcore.storage import atomic_write_text
from minimind_mcore.training import data, pretrain
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.job import Job
from minimind_mcore.training.metrics import read_history

ROOT = Path(__file__).resolve().parents[1]
MODEL = "minimind3_moe_tiny"
HELD_OUT = 20  # every 20th record
COLORS = {"normalized": "#888888", "softmax": "#1f77b4", "straight_through": "#d62728"}


class Measured(Job):
    """Pretraining that counts the tokens of each expert during evaluation.

    Attributes:
        loads: by layer, tokens that each expert got in the newest evaluation.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.loads: dict[int, Tensor] = {}

    def build_datasets(self) -> list[Any]:
        """The training set in the order of `--seed`; the validation set in an order that no seed changes."""
        train, _, _ = super().build_datasets()
        # As if there were one evaluation: the data of several is shuffled together, with repetitions.
        once = self.config.changed(seed=0, eval_interval=self.config.schedule.train_iters + 1)
        _, valid, _ = data.build_datasets(once)
        return [train, valid, None]

    def prepare_model(self, chunks: list[Any]) -> None:
        """Watch the router of every layer."""
        for number, layer in enumerate(chunks[0].decoder.layers):
            layer.mlp.router.register_forward_hook(
                lambda router, _, output, number=number: self._count(number, router.training, output[1])
            )

    def _count(self, layer: int, training: bool, routing_map: Tensor) -> None:
        if training:  # an evaluation that follows counts from zero
            self.loads.pop(layer, None)
        else:
            self.loads[layer] = self.loads.get(layer, torch.zeros(1)) + routing_map.sum(dim=0)


def make_data(folder: Path) -> None:
    """Write tokenizer, training and held-out data, unless they are there."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in build(42)]
    parts = {
        "sample": rows,
        "train": [row for number, row in enumerate(rows) if number % HELD_OUT],
        "held_out": rows[::HELD_OUT],
    }
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    tokenizer = folder / "tokenizer"
    _python(
        "-m", "minimind_mcore.preprocess.train_tokenizer", "--input", folder / "sample.jsonl", "--output", tokenizer
    )
    for name in ("train", "held_out"):
        _python(
            ROOT / "preprocess_data.py", "--input", folder / f"{name}.jsonl", "--output-prefix", folder / name,
            "--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", tokenizer, "--workers", 1,
            "--handler-name", "GeneralPretrainHandler", "--json-keys", "text", "--prepend-bos", "--append-eod",
        )  # fmt: skip
    (folder / "complete").touch()


def _python(*words: object) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True)


def command_line(args: argparse.Namespace, rule: str, seed: int, folder: Path) -> list[str]:
    """The flags of one run: the tiny recipe with the batch of this experiment."""
    inputs = args.output / "data"
    values = {
        "--router-weight": rule,
        "--seed": seed,
        "--seq-length": args.seq,
        "--micro-batch-size": args.batch,
        "--global-batch-size": args.batch,
        "--train-iters": args.iterations,
        "--eval-interval": args.eval_interval,
        "--eval-iters": args.eval_iters,
        "--log-interval": 20,
        "--num-workers": 0,
        "--train-data-path": f"{inputs}/train_text_document",
        "--valid-data-path": f"{inputs}/held_out_text_document",
        "--data-cache-path": folder / "cache",
        "--tokenizer-type": "PretrainedFromHF",
        "--tokenizer-name-or-path": inputs / "tokenizer",
        "--transformer-impl": "local",
        "--output-dir": folder,
    }
    recipe = get_recipe("tiny_pretrain").megatron_flags()
    return [*get_preset(MODEL).megatron_flags(), *recipe, *(str(word) for pair in values.items() for word in pair)]


def work(args: argparse.Namespace) -> None:
    """Train one model in this process and write its results."""
    rule, seed = args.worker[0], int(args.worker[1])
    folder = args.output / f"{rule}-{seed}"
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    job = pretrain.run(Measured, arguments.parse(command_line(args, rule, seed, folder)))
    assert job is not None
    history = read_history(folder / "metrics.jsonl")
    loads = [(counts / counts.sum()).tolist() for _, counts in sorted(job.loads.items())]
    results = {
        "rule": rule,
        "seed": seed,
        "validation_loss": [[row["iteration"], row["validation_loss"]] for row in history if "validation_loss" in row],
        "training_loss": [[row["iteration"], row["lm_loss"]] for row in history if "lm_loss" in row],
        "auxiliary_loss": [
            [row["iteration"], row["load_balancing_loss"]] for row in history if "load_balancing_loss" in row
        ],
        "loads": loads,  # [layer][expert], shares of the held-out tokens at the end
        "minutes": (time.monotonic() - started) / 60,
        "device": device.current().kind,
    }
    atomic_write_text(folder / "result.json", json.dumps(results))


def train_all(args: argparse.Namespace) -> None:
    """Run the unfinished trainings seed by seed, `--jobs` at a time."""
    waiting = [(rule, seed) for seed in args.seeds for rule in ROUTER_WEIGHTS]
    waiting = [one for one in waiting if not (args.output / "{}-{}".format(*one) / "result.json").exists()]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    while waiting or running:
        while waiting and len(running) < args.jobs:
            rule, seed = one = waiting.pop(0)
            folder = args.output / f"{rule}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", rule, str(seed)]
            with (folder / "log.txt").open("wb") as log:
                running[one] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        time.sleep(1)
        for one, process in [*running.items()]:
            if process.poll() is not None:
                del running[one]
                print(f"{one[0]}, seed {one[1]}: exit status {process.returncode}", flush=True)
                if process.returncode:
                    sys.exit(f"see {args.output / '{}-{}'.format(*one) / 'log.txt'}")


def imbalance(result: dict[str, Any]) -> float:
    """Largest share of an expert, averaged over layers (0.25 with four equally loaded experts)."""
    return statistics.mean(max(shares) for shares in result["loads"])


def auxiliary(result: dict[str, Any]) -> float:
    """Auxiliary loss over the last tenth of the training, without its coefficient; 1 is its floor."""
    rows = result["auxiliary_loss"]
    return statistics.mean(loss for _, loss in rows[-max(1, len(rows) // 10) :])


def table(results: Sequence[dict[str, Any]]) -> str:
    """The comparison in Markdown: each rule's median, minimum and maximum over its seeds."""
    lines = [
        "| router weight | validation loss: median (min to max) | auxiliary loss | largest share of an expert |",
        "|---|---|---|---|",
    ]
    for rule in ROUTER_WEIGHTS:
        runs = [result for result in results if result["rule"] == rule]
        if not runs:
            continue
        losses = [result["validation_loss"][-1][1] for result in runs]
        aux, share = (statistics.median(map(of, runs)) for of in (auxiliary, imbalance))
        spread = f"{min(losses):.4f} to {max(losses):.4f}"
        lines.append(f"| `{rule}` | {statistics.median(losses):.4f} ({spread}) | {aux:.4f} | {share:.3f} |")
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw validation loss, auxiliary loss and expert loads, one colour per rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    losses, aux, loads = figure.subplots(1, 3)
    for place, rule in enumerate(ROUTER_WEIGHTS):
        runs = [result for result in results if result["rule"] == rule]
        for number, result in enumerate(runs):
            label = rule if number == 0 else None
            losses.plot(*zip(*result["validation_loss"], strict=True), color=COLORS[rule], label=label, marker=".")
            aux.plot(*zip(*result["auxiliary_loss"], strict=True), color=COLORS[rule], lw=0.8)
            shares = [share for layer in result["loads"] for share in layer]
            loads.plot([place + 0.15 * (number - 1)] * len(shares), shares, ".", color=COLORS[rule], alpha=0.6)
    losses.set(title="validation loss (nats per token)", xlabel="iteration")
    aux.set(title="auxiliary loss (floor 1)", xlabel="iteration")
    loads.set(title="share of tokens of each expert", xticks=range(3), xticklabels=ROUTER_WEIGHTS, ylim=(0, None))
    loads.set_xlim(-0.5, 2.5)
    loads.axhline(0.25, color="black", lw=0.5)
    losses.legend()
    figure.savefig(path, dpi=110)


def report(args: argparse.Namespace) -> None:
    """Write results.json, table.md and the picture from the finished runs, and print the table."""
    files = sorted(args.output.glob("*-*/result.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    atomic_write_text(args.output / "results.json", json.dumps(results, indent=1))
    atomic_write_text(args.output / "table.md", table(results) + "\n")
    draw(results, args.output / "router_weight.png")
    print(table(results))


def main() -> None:
    """Train and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of data, runs, table and picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="samples of an update")
    parser.add_argument("--seq", type=int, default=340, help="tokens of a sample")
    parser.add_argument("--eval-interval", type=int, default=250)
    parser.add_argument("--eval-iters", type=int, default=20, help="held-out batches; 20 are all of the held-out data")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--worker", nargs=2, metavar=("RULE", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output = args.output.absolute()
    if args.worker:
        work(args)
        return
    if not args.report:
        make_data(args.output / "data")
        train_all(args)
    report(args)


if __name__ == "__main__":
    run(main)

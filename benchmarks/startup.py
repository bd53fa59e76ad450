"""Measure how long a training takes to start.

    python benchmarks/startup.py ../old .            # each with its own .venv; the first is the reference
    python benchmarks/startup.py --rounds 5 .

First step: time from the start of pretrain_minimind_ptd.sh (minimind3_tiny, TP=2, converted data) to the line of
the first iteration. Dry run: time of the same command with --dry-run. The checkouts alternate. The table has the
minimum over the rounds, because other load can only make a start longer.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

FIRST = "iteration        1/"
SCRIPTS = "examples/mcore/minimind"


def environment(checkout: Path, folder: Path) -> dict[str, str]:
    python = checkout / ".venv/bin/python"
    own = {"PYTHON": str(python if python.exists() else Path(sys.executable)), "DATA_DIR": str(folder / "data")}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | own | {"DEVICE": "cpu", "MODEL": "minimind3_tiny", "TP": "2", "NPUS_PER_NODE": "2"}


def convert(checkout: Path, folder: Path) -> str:
    """Make the sample data; return the prefix of the converted data."""
    command = ["bash", str(checkout / SCRIPTS / "data_convert_minimind_pretrain.sh")]
    done = subprocess.run(command, env=environment(checkout, folder), stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def launch(checkout: Path, folder: Path, prefix: str, number: int) -> float:
    """Return the seconds from launch to the first step."""
    settings = environment(checkout, folder) | {
        "DATA_PATH": prefix, "TOKENIZER_PATH": str(folder / "data/tokenizer"), "TRAIN_ITERS": "1000",
        "LOG_INTERVAL": "1", "OUTPUT_DIR": str(folder / f"run{number}"),
    }  # fmt: skip
    command = ["bash", str(checkout / SCRIPTS / "pretrain_minimind_ptd.sh")]
    began = time.monotonic()
    process = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    try:
        for line in process.stdout:
            if FIRST in line:
                return time.monotonic() - began
        raise SystemExit(f"{checkout}: no first iteration; exit status {process.wait()}")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def dry_run(checkout: Path, folder: Path, prefix: str) -> float:
    """Return the seconds of a dry run."""
    settings = environment(checkout, folder) | {
        "DATA_PATH": prefix, "TOKENIZER_PATH": str(folder / "data/tokenizer"), "OUTPUT_DIR": str(folder / "dry"),
    }  # fmt: skip
    began = time.monotonic()
    command = ["bash", str(checkout / SCRIPTS / "pretrain_minimind_ptd.sh"), "--dry-run"]
    subprocess.run(command, env=settings, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[Path, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkouts = [checkout.resolve() for checkout in args.checkouts]
        prefix = convert(checkouts[0], folder)
        for number in range(args.rounds):
            for checkout in checkouts:
                first = launch(checkout, folder, prefix, number * len(checkouts) + checkouts.index(checkout))
                found[checkout].append((first, dry_run(checkout, folder, prefix)))
    best = {checkout: [min(column) for column in zip(*rows, strict=True)] for checkout, rows in found.items()}
    print(f"{'first step':>12}{'ratio':>8}{'dry run':>10}{'ratio':>8}  checkout (seconds, best of {args.rounds})")
    reference = best[checkouts[0]]
    for checkout, (first, dry) in best.items():
        print(f"{first:>12.2f}{first / reference[0]:>8.2f}{dry:>10.2f}{dry / reference[1]:>8.2f}  {checkout}")


if __name__ == "__main__":
    main()

"""Record what a checkout trains, to compare it with another checkout bit for bit.

    python benchmarks/same_results.py record ../before --output before.json
    python benchmarks/same_results.py record . --output after.json
    python benchmarks/same_results.py compare before.json after.json     # exit status 1 if anything differs

Each tiny preset trains ten steps at TP 1, TP 2 and PP 2 on a CPU, one thread a process, from the same seed and data.
The record holds the losses and gradient norms of the steps, and a digest of all weights in the final checkpoint. The
programs are those of the given checkout (the record says where its package was imported from); the interpreter and
the libraries are those that run this file. A record takes about five minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind_mcore.hosts import free_port

LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}  # tensor and pipeline parallel sizes
ROW = ("iteration", "consumed_samples", "learning_rate", "lm_loss", "validation_loss", "load_balancing_loss",
       "seq_load_balancing_loss", "grad_norm")  # fmt: skip
TRAINING = {
    "--seq-length": 64, "--micro-batch-size": 2, "--global-batch-size": 8, "--lr": 4e-3, "--min-lr": 4e-4,
    "--lr-decay-style": "cosine", "--weight-decay": 0.01, "--clip-grad": 1.0, "--log-interval": 1,
    "--eval-interval": 5, "--eval-iters": 1, "--num-workers": 0, "--split": "90,10,0", "--seed": 42,
    "--tokenizer-type": "PretrainedFromHF", "--ckpt-format": "torch", "--transformer-impl": "local",
    "--minimind-init": "normal",
}  # fmt: skip
SWITCHES = ("--lr-at-iteration-end", "--decay-all", "--sequence-parallel", "--use-distributed-optimizer")


def environment(checkout: Path) -> dict[str, str]:
    """Return the environment in which the programs of a checkout import that checkout's packages."""
    return os.environ | {"PYTHONPATH": str(checkout), "DEVICE": "cpu", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def call(checkout: Path, work: Path, *words: object) -> str:
    """Run Python with these arguments in `work`; return what it prints."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=work, env=environment(checkout), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def prepare(checkout: Path, work: Path) -> str:
    """Make tokenizer and dataset in `work`; return a digest of the files."""
    call(checkout, work, "-m", "minimind_mcore.preprocess.corpus", "--output", "text.jsonl", "--seed", 42)
    lines = (work / "text.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2000]
    (work / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    call(checkout, work, "-m", "minimind_mcore.preprocess.train_tokenizer", "--input", "text.jsonl", "--output", "tk")
    call(
        checkout, work, checkout / "preprocess_data.py", "--input", "text.jsonl", "--output-prefix", "data",
        "--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", "tk", "--json-keys", "text",
        "--prepend-bos", "--append-eod", "--workers", 1,
    )  # fmt: skip
    files = (work / "tk/tokenizer.json", *sorted(work.glob("data*.bin")), *sorted(work.glob("data*.idx")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def train(checkout: Path, work: Path, preset: str, layout: str, iterations: int) -> None:
    """Pretrain one preset at one layout; metrics.jsonl and the checkpoint go to `work`/PRESET-LAYOUT."""
    tp, pp = LAYOUTS[layout]
    folder = work / f"{preset}-{layout}"
    model = call(checkout, work, "-m", "minimind_mcore.models.presets", preset).split("\n")
    numbers = TRAINING | {
        "--train-iters": iterations, "--tensor-model-parallel-size": tp, "--pipeline-model-parallel-size": pp,
        "--data-path": work / "data_text_document", "--tokenizer-name-or-path": work / "tk",
        "--save": folder / "checkpoints", "--save-interval": iterations, "--output-dir": folder,
    }  # fmt: skip
    flags = [*filter(None, model), *(str(word) for pair in numbers.items() for word in pair), *SWITCHES]
    port = free_port()
    ranks, logs = [], []
    folder.mkdir()
    for rank in range(tp * pp):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": tp * pp, "MASTER_ADDR": "127.0.0.1"}
        variables = {name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()}
        logs.append(folder / f"rank{rank}.log")
        with logs[-1].open("wb") as log:
            command = [sys.executable, str(checkout / "pretrain_gpt.py"), *flags]
            every = environment(checkout) | variables
            ranks.append(subprocess.Popen(command, cwd=work, env=every, stdout=log, stderr=subprocess.STDOUT))
    if any([rank.wait(timeout=900) for rank in ranks]):
        raise SystemExit(f"error: {preset} at {layout} failed\n" + "".join(log.read_text() for log in logs))


def weights_digest(checkout: Path, work: Path, checkpoint: Path) -> str:
    """Return a digest of names, dtypes, shapes and bytes of the weights of every rank."""
    code = (
        "import hashlib, pathlib, sys, torch\n"
        "digest = hashlib.sha256()\n"
        "for file in sorted(pathlib.Path(sys.argv[1]).rglob('model_optim_rng.pt')):\n"
        "    digest.update(file.parent.name.encode())\n"
        "    model = torch.load(file, map_location='cpu', weights_only=False)['model']\n"
        "    for name in sorted(model):\n"
        "        if isinstance(model[name], torch.Tensor):\n"
        "            value = model[name].contiguous()\n"
        "            digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())\n"
        "            digest.update(value.view(torch.uint8).numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    return call(checkout, work, "-c", code, checkpoint).strip()


def record(checkout: Path, presets: Sequence[str], layouts: Sequence[str], iterations: int) -> dict[str, Any]:
    """Train every preset at every layout with the programs of `checkout`; return what is compared."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=checkout, capture_output=True, text=True)
    with tempfile.TemporaryDirectory(prefix="same-results-") as folder:
        work = Path(folder)
        where = "import minimind_mcore as a, minimind_mcore.models.config as b; print(a.__file__, b.__file__)"
        imported = call(checkout, work, "-c", where).split()
        if any(not Path(file).resolve().is_relative_to(checkout) for file in imported):
            raise SystemExit(f"error: {imported} was imported; expected files in {checkout}")
        runs: dict[str, Any] = {}
        found = {"commit": commit.stdout.strip(), "imported": imported, "data": prepare(checkout, work), "runs": runs}
        for preset in presets or call(checkout, work, "-m", "minimind_mcore.models.presets", "--list").split():
            if not preset.endswith("_tiny"):
                continue  # the table's other words: larger presets and columns
            for layout in layouts:
                train(checkout, work, preset, layout, iterations)
                run = work / f"{preset}-{layout}"
                rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
                steps = [{name: row[name] for name in ROW if name in row} for row in rows]
                checkpoint = run / f"checkpoints/iter_{iterations:07d}"
                runs[f"{preset} {layout}"] = {
                    "steps": [step for step in steps if len(step) > 1],
                    "weights": weights_digest(checkout, work, checkpoint),
                }
                print(f"{preset} {layout}: {json.dumps(runs[f'{preset} {layout}']['steps'][-1])}", file=sys.stderr)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return one line for each thing that two records do not share."""
    found = [] if before["data"] == after["data"] else ["the tokenizer or dataset files differ"]
    for name in sorted(before["runs"].keys() | after["runs"].keys()):
        one, other = before["runs"].get(name), after["runs"].get(name)
        if one is None or other is None:
            found.append(f"{name}: only in the {'second' if one is None else 'first'} record")
            continue
        for a, b in zip(one["steps"], other["steps"], strict=False):
            found += [
                f"{name}: {key} of {a} and {b}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)
            ]
        if len(one["steps"]) != len(other["steps"]):
            found.append(f"{name}: {len(one['steps'])} and {len(other['steps'])} rows")
        if one["weights"] != other["weights"]:
            found.append(f"{name}: the weights of the final checkpoint differ")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorded = commands.add_parser("record", help="train with the programs of a checkout")
    recorded.add_argument("checkout", type=Path)
    recorded.add_argument("--output", type=Path, required=True)
    recorded.add_argument("--presets", nargs="+", default=[], help="default: all whose names end in _tiny")
    recorded.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    recorded.add_argument("--iterations", type=int, default=10)
    compared = commands.add_parser("compare", help="list the differences of two records")
    compared.add_argument("before", type=Path)
    compared.add_argument("after", type=Path)
    args = parser.parse_args(argv)
    if args.command == "record":
        found = record(args.checkout.resolve(), args.presets, args.layouts, args.iterations)
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{args.output}: {len(found['runs'])} runs of {found['commit']}, {found['imported'][0]}")
        return
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (args.before, args.after))
    found_differences = differences(before, after)
    print("\n".join(found_differences) or f"equal: {len(before['runs'])} runs of {before['commit']}, {after['commit']}")
    sys.exit(1 if found_differences else 0)


if __name__ == "__main__":
    main()

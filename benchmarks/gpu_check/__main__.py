"""Check the kit on a GPU in at most seven minutes: correctness, speed, and a profile of one step.

    bash benchmarks/gpu_check.sh                    # the whole check, on a CUDA device
    bash benchmarks/gpu_check.sh --part speed       # one part of it
    bash benchmarks/gpu_check.sh --dry-run          # print the plan; works on any machine
    bash benchmarks/gpu_check.sh --tiny --device cpu

The check prints a table, and writes gpu_check.json and gpu_check.log to $OUT (default: outputs/gpu_check). The exit
status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpu_check import plan
from gpu_check.rows import LARGEST_FILE, MATMUL_RATE, Row, Value, document, failed, table
from gpu_check.runner import Outcome, importable, run_part

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".gpu_wheels"


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    args = _parse(argv)
    chosen = plan.with_needed(args.part or plan.PARTS)
    checks = [check for check in plan.checks(args.tiny) if check.part in chosen]
    seen = _cuda_device()
    if args.dry_run:
        return _dry_run(checks, chosen, args, seen)
    if args.device == "cuda" and seen is None:
        print(
            "error: torch finds no CUDA device here. --dry-run prints the plan; --tiny --device cpu runs the check on "
            "the CPU with small sizes",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as name:
        return _run(checks, chosen, args, Path(name), started)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part",
        action="append",
        choices=plan.PARTS,
        help="run only this part; can be repeated. speed also runs environment, whose matrix rate the MFU needs",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes; the measured speed is meaningless")
    parser.add_argument("--output", type=Path, help="output directory of the JSON file and the log")
    return parser.parse_args(argv)


def _cuda_device() -> str | None:
    """Return the name of the first CUDA device, or None."""
    if not importable("torch"):
        return None
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def _dry_run(checks: Sequence[plan.Check], chosen: Sequence[str], args: argparse.Namespace, seen: str | None) -> int:
    print(f"device: {seen or 'no CUDA device here'}; python: {sys.executable}")
    collected = sorted(wheel.name for wheel in WHEELS.rglob("*.whl"))
    print(f"wheels in {WHEELS.name}: {', '.join(collected) or 'none; bash benchmarks/gpu_wheels.sh collects them'}")
    for part in chosen:
        print(f"== {part}: at most {plan.LIMITS[part]:.0f} s")
        for check in (check for check in checks if check.part == part):
            missing = [name for name in check.needs if not importable(name)]
            lack = f" [not installed here: {', '.join(missing)}]" if missing else ""
            print(f"  {check.name}: {check.does} (at most {check.seconds:.0f} s){lack}")
        for row in plan.NOT_MEASURED.get(part, ()):
            print(f"  {row}: not measured, {plan.TWO_DEVICES}")
    seconds = min(plan.TOTAL_SECONDS, sum(plan.LIMITS[part] for part in chosen))
    print(f"== at most {seconds:.0f} s in all; results would go to {_output(args)}")
    print("dry run: nothing was run")
    return 0


def _output(args: argparse.Namespace) -> Path:
    return args.output or Path(os.environ.get("OUT") or ROOT / "outputs/gpu_check")


def _run(
    checks: Sequence[plan.Check], chosen: Sequence[str], args: argparse.Namespace, scratch: Path, started: float
) -> int:
    """Run the parts. JSON and log are written after each part, so an interrupted check keeps its results."""
    output, slowness = _output(args), plan.slowness(args.tiny)
    site, newer = scratch / "site", scratch / "newer"
    site.mkdir()
    environment = _environment(args, [site])
    # Shared by all programs, although each has its own TMPDIR.
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    unpack = plan.unpack(WHEELS, site, newer)
    results: dict[str, list[Row]] = {}
    logs: list[str] = []

    def run(part: str, mine: Sequence[plan.Check], seconds: float) -> None:
        print(f"{part}: at most {seconds:.0f} s ...", flush=True)
        outcomes = _run_checks(mine, args, environment, [newer, site] if newer.exists() else None, seconds)
        results[part] = [row for outcome in outcomes for row in outcome.rows]
        results[part] += [
            Row(name, None, "", "not measured", plan.TWO_DEVICES) for name in plan.NOT_MEASURED.get(part, ())
        ]
        for check, outcome in zip(mine, outcomes, strict=True):
            logs.append(f"######## {part}: {check.name} ({outcome.seconds:.1f} s)\n{outcome.log}\n")
        _write(output, args, results, logs, time.monotonic() - started)

    run("wheels", [unpack], slowness * unpack.seconds)
    sys.path.insert(0, str(site))  # so that `needs` finds the unpacked packages
    importlib.invalidate_caches()
    for number, part in enumerate(chosen):
        left = plan.TOTAL_SECONDS - (time.monotonic() - started) / slowness
        seconds = slowness * plan.limit(part, chosen[number + 1 :], left)
        run(part, [check for check in checks if check.part == part], seconds)
        for row in results[part]:
            if row.name == MATMUL_RATE and row.status == "ok":
                environment[plan.RATE] = str(row.value)
    spent = time.monotonic() - started
    print(table(results))
    print(f"\n{spent:.0f} s in all; {output}/gpu_check.json, {output}/gpu_check.log")
    if names := failed(results):
        print(f"FAILED: {'; '.join(names)}")
        return 1
    return 0


def _write(
    output: Path, args: argparse.Namespace, results: dict[str, list[Row]], logs: Sequence[str], spent: float
) -> None:
    """Write gpu_check.json and gpu_check.log, which begins with the table."""
    output.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Value] = {"device": args.device, "tiny": str(args.tiny), "seconds": round(spent, 1)}
    (output / "gpu_check.json").write_text(document(facts, results), encoding="utf-8")
    whole = "\n".join([table(results), "", *logs]).encode()
    (output / "gpu_check.log").write_bytes(whole[:LARGEST_FILE])


def _run_checks(
    checks: Sequence[plan.Check],
    args: argparse.Namespace,
    environment: dict[str, str],
    newer: list[Path] | None,
    seconds: float,
) -> list[Outcome]:
    """Run the programs of one part. Programs that need a newer megatron-core run last."""
    deadline = time.monotonic() + seconds
    workers = max(2, min(5, len(os.sched_getaffinity(0)) // 2))
    usual = [check for check in checks if not check.newer]
    outcomes = run_part(usual, environment, seconds, workers, ROOT)
    for check in (check for check in checks if check.newer):
        if newer is None:
            note = f"no wheel of it in {WHEELS.name}/newer"
            outcomes.append(Outcome([Row(check.name, status="not measured", note=note)], "", 0.0))
            continue
        left = deadline - time.monotonic()
        outcome = run_part([check], _environment(args, newer), left, 1, ROOT)[0]
        # The kit does not claim support for the newer megatron-core, so a failure is only noted.
        rows = [
            replace(row, name=f"newer: {row.name}", status="noted" if row.status == "failed" else row.status)
            for row in outcome.rows
        ]
        outcomes.append(Outcome(rows, outcome.log, outcome.seconds))
    return outcomes


def _environment(args: argparse.Namespace, first: Sequence[Path]) -> dict[str, str]:
    """Return the environment of the programs."""
    path = [*map(str, first), str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    more = {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "DEVICE": args.device,
        "MPLBACKEND": "Agg",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # All processes are on this host, whose host name may not resolve.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "NVIDIA_TF32_OVERRIDE": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",  # per program; up to five programs compile at the same time
    }
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1" if args.device == "cpu" else "4")}
    return {**os.environ, **threads, **more}


if __name__ == "__main__":
    sys.exit(main())

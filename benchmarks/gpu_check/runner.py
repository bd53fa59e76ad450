"""Run the programs of a part. Each has its own process group, which is killed at the time limit."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gpu_check.plan import Check
from gpu_check.rows import ROWS_FILE, Row, read_rows

LOG_BYTES = 600_000  # longest log per program; the end is kept


@dataclass(frozen=True)
class Outcome:
    """The result of one program."""

    rows: list[Row]
    log: str
    seconds: float


def run_part(
    checks: Sequence[Check], environment: Mapping[str, str], seconds: float, workers: int, root: Path
) -> list[Outcome]:
    """Run the programs of one part: concurrent ones in `workers` threads, the others one by one.

    Args:
        checks: programs of one part.
        environment: environment of the programs.
        seconds: time limit of the part. After it no program is started.
        workers: number of programs that run at the same time.
        root: working directory, the root of the checkout.
    """
    deadline = time.monotonic() + seconds

    def run(check: Check) -> Outcome:
        left = deadline - time.monotonic()
        if left < 3:
            return Outcome([Row(check.name, status="failed", note="no time was left to start it")], "", 0.0)
        return run_check(check, environment, min(check.seconds, left), root)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        together = {check.name: pool.submit(run, check) for check in checks if check.together}
        return [together[check.name].result() if check.together else run(check) for check in checks]


def run_check(check: Check, environment: Mapping[str, str], seconds: float, root: Path) -> Outcome:
    """Run one program and return its rows. If the program fails, a row says so."""
    missing = [name for name in check.needs if not importable(name)]
    if missing:
        note = f"not installed here: {', '.join(missing)}"
        return Outcome([Row(check.name, status="not measured", note=note)], "", 0.0)
    started = time.monotonic()
    # A process that was just killed may still be writing there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        variables = {**environment, ROWS_FILE: str(folder / "rows.jsonl"), "TMPDIR": name}
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, *check.argv],
                cwd=root,
                env=variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            problem = _wait(process, seconds)
        text = _end(folder / "log")
        rows = read_rows(folder / "rows.jsonl")
    if problem:
        rows.append(Row(check.name, status="failed", note=f"{problem}; its last line: {_last_line(text)}"))
    elif not rows:
        rows = [Row(check.name, note="done")]
    return Outcome(rows, text, time.monotonic() - started)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for the process, and kill its process group. Return the problem, or ""."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _end_group(process)
        process.wait()
        return f"ended after {seconds:.0f} s"
    _end_group(process)  # children that it left running
    return f"exit status {status}" if status else ""


def _end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _end(path: Path) -> str:
    data = path.read_bytes()
    cut = f"({len(data) - LOG_BYTES} bytes left out)\n" if len(data) > LOG_BYTES else ""
    return cut + data[-LOG_BYTES:].decode("utf-8", errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "none"


def importable(name: str) -> bool:
    """Return whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False

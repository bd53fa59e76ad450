"""Runs of pretraining under the launcher, with processes of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from helpers.engine import ROOT
from minimind_mcore.hosts import free_port

TORCHRUN = ["--max-restarts", "0"]  # torchrun's default, which the launcher does not know


@contextlib.contextmanager
def launched(
    argv: list[str], folder: Path, processes: int = 2, port: int | None = None, torchrun: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A real run under the launcher, in a session of its own that ends with the block.

    The launcher starts the ranks itself, or with `torchrun` by torchrun, as on GPUs and on several hosts.
    """
    command = [
        sys.executable, "-m", "minimind_mcore.launch", "--nproc-per-node", str(processes),
        "--master-port", str(free_port() if port is None else port), *(TORCHRUN if torchrun else []),
        str(ROOT / "pretrain_gpt.py"), *argv, "--output-dir", str(folder),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield job
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def wait_for_iteration(job: subprocess.Popen[str], number: int) -> str:
    """Read the job's output until it has done so many iterations."""
    lines = []
    assert job.stdout
    for line in job.stdout:
        lines.append(line)
        if re.search(rf"iteration +{number}/", line):
            return "".join(lines)
    raise AssertionError("it ended before that\n" + "".join(lines))


def ranks_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks' processes, by rank."""
    found = [p for p in psutil.Process(job.pid).children(recursive=True) if "pretrain_gpt.py" in " ".join(p.cmdline())]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))

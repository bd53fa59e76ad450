"""Start a program on every device of this host, and print one message instead of a traceback when a rank fails.

    python -m minimind_mcore.launch --nproc-per-node 2 pretrain_gpt.py ...

The flags are torchrun's. torchrun starts the ranks, except on the CPU of a single host. There this module starts them:
torchrun's import of torch would be a fifth of the time to the first step of a small model.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from minimind_mcore import errors, hosts, log
from minimind_mcore.platform import device
from minimind_mcore.platform.processor import usable_cores

logger = logging.getLogger("minimind_mcore.launch")

# A signal asks the ranks to save. A step on a CPU plus a large checkpoint can exceed torchrun's 30 s.
SAVE_SECONDS = 3600
FAILED_SECONDS = 30  # time for the other ranks to end after one has failed, as with torchrun
POLL_SECONDS = 0.1


def main(argv: Sequence[str] | None = None) -> None:
    """Start the ranks, and wait for them.

    Exits with status 1 if a rank fails, and with 128 + the signal's number if a signal ended the job.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ[log.LAUNCHER] = str(os.getpid())  # ranks stop when this process ends
    with tempfile.TemporaryDirectory(prefix="minimind-") as folder:
        os.environ[errors.VERDICT] = str(Path(folder) / "verdict")
        given = _without_torchrun(arguments) if device.current().kind == "cpu" else None
        sys.exit(_start(given) if given else _torchrun(arguments))


def _set_threads(processes: int) -> None:
    """Divide the cores among the ranks. torchrun would set one thread per process on any machine."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))


def _without_torchrun(arguments: Sequence[str]) -> argparse.Namespace | None:
    """Return the parsed arguments of a job on a single host. None if they need torchrun."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in {"nproc-per-node": 1, "nnodes": 1, "node-rank": 0, "master-port": hosts.PORT}.items():
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", type=int, default=default)
    parser.add_argument("--master-addr", "--master_addr", default="127.0.0.1")
    parser.add_argument("-m", "--module", action="store_true")
    parser.add_argument("program")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    try:
        given, other = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return None
    return None if other or given.nnodes != 1 or given.nproc_per_node < 1 else given


def _start(given: argparse.Namespace) -> int:
    """Start the ranks in processes of their own, and wait for them. Return the exit status.

    Raises:
        UserError: another program uses MASTER_PORT.
    """
    size, port = given.nproc_per_node, given.master_port or hosts.free_port()
    hosts.require_free_port(port)
    _set_threads(size)
    environ = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": given.master_addr, "MASTER_PORT": port}
    program = ["-m", given.program] if given.module else [given.program]
    ranks: list[subprocess.Popen[bytes]] = []
    stops: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        stops.append(number)
        for process in ranks:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (*errors.end_signals(), signal.SIGQUIT)}
    try:
        for rank in range(size):
            own = environ | {"RANK": rank, "LOCAL_RANK": rank}
            command = [sys.executable, "-u", *program, *given.flags]
            ranks.append(subprocess.Popen(command, env=os.environ | {name: str(own[name]) for name in own}))
        failed = _first_failure(ranks)
        if stops:
            _wait(ranks, SAVE_SECONDS)
        elif failed is not None:
            for process in ranks:
                process.terminate()
            _wait(ranks, FAILED_SECONDS)
    finally:
        for process in ranks:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    if stops:
        return _stopped(stops[0])
    return 0 if failed is None else _failed(failed, ranks[failed].wait())


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until a rank fails, and return the rank. Return None when all have exited with status 0."""
    while True:
        statuses = [process.poll() for process in ranks]
        if failed := {status: rank for rank, status in enumerate(statuses) if status}:
            return failed[min(failed)]  # a killed rank (negative) before ranks that lost their connection
        if None not in statuses:
            return None
        time.sleep(POLL_SECONDS)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait until all ranks have ended, or until `seconds` have passed."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in ranks) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)


def _torchrun(arguments: list[str]) -> int:
    """Run torchrun. Return the exit status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_SECONDS))
    if signal.SIGHUP not in errors.end_signals():  # torchrun would handle SIGHUP and end the run, even under nohup
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    given = run.parse_args(arguments)  # type: ignore[no-untyped-call]
    _set_threads(int(given.nproc_per_node) if given.nproc_per_node.isdigit() else usable_cores())
    # torchrun would listen on a random port but tell its ranks port 0, which they cannot reach.
    if given.master_port == 0:
        if given.nnodes not in ("1", "1:1"):
            logger.error("--master-port 0: several hosts need the same port, such as 29500 (MASTER_PORT)")
            return 1
        given.master_port = hosts.free_port()
    try:
        with hosts.port_errors(given.master_addr, str(given.master_port)):
            run.run(given)  # type: ignore[no-untyped-call]
    except errors.UserError as error:
        logger.error(error)
        return 1
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _failed(rank, failure.exitcode)
    except SignalException as error:  # torchrun has forwarded the signal and waited for the ranks to save
        return _stopped(error.sigval)
    return 0


def _stopped(number: int) -> int:
    """Log that a signal ended the job. Return the exit status."""
    logger.info(f"stopped by {signal.Signals(number).name}")
    return 128 + number


def _failed(rank: int, status: int) -> int:
    """Log why the run ended, as the last line. Return the exit status: 128 + the signal's number, or 1."""
    verdict = Path(os.environ[errors.VERDICT])
    if verdict.is_file():  # a rank has reported the reason
        logger.error(verdict.read_text(encoding="utf-8"))
        return 1
    number = -status if status < 0 else status - 128
    if number in errors.END_SIGNALS:  # one rank got the signal, and all saved
        return _stopped(number)
    how = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(number).name}"
    logger.error(f"rank {rank} ended with {how} (see above); the other ranks were stopped")
    return 1


if __name__ == "__main__":
    errors.run(main)

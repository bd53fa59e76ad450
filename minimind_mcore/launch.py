"""Run torchrun, and print one message instead of its traceback when a rank fails.

python -m minimind_mcore.launch --nproc-per-node 2 pretrain_gpt.py ...
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from minimind_mcore import errors, hosts
from minimind_mcore.platform.cpu import usable_cores
from minimind_mcore.training.stop import LAUNCHER, SIGNALS, hangup_ignored

logger = logging.getLogger("minimind_mcore.launch")


def main(argv: Sequence[str] | None = None) -> None:
    """Run torchrun with the arguments of a command line.

    Exits with status 1 if a rank fails, and with 128 + the signal's number if a signal ended the job.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    processes = run.parse_args(arguments).nproc_per_node  # type: ignore[no-untyped-call]
    # torchrun would set one thread per process on any machine.
    threads = usable_cores() // int(processes) if processes.isdigit() else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    # A signal asks the ranks to save. A step on a CPU plus a large checkpoint can exceed torchrun's 30 s.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    if hangup_ignored():  # torchrun would handle SIGHUP and end the run, even under nohup
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())  # ranks stop when this process ends
    with tempfile.TemporaryDirectory(prefix="minimind-") as folder:
        os.environ[errors.VERDICT] = str(Path(folder) / "verdict")
        sys.exit(_launch(arguments))


def _launch(arguments: list[str]) -> int:
    """Run torchrun; returns the exit status."""
    given = run.parse_args(arguments)  # type: ignore[no-untyped-call]
    # torchrun would listen on a random port but tell its ranks port 0, which they cannot reach.
    if given.master_port == 0:
        if given.nnodes not in ("1", "1:1"):
            logger.error("--master-port 0: several hosts need the same port, as 29500 (MASTER_PORT)")
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
        return _failed(rank, failure)
    except SignalException as error:  # torchrun has forwarded the signal and waited for the ranks to save
        logger.info(f"stopped by {error.sigval.name}")
        return 128 + error.sigval
    return 0


def _failed(rank: int, failure: ProcessFailure) -> int:
    """Log why the run ended, as the last line. Return the exit status: 128 + the signal's number, or 1."""
    verdict = Path(os.environ[errors.VERDICT])
    if verdict.is_file():  # a rank has reported the reason
        logger.error(verdict.read_text(encoding="utf-8"))
        return 1
    status: int = failure.exitcode
    number = -status if status < 0 else status - 128
    if number in SIGNALS:  # one rank got the signal, and all saved
        logger.info(f"stopped by {signal.Signals(number).name}")
        return 128 + number
    how = f"exit status {status}" if status >= 0 else f"signal {failure.signal_name()}"
    logger.error(f"rank {rank} ended with {how} (see above); the other ranks were stopped")
    return 1


if __name__ == "__main__":
    errors.run(main)

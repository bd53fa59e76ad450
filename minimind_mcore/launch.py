"""torchrun, with a message in place of its traceback when a rank fails.

python -m minimind_mcore.launch --nproc-per-node 2 pretrain_gpt.py ...
"""

from __future__ import annotations

import logging
import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from minimind_mcore.device import usable_cores


def main() -> None:
    """Run torchrun with the arguments of the command line.

    Exits with status 1 if a rank fails, and with 128 + the signal's number if one ended the job.
    """
    arguments = sys.argv[1:]
    processes = run.parse_args(arguments).nproc_per_node  # type: ignore[no-untyped-call]
    # torchrun would give every process one thread, whatever the machine.
    threads = usable_cores() // int(processes) if processes.isdigit() else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    # A signal asks the ranks to save: a step on a CPU and a large checkpoint may take longer than torchrun's 30 s.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"exit status {failure.exitcode}" if failure.exitcode >= 0 else f"signal {failure.signal_name()}"
        print(f"error: rank {rank} ended with {how} (see above); the other ranks were stopped", file=sys.stderr)
        sys.exit(1)
    except SignalException as error:  # it has passed the signal on, and waited for the ranks to save
        print(f"stopped by {error.sigval.name}", file=sys.stderr)
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()

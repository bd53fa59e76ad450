"""Stop a run on a signal: all ranks save and exit after the current step. A second signal exits at once.

The end of the launcher has the same effect, because otherwise the ranks would train on without supervision.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

from minimind_mcore import errors, hosts, log
from minimind_mcore.platform import device

logger = logging.getLogger(__name__)

# Ctrl-C reaches a rank twice in quick succession, from the terminal and from the launcher: this is one request.
_SAME_REQUEST_SECONDS = 3.0
ANSWER_SECONDS = 60.0  # how long ranks without a launcher wait for each other before a save
_POLL_SECONDS = 1.0
_LOST = 255  # represents the end of the launcher among signal numbers


class StopSignal:
    """Turns SIGTERM, SIGINT, SIGHUP and the end of the launcher into a request that all ranks agree on.

    Attributes:
        exit_status: exit status of the process after the ranks agreed to stop; 0 without a request.
    """

    def __init__(self) -> None:
        self.at: float | None = None
        self.name = ""
        self.exit_status = 0
        self.lost = False
        self._number = 0
        self._asking: float | None = None
        for number in errors.end_signals():
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.at is None:
            self.at, self.name, self._number = now, signal.Signals(number).name, number
            # os.write, because print is not safe inside a signal handler
            os.write(sys.stderr.fileno(), f"{self.name}: saving after this iteration; again to exit at once\n".encode())
        elif now - self.at > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    def agreed(self, also: bool = False) -> bool:
        """Return on every rank whether any rank was asked to stop, or passes `also`. Collective."""
        number = _LOST if self.lost else self._number
        asked = [int(number > 0 or also), number]
        if dist.get_world_size() > 1:  # a single process needs no synchronization
            flag = torch.tensor(asked, device=device.current().torch_device)
            self._asking = time.monotonic()
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            asked = flag.tolist()
        stopping, number = asked
        self._asking = None
        if number:
            self.exit_status = 1 if number == _LOST else 128 + number
            self.lost = number == _LOST
        return bool(stopping)

    def watch_launcher(self) -> None:
        """Start a thread that requests a stop when the launcher of this rank ends."""
        launcher = int(os.environ.get(log.LAUNCHER, "0"))
        if launcher or "TORCHELASTIC_RUN_ID" in os.environ:  # a plain shell may end before this process
            arguments = (os.getppid(), launcher)
            threading.Thread(target=self._watch_launcher, args=arguments, name="launcher", daemon=True).start()

    def _watch_launcher(self, parent: int, launcher: int) -> None:
        while os.getppid() == parent and (parent == launcher or not launcher or hosts.runs(launcher)):
            time.sleep(_POLL_SECONDS)
        self.lost, since = True, time.monotonic()
        _drop_closed_output()
        logger.warning(f"the launcher (process {launcher or parent}) is gone: stopping after this iteration")
        while True:
            time.sleep(_POLL_SECONDS)
            asking = self._asking
            if asking is not None and time.monotonic() - max(asking, since) > ANSWER_SECONDS:
                logger.error(
                    f"the launcher is gone, and other ranks did not answer within {ANSWER_SECONDS:.0f} s: "
                    "stopped without saving"
                )
                os._exit(1)

    def leave(self) -> None:
        """Wait until every rank is ready to exit. Signals are ignored from here on. Collective.

        The launcher kills the other ranks as soon as one exits with a non-zero status.
        """
        for number in errors.END_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.exit_status:
            dist.barrier()


def _drop_closed_output() -> None:
    """Redirect closed outputs to /dev/null: a print to them would raise, and the save would be lost."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

"""Stopping in order: a signal asks every rank to save and leave after the step; a second one leaves at once.

The loss of the launcher asks for the same: ranks that nothing watches any more would train on unseen.
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

from minimind_mcore import hosts
from minimind_mcore.platform import device

logger = logging.getLogger(__name__)

# Ctrl-C reaches a rank twice within moments, from the terminal and from torchrun: that is one request.
_SAME_REQUEST_SECONDS = 3.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAUNCHER = "MINIMIND_LAUNCHER"  # variable with the process number of the launcher
ANSWER_SECONDS = 60.0  # without a launcher: so long the ranks wait for each other before a save
_POLL_SECONDS = 1.0
_LOST = 255  # stands for the loss of the launcher among numbers of signals


def hangup_ignored() -> bool:
    """Whether this program was started under nohup, to go on after its terminal has closed."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


class StopSignal:
    """Turns SIGTERM, SIGINT, SIGHUP and the loss of the launcher into a request that all ranks agree on.

    Attributes:
        exit_status: what the process should exit with after the ranks agreed to stop; 0 without such a request.
    """

    def __init__(self) -> None:
        self.at: float | None = None
        self.name = ""
        self.exit_status = 0
        self.lost = False
        self._number = 0
        self._asking: float | None = None
        for number in SIGNALS:
            if not hangup_ignored() or number != signal.SIGHUP:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.at is None:
            self.at, self.name, self._number = now, signal.Signals(number).name, number
            # os.write, as print is not safe inside a signal handler
            os.write(sys.stderr.fileno(), f"{self.name}: saving after this iteration; again to exit at once\n".encode())
        elif now - self.at > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    def agreed(self, also: bool = False) -> bool:
        """True on every rank if any rank was asked to stop, or says `also`. Collective."""
        number = _LOST if self.lost else self._number
        asked = [int(number > 0 or also), number]
        if dist.get_world_size() > 1:  # else there is nobody to ask, and no device to wait for
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
        """Start a thread that asks to stop when the launcher of this rank is gone."""
        launcher = int(os.environ.get(LAUNCHER, "0"))
        if launcher or "TORCHELASTIC_RUN_ID" in os.environ:  # else a shell may end and leave this process running
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
        """Wait until every rank is ready to exit; signals no longer matter. Collective.

        The launcher ends the other ranks as soon as one has exited with another status than 0.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.exit_status:
            dist.barrier()


def _drop_closed_output() -> None:
    """Replace outputs that nobody reads any more: a print to them would raise, and the save would be lost."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

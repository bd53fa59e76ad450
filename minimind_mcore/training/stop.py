"""Stopping in order: a signal asks every rank to save and leave after the step; a second one leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

import torch
import torch.distributed as dist

from minimind_mcore import device

# Ctrl-C reaches a rank twice within moments, from the terminal and from torchrun: that is one request.
_SAME_REQUEST_SECONDS = 3.0


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGHUP into a request that all ranks agree on."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.at is None:
            self.at, self.name = now, signal.Signals(number).name
            # os.write, as print is not safe inside a signal handler
            os.write(sys.stderr.fileno(), f"{self.name}: saving after this iteration; again to exit at once\n".encode())
        elif now - self.at > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    def agreed(self, also: bool = False) -> bool:
        """True on every rank if any rank was asked to stop, or says `also`. Collective."""
        flag = torch.tensor([int(self.at is not None or also)], device=device.current().torch_device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

"""python -m minimind_mcore.manager.runner DIRECTORY: the process of a job, which outlives the manager.

It runs the commands of job.json one after another and writes exit.json, so that a restarted manager learns the exit
status. SIGINT and SIGTERM are passed to the running command, which saves, and no further command starts. Only the first
signal is passed on, because a second one would interrupt the saving. This module imports little, because it stays in
memory as long as the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from minimind_mcore import errors
from minimind_mcore.cli.settings import CLI
from minimind_mcore.storage import atomic_write_text

RECORD, EXIT = "job.json", "exit.json"


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a command with these settings. An empty value hides an inherited setting."""
    return os.environ | settings | {"PYTHONUNBUFFERED": "1"}


def typed(words: Sequence[str], settings: Mapping[str, str]) -> str:
    """Return a command of the kit as one could type it in a shell."""
    given = [f"{name}={shlex.quote(value)}" for name, value in settings.items() if value]
    return " ".join([*given, shlex.join(["minimind-mcore", *words])])


class Runner:
    """Runs commands until one fails or a signal arrives."""

    def __init__(self) -> None:
        self.number = 0
        self.process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        first, self.number = not self.number, number
        if self.process and first:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def run(self, words: Sequence[str], settings: Mapping[str, str]) -> int:
        """Run one command. Return its exit status, or 128 + the number of the signal that ended it."""
        print("+", typed(words, settings), flush=True)
        with errors.stops_blocked():
            self.process = subprocess.Popen([*CLI, *words], env=environment(settings), stdin=subprocess.DEVNULL)
        if self.number:  # the signal arrived before `self.process` was set
            self.process.send_signal(self.number)
        status = self.process.wait()
        self.process = None
        return status if status >= 0 else 128 - status

    def run_all(self, folder: Path) -> None:
        """Run the commands of a job in order, and record the first exit status that is not 0."""
        job = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        print(f"== attempt {job['attempt']} of {job['id']}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
        status = 0
        for command in job["commands"]:
            if status := 128 + self.number if self.number else self.run(command["words"], command["settings"]):
                break
        print(f"== ended with exit status {status}", flush=True)
        ended = {"attempt": job["attempt"], "status": status, "ended": time.time()}
        atomic_write_text(folder / EXIT, json.dumps(ended) + "\n")


if __name__ == "__main__":
    runner = Runner()  # sets its signal handlers before `errors.run` unblocks signals
    errors.run(lambda: runner.run_all(Path(sys.argv[1])))

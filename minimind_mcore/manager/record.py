"""A job on disk: one directory with the record, the log, the exit status and the output of the job.

    outputs/manager/20260101-120000-full_sft-1a2b/
        job.json        request, commands, devices, state; written atomically
        log.txt         output of the commands, of all attempts
        exit.json       exit status of the last attempt, written by the job's own process
        full_sft/       output of the stage: checkpoints, metrics.jsonl, curves

A process belongs to a job if its environment has the job's mark, or if it descends from such a process. The process id
alone does not identify the process, because the system can give the id to another program.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ValidationError

from minimind_mcore.errors import shown
from minimind_mcore.hosts import is_marked
from minimind_mcore.manager.request import JobRequest
from minimind_mcore.manager.runner import EXIT, RECORD
from minimind_mcore.pipeline.job import Command
from minimind_mcore.storage import atomic_file

logger = logging.getLogger(__name__)

MARK = "MINIMIND_MANAGER_JOB"  # variable in the environment of a job's processes
LOG = "log.txt"
State = Literal["queued", "running", "stopping", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped", "failed")
TAIL = 1 << 16  # bytes of a log that are searched for the error


class CommandRecord(BaseModel):
    """A command of the kit, with the fields of `pipeline.job.Command`."""

    words: list[str]
    settings: dict[str, str]

    @classmethod
    def of(cls, command: Command) -> CommandRecord:
        """Return the record of a command."""
        return cls(words=list(command.words), settings=dict(command.settings))


class JobRecord(BaseModel):
    """A job.

    Attributes:
        id: name of the job's directory.
        request: request of the client.
        commands: commands, run in this order.
        device: kind of the devices.
        devices: numbers of the accelerators. No other job uses them at the same time.
        state: current state.
        created: time of creation, in seconds since the epoch.
        started: start of the current attempt, in seconds since the epoch.
        ended: end of the last attempt, in seconds since the epoch.
        status: exit status of the last attempt.
        error: why the job failed.
        attempt: number of starts.
        mark: value of the variable `MARK` in the processes of this attempt.
        pid: id of the job's own process. 0 if it is not known yet.
        address: for a server: its address.
        api_key: for a server: the key that clients must send, because other users of the host and other web pages can
            reach the address.
        ready: for a server: whether it answers.
        version: number of changes of this record.
    """

    id: str
    request: JobRequest
    commands: list[CommandRecord]
    device: str
    devices: list[int]
    state: State = "queued"
    created: float
    started: float = 0.0
    ended: float = 0.0
    status: int | None = None
    error: str = ""
    attempt: int = 0
    mark: str = ""
    pid: int = 0
    address: str = ""
    api_key: str = ""
    ready: bool = False
    version: int = 0

    def save(self, root: Path) -> None:
        """Write the record. Only this user may read the file, because it contains the key of a server."""
        self.version += 1
        with atomic_file(root / self.id / RECORD) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(self.model_dump_json(indent=1).encode() + b"\n")

    def needs(self, folder: Path) -> bool:
        """Return whether this job needs the files of a directory: to run, to be resumed, or to use its output."""
        if self.state in ENDED and self.request.stage in ("serve", "eval"):
            return False  # these jobs make no weights, and a new one is cheap
        if self.state == "finished":
            base = self.request.weights if self.request.stage == "lora" else ""  # adapters are useless without the base
            texts = [str(Path(text).resolve()) for text in (base, self.request.tokenizer) if text]
        else:
            texts = [text for command in self.commands for text in (*command.words, *command.settings.values())]
        # The paths in commands have no links in them, because `Directories.check` resolves those of requests.
        return any(f"{path}/" in f"{text}/" for text in texts for path in (folder, folder.resolve()))

    def is_alive(self) -> bool:
        """Return whether the job's own process runs."""
        return bool(self.pid) and is_marked(self.pid, MARK, self.mark)


def read_job(folder: Path) -> JobRecord | None:
    """Return the job of a directory. None if the directory has no record, or (logged) a record that cannot be used."""
    try:
        job = JobRecord.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, ValueError) as error:
        logger.error(f"{folder / RECORD} cannot be read; the manager does not list this job: {error}")
        return None
    if job.id != folder.name:  # stopping or deleting this job would change another directory
        logger.error(
            f"{folder / RECORD} has the id {shown(job.id)}, expected {folder.name}; the manager does not list it. "
            "If you renamed its directory, rename it back"
        )
        return None
    return job


def read_exit(folder: Path, attempt: int) -> tuple[int, float] | None:
    """Return the exit status and the time at which an attempt ended. None if it runs or was killed."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        found = json.loads((folder / EXIT).read_text(encoding="utf-8"))
        if found["attempt"] == attempt:
            return int(found["status"]), float(found["ended"])
    return None


def processes(mark: str) -> list[psutil.Process]:
    """Return the processes of an attempt, the oldest first."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found |= {process.pid: process}
    for process in list(found.values()):  # programs that change their title lose their environment
        with contextlib.suppress(psutil.Error):
            found |= {child.pid: child for child in process.children(recursive=True)}
    return list(found.values())


def runner_pid(mark: str) -> int:
    """Return the id of the job's own process. 0 if there is none."""
    for process in processes(mark):
        with contextlib.suppress(psutil.Error):
            if "minimind_mcore.manager.runner" in process.cmdline():
                return int(process.pid)
    return 0


def kill(mark: str, known: Iterable[psutil.Process] = ()) -> list[psutil.Process]:
    """Kill the processes of an attempt. Return those that have not ended yet.

    A killed process that waits in a driver ends late or never, and keeps its device. Nobody can read its environment
    any more, where its mark is. The caller therefore passes the process in `known`.

    Args:
        mark: mark of the attempt.
        known: result of the previous call.
    """
    found = dict.fromkeys([*known, *processes(mark)])
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return [process for process in found if _runs(process)]


def end(mark: str, seconds: float = 10) -> None:
    """Kill the processes of an attempt, and wait at most `seconds` until they have ended."""
    last, left = time.monotonic() + seconds, kill(mark)
    while left and time.monotonic() < last:
        time.sleep(0.05)
        left = kill(mark, left)  # a process may have started a child in the meantime


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def error_of(folder: Path, status: int) -> str:
    """Return the last error in a log, else the exit status."""
    lines = [line for line in tail(folder / LOG) if line.startswith("error:")]
    return lines[-1].removeprefix("error:").strip()[:1000] if lines else f"exit status {status}; see the log"


def tail(log: Path, size: int = TAIL) -> Iterator[str]:
    """Yield the last whole lines of a log."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - size))
        yield from file.read().decode(errors="replace").splitlines()

"""The queue: starts jobs on free devices, follows them, stops them, and finds them again after a restart.

Jobs that need the same device wait for each other, in the order of their creation. A job on a CPU takes one of the
CPU's slots; a server on a CPU takes none, because it waits for questions most of the time.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import psutil

from minimind_mcore.doctor import devices
from minimind_mcore.doctor.installed import Host
from minimind_mcore.errors import UserError, stops_blocked
from minimind_mcore.hosts import free_port, health
from minimind_mcore.manager import record, request
from minimind_mcore.manager.files import Directories, entry
from minimind_mcore.manager.record import ENDED, LOG, MARK, CommandRecord, JobRecord
from minimind_mcore.manager.request import JobRequest
from minimind_mcore.manager.runner import EXIT
from minimind_mcore.pipeline.job import SETTINGS
from minimind_mcore.pipeline.stages import RL, TRAININGS, UNSET

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.3
# Settings in the manager's own environment that would change a job without appearing in its form, the manager's token,
# and a server's key. tests/unit/test_manager.py compares them with the settings that the kit's commands read.
DROPPED = {
    *SETTINGS,
    *UNSET,
    *(
        "API_BASE_URL API_KEY API_MODEL BATCH CONFIG DATA DATA_DIR DATA_KIND DATA_PATH ENGINE EVAL_INTERVAL "
        "EVAL_ITERS FORMAT HARNESS HF_CFG_DIR HISTORY_TURNS HOST HOSTFILE LEAST LOG_INTERVAL LORA_ALPHA LORA_DIR "
        "LORA_R MASTER_ADDR MASTER_PORT MERGE MODEL MODELS MODEL_TYPE_HF NODE_ADDR NODE_RANK NOOP_LAYERS "
        "NUM_LAYER_LIST OUTPUTS OUTPUT_DIR PAD_HEAD_DIM PORT RAW SAVE_INTERVAL SYSTEM TEMPERATURE THINKING TOKEN "
        "TOKENIZER_PATH TOOLS TOP_K TOP_P VERIFY"
    ).split(),
}
FIRST_STEPS = ("download", "tokenizer", "convert")  # stages that use no accelerator
DELETED = ".deleted-"  # beginning of the name of a directory that is being deleted
CPU = "cpu"
SLOT = (CPU, 0)  # one of the CPU's slots, of which there are several


@dataclass(frozen=True)
class Hardware:
    """The devices of the host, on which jobs run.

    Attributes:
        kind: kind of the devices, as `doctor` finds it.
        numbers: numbers of the accelerators that this process may use. Empty on a CPU.
        cpu_slots: number of jobs that may run on the CPU at the same time.
    """

    kind: str
    numbers: tuple[int, ...]
    cpu_slots: int

    @classmethod
    def find(cls, cpu_slots: int, host: Host | None = None) -> Hardware:
        """Return the hardware of a host. Only the host's command-line tools are asked, so no device is opened."""
        host = host or Host()
        kind = devices.kind(host)
        if kind == CPU:
            return cls(kind, (), cpu_slots)
        count = len(devices.cards(host, kind))
        visible = devices.visible(host, kind, count)
        return cls(kind, tuple(range(count) if visible is None else visible), cpu_slots)

    def choose(self, asked: JobRequest) -> tuple[str, list[int]]:
        """Return the kind and the numbers of the devices of a job.

        Raises:
            UserError: the host does not have them.
        """
        kind = asked.device or self.kind
        if kind not in (CPU, self.kind):
            raise UserError(f"device: found {kind[:20]!r}, expected {self.kind}{'' if self.kind == CPU else ' or cpu'}")
        if kind == CPU or asked.stage in FIRST_STEPS:
            if asked.devices:
                raise UserError(f"devices: found {asked.devices}, expected none: the job runs on the CPU")
            return CPU, []
        if wrong := sorted(set(asked.devices) - set(self.numbers)):
            raise UserError(f"devices: found {wrong}, expected some of {list(self.numbers)}")
        many = asked.stage in (*TRAININGS, *RL)
        return kind, sorted(set(asked.devices)) or list(self.numbers if many else self.numbers[:1])

    def settings(self, kind: str, numbers: list[int]) -> dict[str, str]:
        """Return the settings that make a command use exactly these devices."""
        if kind == CPU:
            return {"DEVICE": CPU}
        return {"DEVICE": kind, "NPUS_PER_NODE": str(len(numbers)), **devices.selection(kind, numbers)}


class Queue:
    """The jobs of a manager. One thread starts and follows them; all methods may be called from any thread.

    Args:
        directories: directories of the manager.
        hardware: devices of the host.
        stop_seconds: seconds that a job may take to save before it is killed.

    Raises:
        UserError: another manager uses the directory.
    """

    def __init__(self, directories: Directories, hardware: Hardware, stop_seconds: float) -> None:
        self.directories, self.hardware, self.stop_seconds = directories, hardware, stop_seconds
        directories.jobs.mkdir(parents=True, exist_ok=True)
        self._held = hold(directories.jobs / ".manager.lock")
        self._lock = threading.RLock()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._deadlines: dict[str, float] = {}  # by job that saves: monotonic time at which it is killed
        self._killed: dict[str, list[psutil.Process]] = {}  # killed processes that still exist
        self._ending = threading.Event()
        for folder in directories.jobs.glob(f"{DELETED}*"):
            if problem := erase(folder):
                logger.error(problem)
        folders = [path for path in sorted(directories.jobs.iterdir()) if path.is_dir()]
        found = [record.read_job(folder) for folder in folders if not folder.name.startswith(DELETED)]
        self.jobs = {job.id: job for job in sorted(filter(None, found), key=lambda job: job.created)}
        for job in self.jobs.values():
            if job.state not in ENDED and job.state != "queued":
                self._find_again(job)
        self._thread = threading.Thread(target=self._loop, name="queue", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. Running jobs continue."""
        self._ending.set()
        self._thread.join()
        self._held.close()

    def folder(self, job: JobRecord) -> Path:
        """Return the directory of a job."""
        return self.directories.jobs / job.id

    def output(self, job: JobRecord) -> Path:
        """Return the directory with the metrics of a job."""
        return self.folder(job) / job.request.stage

    def listed(self) -> list[JobRecord]:
        """Return all jobs, the oldest first."""
        return list(self.jobs.values())

    def chat_request(self, job: JobRecord) -> JobRequest:
        """Return the request of a job that serves the weights of another job.

        Raises:
            UserError: the other job has no weights.
        """
        stage, asked = job.request.stage, job.request
        made = self.folder(job) / "hf" if stage == "convert" else self.output(job) / "checkpoints"
        if not made.is_dir():
            raise UserError(f"{job.id} has no weights to chat with; wait for its first checkpoint")
        weights, lora = (asked.weights, str(made)) if stage == "lora" else (str(made), "")
        name = f"chat with {asked.name or job.id}"[: request.LONGEST_NAME]
        raw: dict[str, bool | int | float | str | None] = {"--raw": True} if stage == "pretrain" else {}
        return JobRequest(stage="serve", name=name, weights=weights, lora=lora, tokenizer=asked.tokenizer, settings=raw)

    def commands(self, asked: JobRequest, folder: Path) -> tuple[str, list[int], list[CommandRecord]]:
        """Return the kind and the numbers of a job's devices, and its commands, which write to `folder`.

        Raises:
            UserError: the request is wrong.
        """
        kind, numbers = self.hardware.choose(asked)
        found = [CommandRecord.of(command) for command in request.commands(asked, self.directories, folder)]
        for command in found:
            command.settings = self.hardware.settings(kind, numbers) | command.settings
        return kind, numbers, found

    def add(self, asked: JobRequest) -> JobRecord:
        """Put a job at the end of the queue.

        Raises:
            UserError: the request is wrong.
        """
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{asked.stage}-{secrets.token_hex(2)}"
        with self._lock:  # so that no other request deletes the inputs after the check
            kind, numbers, commands = self.commands(asked, self.directories.jobs / name)
            job = JobRecord(
                id=name, request=asked, commands=commands, device=kind, devices=numbers, created=time.time()
            )
            job.save(self.directories.jobs)
            self.jobs[name] = job
        return job

    def stop(self, job: JobRecord) -> None:
        """Ask a job to save and end. A second call has no effect, so that a double click cannot interrupt the saving.

        Raises:
            UserError: the job has ended.
        """
        with self._lock:
            if self._require_going(job).state == "running":
                self._change(job, state="stopping")
                self._interrupt(job)

    def kill(self, job: JobRecord) -> None:
        """End the processes of a job without saving.

        Raises:
            UserError: the job has ended.
        """
        with self._lock:
            if self._require_going(job).state != "stopped":
                self._change(job, state="stopping")
                self._deadlines[job.id] = time.monotonic()
                self._kill(job)

    def _kill(self, job: JobRecord) -> bool:
        """Kill the processes of a job. Return whether all have ended."""
        self._killed[job.id] = record.kill(job.mark, self._killed.get(job.id, ()))
        return not self._killed[job.id]

    def _require_going(self, job: JobRecord) -> JobRecord:
        """Return a job that has not ended. A queued job is set to stopped first, because it has no process.

        Raises:
            UserError: the job has ended.
        """
        if job.state in ENDED:
            raise UserError(f"{job.id} has ended before ({job.state})")
        if job.state == "queued":
            self._change(job, state="stopped", ended=time.time())
        return job

    def _interrupt(self, job: JobRecord) -> None:
        self._deadlines[job.id] = time.monotonic() + self.stop_seconds
        if job.is_alive():
            os.kill(job.pid, signal.SIGINT)

    def resume(self, job: JobRecord) -> None:
        """Queue a stopped or failed job again. Its commands continue from its checkpoint.

        Raises:
            UserError: the job is queued or running, or has finished.
        """
        with self._lock:
            self._require_there(job)
            if job.state not in ("stopped", "failed"):
                raise UserError(f"{job.id} is {job.state}; only a job that was stopped or failed can be resumed")
            self._change(job, state="queued", ended=0.0, status=None, error="")

    def delete(self, job: JobRecord) -> dict[str, object]:
        """Delete a job that has ended, with its directory. Return what was deleted.

        Raises:
            UserError: the job has not ended, another one needs its files, or the directory cannot be deleted.
        """
        folder = self.folder(job)
        with self._lock:
            self._require_there(job)
            if job.state not in ENDED:
                raise UserError(f"{job.id} is {job.state}; only a job that has ended can be deleted. Stop it first")
            users = [other for other in self.listed() if other is not job and other.needs(folder)]
            if users:
                names = ", ".join(f"{user.id} ({user.state})" for user in users)
                raise UserError(
                    f"{job.id} cannot be deleted, because its files are needed by {names}. Stop these jobs if they "
                    "are servers or evaluations, else delete them first"
                )
            if folder.is_symlink():
                raise UserError(
                    f"{folder} cannot be deleted, because it is a link to {folder.resolve()}. Delete both yourself, "
                    "and then the job here"
                )
            found, gone = entry(folder), folder.with_name(f"{DELETED}{job.id}")
            try:
                if folder.exists():
                    folder.rename(gone)
            except OSError as error:
                raise UserError(f"{folder} cannot be deleted: {error.strerror}") from error
            del self.jobs[job.id]
        if problem := erase(gone):
            raise UserError(f"{problem}. {job.id} is no longer listed")
        return found

    def _require_there(self, job: JobRecord) -> None:
        """Raise a `UserError` for a job that another request has deleted in the meantime."""
        if job.id not in self.jobs:
            raise UserError(f"{job.id} has been deleted")

    def blockers(self, job: JobRecord) -> list[str]:
        """Return the jobs that a queued job waits for."""
        needed, blocking, slots = _needs(job), [], []
        for other in self.listed():
            before = other.state == "queued" and other.created < job.created
            if other.id == job.id or not (before or other.state in ("running", "stopping")):
                continue
            shared = _needs(other) & needed
            if SLOT in shared:
                slots.append(other.id)
            elif shared:
                blocking.append(other.id)
        return blocking + (slots if len(slots) >= self.hardware.cpu_slots else [])

    def _change(self, job: JobRecord, **fields: object) -> None:
        for name, value in fields.items():
            setattr(job, name, value)
        job.save(self.directories.jobs)

    def _loop(self) -> None:
        while not self._ending.wait(TICK_SECONDS):
            self.tick()
            try:
                self.ask_servers()
            except Exception:
                logger.exception("the queue could not note that a server answers; it tries again")

    def tick(self) -> None:
        """Follow the jobs that run, and start those whose devices are free."""
        with self._lock:
            for job in self.listed():
                try:
                    if job.state in ("running", "stopping"):
                        self._follow(job)
                    elif job.state == "queued" and not self.blockers(job):
                        self._start(job)
                except Exception:  # such as a full disk; the other jobs must not stop
                    logger.exception(f"the queue could not follow {job.id}; it tries again")

    def ask_servers(self) -> None:
        """Mark servers that have loaded their models as ready. The requests run without the lock, for they are slow."""
        for job in self.listed():
            address = job.address
            if address and not job.ready and answers(address):
                with self._lock:
                    if job.address == address:
                        self._change(job, ready=True)

    def _start(self, job: JobRecord) -> None:
        folder = self.folder(job)
        (folder / EXIT).unlink(missing_ok=True)
        if job.request.stage == "serve":
            port = int(job.request.settings.get("--port") or 0) or free_port()
            job.commands[-1].settings["PORT"], job.address = str(port), f"http://127.0.0.1:{port}/"
            job.api_key = secrets.token_urlsafe(24)
        # Saved before the process starts: a manager that is killed in between finds the process by its mark.
        changes = {"attempt": job.attempt + 1, "mark": secrets.token_hex(16), "pid": 0, "started": time.time()}
        self._change(job, state="running", **changes)
        # The key is not a setting of the command, because the log shows the settings.
        environ = environment(job.mark) | ({"API_KEY": job.api_key} if job.api_key else {})
        with (folder / LOG).open("ab") as log, stops_blocked():
            self._children[job.id] = subprocess.Popen(
                [sys.executable, "-m", "minimind_mcore.manager.runner", str(folder)],
                env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._change(job, pid=self._children[job.id].pid)

    def _find_again(self, job: JobRecord) -> None:
        """Find the process of a job that a previous manager started."""
        if not job.pid:
            if pid := record.runner_pid(job.mark):
                self._change(job, pid=pid)
            elif job.state == "running" and not record.read_exit(self.folder(job), job.attempt):
                self._change(job, state="queued", attempt=job.attempt - 1)
        if job.state == "stopping":
            self._interrupt(job)  # the previous manager may have ended before its signal

    def _follow(self, job: JobRecord) -> None:
        """Update the state of a job that has ended, or kill a job that takes too long to save."""
        child, folder = self._children.get(job.id), self.folder(job)
        if child and child.poll() is not None:
            del self._children[job.id]
        if job.is_alive():
            if job.state == "stopping" and time.monotonic() > self._deadlines[job.id]:
                self._kill(job)
            return
        # Kill processes that outlive the job's own process. The device is not free before all of them have ended.
        if not self._kill(job):
            return
        status, ended = record.read_exit(folder, job.attempt) or (128 + signal.SIGKILL, time.time())
        done = status == 0 and not (job.state == "stopping" and job.request.stage == "serve")
        state = "finished" if done else "stopped" if job.state == "stopping" else "failed"
        error = record.error_of(folder, status) if state == "failed" else ""
        self._change(
            job, state=state, status=status, ended=ended, error=error, address="", api_key="", ready=False, pid=0
        )


def erase(folder: Path) -> str:
    """Delete the directory of a deleted job. Return a message if files are left, else ""."""
    shutil.rmtree(folder, ignore_errors=True)
    if not os.path.lexists(folder):
        return ""
    return (
        f"{folder} could not be deleted completely. Check its permissions, or delete it yourself; the manager tries "
        "again at its next start"
    )


def environment(mark: str) -> dict[str, str]:
    """Return the environment of a job's processes, apart from the settings of its commands."""
    return {name: value for name, value in os.environ.items() if name not in DROPPED} | {MARK: mark}


def _needs(job: JobRecord) -> set[tuple[str, int]]:
    """Return the devices that a job needs."""
    if job.device == CPU:
        return set() if job.request.stage == "serve" else {SLOT}
    return {(job.device, number) for number in job.devices}


def answers(address: str) -> bool:
    """Return whether a server has loaded its model."""
    return health(address.rstrip("/"), timeout=1) == 200


def hold(path: Path) -> TextIO:
    """Take the lock of a manager's directory, which the system releases when the process ends.

    Raises:
        UserError: another manager holds it.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(
            f"{path.parent}: another manager uses this directory; end it, or give another one with --jobs"
        ) from error
    return file

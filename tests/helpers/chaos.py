"""Faults at random times: what disturbs a run, and how the run afterwards is compared with an undisturbed one.

A round starts a run, disturbs it once or twice, and starts the same command again without a fault. Everything that is
random comes from `Round.random`, whose seed is the seed of all rounds and the round's number.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from helpers import engine
from minimind_mcore.storage import MANIFEST, check_manifest

SEED = int(os.environ.get("CHAOS_SEED", "14"))
SAVED = re.compile(r"saved checkpoint of iteration (\d+)")
PATIENCE = 240.0  # seconds for one attempt; on two idle cores the slowest takes about 40
CLOCKS = ("-20y", "+20y", "-3d", "+1h", "-59m", "+1d")
REFUSED = re.compile(r"^(?:\S*\(.*?\)\S*\s+)?error: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: of the round.
        kind: of the fault.
        trainer: the name of what is run, and how.
    """

    number: int
    kind: str
    trainer: str

    def __str__(self) -> str:
        return f"{self.number:02d}-{self.kind}-{self.trainer}"

    def random(self) -> random.Random:
        return random.Random(f"{SEED}/{self.number}")


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: the exit statuses of its processes, and what they printed."""

    codes: list[int]
    output: str

    @property
    def refusals(self) -> list[str]:
        """The sentences after "error: "."""
        return REFUSED.findall(self.output)


# Inside a rank


def limited() -> None:
    """Send the rank's output through a pipe, and limit the size of its files to $CHAOS_LIMIT bytes if that is set.

    The output must neither fill the small disk nor meet the limit.
    """
    log = Path(os.environ["CHAOS_LOGS"]) / f"rank{os.environ['RANK']}.log"
    part = log.with_suffix(".part")
    with open(part, "wb") as file:
        command = ["sh", "-c", 'trap "" TERM INT HUP; cat; mv "$0" "$1"', str(part), str(log)]
        pipe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file)
    assert pipe.stdin
    os.dup2(pipe.stdin.fileno(), 1)
    os.dup2(pipe.stdin.fileno(), 2)
    pipe.stdin.close()
    if limit := int(os.environ.get("CHAOS_LIMIT", "0")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


class Served:
    """Attempts on an `engine.Server`: ranks that are forked, so that most of an attempt is training.

    Args:
        server: of the ranks.
        argv: of the run.
        folder: `--output-dir`.
        steps: of the whole run.
        processes: the world size.
        module: whose `main` runs.
    """

    def __init__(
        self, server: engine.Server, argv: Sequence[str], folder: Path, steps: int, processes: int, module: str | None
    ) -> None:
        self.server, self.argv, self.folder, self.steps = server, argv, folder, steps
        self.count, self.module = processes, module
        self.logs = folder.parent / "logs"

    def start(self, limit: int = 0) -> None:
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir()
        environment = {"CHAOS_LOGS": str(self.logs), "CHAOS_LIMIT": str(limit)}
        pool = ThreadPoolExecutor(1)
        self.answer: Future[engine.Run] = pool.submit(
            self.server.run, self.argv, self.folder, self.count, f"{__file__}:limited", environment,
            check=False, module=self.module,
        )  # fmt: skip
        pool.shutdown(wait=False)

    def processes(self) -> list[psutil.Process]:
        """The ranks, in their order."""
        return sorted(psutil.Process(self.server.process.pid).children(), key=lambda process: process.pid)

    def running(self) -> bool:
        return not self.answer.done()

    def finish(self) -> Ended:
        codes = self.answer.result(PATIENCE).codes
        deadline = time.monotonic() + 10
        while list(self.logs.glob("*.part")) and time.monotonic() < deadline:
            time.sleep(0.01)
        return Ended(codes, "".join(log.read_text(errors="replace") for log in sorted(self.logs.iterdir())))

    def close(self) -> None:
        """The server ends its ranks."""


class Started:
    """Attempts that are programs of their own, with everything that they start.

    Args:
        command: the program and its arguments.
        folder: of its metrics.
        steps: of the whole run.
        victims: regular expression for the command lines of the descendants that can be disturbed.
        environment: of the program.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        steps: int,
        victims: str,
        environment: dict[str, str],
    ) -> None:
        self.command, self.folder, self.steps = command, folder, steps
        self.victims, self.environment = victims, environment
        self.log = folder.parent / "program.log"

    def start(self, limit: int = 0) -> None:
        own = {"DEVICE": "cpu", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        paths = [str(engine.ROOT), str(engine.ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        own["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.seen: set[psutil.Process] = set()
        with open(self.log, "wb") as log:
            self.program = subprocess.Popen(
                [sys.executable, *self.command], env=os.environ | own | self.environment, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, cwd=self.folder.parent,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """The program, then its victims."""
        with contextlib.suppress(psutil.NoSuchProcess):
            program = psutil.Process(self.program.pid)
            found = program.children(recursive=True)
            self.seen |= set(found)
            return [program, *(process for process in found if self.is_victim(process))]
        return []

    def is_victim(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return re.search(self.victims, " ".join(process.cmdline())) is not None
        return False

    def running(self) -> bool:
        self.processes()
        return self.program.poll() is None

    def finish(self) -> Ended:
        deadline = time.monotonic() + PATIENCE
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.program.poll() is not None, f"no end within {PATIENCE:g} s\n{self.log.read_text(errors='replace')}"
        while (left := [process for process in self.seen if lives(process)]) and time.monotonic() < deadline:
            time.sleep(0.05)  # what a killed program has started ends by itself
        self.close()
        output = self.log.read_text(errors="replace")
        assert not left, f"these still run: {left}\n{output}"
        return Ended([self.program.returncode], output)

    def close(self) -> None:
        """End what still runs of it."""
        for process in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.program.poll() is None:
            self.program.kill()
        self.program.wait()


Attempt = Served | Started


def lives(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie, whose parent is gone, does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# Faults


def wait(attempt: Attempt, seconds: float) -> bool:
    """Let the attempt run for so long; returns whether it still runs."""
    end = time.monotonic() + seconds
    while attempt.running() and time.monotonic() < end:
        time.sleep(0.005)
    return attempt.running()


def reach(attempt: Attempt, chance: random.Random, longest: float) -> bool:
    """Let the attempt run until a random moment; returns whether it still runs.

    The moment is a moment of the start in one of four cases. Otherwise it is one after a random number of steps, so
    that it does not depend on how busy the machine is.
    """
    if chance.random() < 0.25:
        return wait(attempt, chance.uniform(0.0, 0.4) * longest)
    share, late = chance.random(), chance.uniform(0.0, 0.1)
    first = last_step(attempt.folder)
    steps = first + int(share * (attempt.steps - first))
    while attempt.running() and last_step(attempt.folder) < max(steps, 1):
        time.sleep(0.005)
    return wait(attempt, late)


def last_step(folder: Path) -> int:
    """The last step in a run's metrics."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return 0
    return max(map(int, re.findall(r'"iteration": (\d+),', text)), default=0)


def send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def victims(attempt: Attempt) -> list[psutil.Process]:
    """The processes of an attempt; a run that has just been started has none for a moment."""
    while not (found := attempt.processes()) and attempt.running():
        time.sleep(0.005)
    return found


# Each returns whether the fault met the run before its end.


def kill(attempt: Attempt, chance: random.Random, longest: float) -> bool:
    """SIGKILL of all processes, or one."""
    everything, which = chance.random() < 0.5, chance.random()
    if not reach(attempt, chance, longest) or not (found := victims(attempt)):
        return False
    send(found if everything else [found[int(which * len(found))]], signal.SIGKILL)
    return True


def stop(attempt: Attempt, chance: random.Random, longest: float) -> bool:
    """SIGSTOP of all processes, or one, and SIGCONT a few seconds later."""
    everything, which, pause = chance.random() < 0.5, chance.random(), chance.uniform(0.5, 6.0)
    if not reach(attempt, chance, longest) or not (found := victims(attempt)):
        return False
    stopped = found if everything else [found[int(which * len(found))]]
    send(stopped, signal.SIGSTOP)
    wait(attempt, pause)
    send(stopped, signal.SIGCONT)
    return True


def stop_and_kill(attempt: Attempt, chance: random.Random, longest: float) -> bool:
    """SIGSTOP of all processes, then SIGKILL in another order."""
    pause = chance.uniform(0.1, 1.0)
    if not reach(attempt, chance, longest) or not (found := victims(attempt)):
        return False
    send(found, signal.SIGSTOP)
    wait(attempt, pause)
    send(chance.sample(found, len(found)), signal.SIGKILL)
    return True


def request(attempt: Attempt, chance: random.Random, longest: float) -> bool:
    """SIGTERM of the program."""
    if not reach(attempt, chance, longest) or not (found := victims(attempt)):
        return False
    send(found[:1], signal.SIGTERM)
    return True


def fill(attempt: Attempt, chance: random.Random, longest: float) -> bool:
    """Nothing at a time: the disk is small, or the files are limited, from the start."""
    return True


def jump(clock: Path) -> Callable[[Attempt, random.Random, float], bool]:
    """Set the clock several times, and kill the run in one of two rounds."""

    def jumps(attempt: Attempt, chance: random.Random, longest: float) -> bool:
        killed = chance.random() < 0.5
        for _ in range(3):
            clock.write_text(chance.choice(CLOCKS))
            reach(attempt, chance, longest)
        if killed and attempt.running():
            send(victims(attempt), signal.SIGKILL)
        return True

    return jumps


@dataclass
class Cut:
    """A file that lost its end; `undo` gives it back."""

    file: Path
    content: bytes
    size: int

    @classmethod
    def at_random(cls, folders: Sequence[Path], chance: random.Random) -> Cut:
        """Cut one of the files below some folders; a large number of one kind makes that kind no more likely."""
        files = [p for folder in folders for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
        kinds = sorted({file.name for file in files})
        kind = chance.choice(kinds)
        file = chance.choice([file for file in files if file.name == kind])
        content = file.read_bytes()
        cut = cls(file, content, chance.choice([0, len(content) - 1, chance.randrange(len(content))]))
        os.truncate(file, cut.size)
        return cut

    def undo(self) -> None:
        self.file.write_bytes(self.content)

    def __str__(self) -> str:
        return f"{self.file} cut to {self.size} of {len(self.content)} bytes"


# What is compared


def damaged_checkpoints(root: Path, saved: set[int]) -> list[str]:
    """Problems of the checkpoints that a run said it has saved."""
    found = []
    for iteration in sorted(saved):
        found += check_manifest(root / f"iter_{iteration:07d}", name=MANIFEST)
    return found


def state(directory: Path) -> dict[str, Any]:
    """Everything in a checkpoint, of either format, by name."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {str(p.relative_to(directory)): engine.load(p) for p in directory.rglob("*.pt")}
    if (directory / ".metadata").is_file():
        tensors: dict[str, Any] = {}
        _load_state_dict(
            tensors, storage_reader=FileSystemReader(directory), planner=_EmptyStateDictLoadPlanner(), no_dist=True
        )
        found["tensors"] = tensors
    return found


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of what is not equal to the last bit, or missing."""
    names = found.keys() | expected.keys()
    return sorted(n for n in names if n not in found or n not in expected or not engine.same(found[n], expected[n]))

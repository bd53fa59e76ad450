"""The dry run of a job: the kit's own, of every command that has one."""

from __future__ import annotations

import asyncio
import re
import secrets
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from minimind_mcore.cli.settings import CLI
from minimind_mcore.errors import UserError, last_error
from minimind_mcore.manager import record, runner
from minimind_mcore.manager.queue import Queue, environment
from minimind_mcore.manager.record import CommandRecord
from minimind_mcore.manager.request import JobRequest, key_of
from minimind_mcore.pipeline.main import DRY_RUN

CHECKED = DRY_RUN | {"data", "rl", "evaluate", "generate", "convert", "serve"}  # commands with a --dry-run
SECONDS = 300  # that a dry run may take; the tokenizer of a large file takes longest
FRESH_SECONDS = 600  # that the result of a dry run stands for
LONGEST = 1 << 18  # characters of an output that are kept
FACT = re.compile(r"([a-z][a-z ]{2,10}?)(?::\s+|\s{2,})(\S.*)")  # "memory:     about 0.1 GiB ..."


@dataclass(frozen=True)
class Plan:
    """What a job would do.

    Attributes:
        commands: as one could type them.
        device: kind of device.
        devices: numbers of the accelerators.
        facts: layout, memory, time and other lines of the dry runs, by name.
        output: everything that the dry runs printed.
        error: what is wrong; "" if the job is valid.
    """

    commands: list[str]
    device: str
    devices: list[int]
    facts: dict[str, str] = field(default_factory=dict)
    output: str = ""
    error: str = ""


class Planner:
    """Makes plans, one at a time, and keeps them for a while: a client that shows a plan starts the job next."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self._lock = asyncio.Lock()
        self._known: dict[str, tuple[float, Plan]] = {}
        self._mark = ""  # of the processes of the dry run that runs
        self._closed = False

    def close(self) -> None:
        """End the dry run that runs; no other one starts."""
        self._closed = True
        if self._mark:
            record.end(self._mark)

    async def plan(self, asked: JobRequest) -> Plan:
        """Return the plan of a job.

        Raises:
            UserError: the request is wrong, before any command was asked.
        """
        folder = self.queue.directories.jobs / "plan"  # never made: a dry run writes nothing
        kind, numbers, commands = await asyncio.to_thread(self.queue.commands, asked, folder)
        async with self._lock:
            now, key = time.monotonic(), key_of(asked)
            self._known = {k: v for k, v in self._known.items() if now - v[0] < FRESH_SECONDS}
            if key in self._known:
                return self._known[key][1]
            output, error = await asyncio.to_thread(self._dry_run, commands)
            facts = {match[1]: match[2] for match in map(FACT.fullmatch, output.splitlines()) if match}
            shown = [runner.typed(command.words, command.settings) for command in commands]
            found = Plan(shown, kind, numbers, facts, output, error)
            if not error:
                self._known[key] = (now, found)
            return found

    async def require(self, asked: JobRequest) -> Plan:
        """Return the plan of a valid job.

        Raises:
            UserError: the dry run has found something wrong.
        """
        found = await self.plan(asked)
        if found.error:
            raise UserError(found.error)
        return found

    def _dry_run(self, commands: Sequence[CommandRecord]) -> tuple[str, str]:
        """Run the dry runs of a job's commands. Return what they print, and the error of the first that fails."""
        output = ""
        for number, command in enumerate(commands):
            if command.words[0] not in CHECKED:
                continue
            # The data of a training by reinforcement is made by the command before it.
            pending = ["--data-pending"] if command.words[0] == "rl" and number else []
            status, printed, errors = self._ask([*CLI, *command.words, "--dry-run", *pending], command)
            output = (output + printed)[-LONGEST:]
            if status:
                return output, last_error(errors, status)[:4000]
        return output, ""

    def _ask(self, words: Sequence[str], command: CommandRecord) -> tuple[int, str, str]:
        mark = self._mark = secrets.token_hex(16)
        process = subprocess.Popen(
            words, env=environment(mark) | command.settings, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        if self._closed:  # before the process had started
            record.end(mark)
        try:
            printed, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            record.end(mark)
            process.communicate()
            return 1, "", f"error: the dry run took more than {SECONDS} s"
        finally:
            self._mark = ""
        return process.returncode, printed, errors

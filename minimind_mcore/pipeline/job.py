"""What a stage does, and the record by which a finished stage is recognized.

A record holds digests of what the stage has read, of its settings and of what it has written. A stage whose record
agrees with all of them is finished. Times of files are not looked at.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from minimind_mcore.checkpoint.files import iteration_directory
from minimind_mcore.errors import UserError
from minimind_mcore.storage import atomic_write_text, check_manifest, sha256

# Settings of the environment that change what a training computes.
SETTINGS = (
    "RECIPE ROUTER_WEIGHT TP PP VPP EP CP MBS GBS SEQ_LENGTH EPOCHS TRAIN_ITERS LR PRECISION SPLIT SEED PACK "
    "CKPT_FORMAT HANDLER_NAME PROMPT_TYPE MAP_KEYS JSON_KEYS DEVICE BACKEND NPUS_PER_NODE NNODES TASK TASK_DATA_PATH "
    "NUM_FEWSHOT MAX_NEW_TOKENS"
).split()


@dataclass(frozen=True)
class Command:
    """A command of the kit: the words after `minimind-mcore`, and settings."""

    words: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work of a stage.

    Attributes:
        name: of the record: the name of the stage, or "eval-" and the name of the stage that is evaluated.
        commands: run in this order.
        inputs: files whose content decides, by what they are for.
        begins: jobs whose weights decide.
        folder: what the job writes, apart from the record. A folder of other inputs is set aside.
        outputs: files that exist afterwards.
        trains: the folder has checkpoints, whose weights get a digest.
    """

    name: str
    commands: tuple[Command, ...]
    inputs: Mapping[str, Path] = field(default_factory=dict)
    begins: tuple[str, ...] = ()
    folder: Path | None = None
    outputs: tuple[Path, ...] = ()
    trains: bool = False


class Record(TypedDict, total=False):
    """What is known of a job. `inputs`, `settings` and `outputs` hold digests or values by name."""

    job: str
    version: str
    inputs: dict[str, str]
    settings: dict[str, str]
    commands: list[str]
    outputs: dict[str, str]
    weights: str
    seconds: float
    processes: int
    finished: bool


@functools.cache
def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a directory's files and their names.

    Raises:
        UserError: the path does not exist.
    """
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist; expected an input of this stage")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def weights_digest(checkpoints: Path) -> str:
    """Return the digest of the newest checkpoint's weights: equal for equal tensors in any layout.

    A checkpoint of adapters holds no whole model. Its digest is that of its files.
    """
    from minimind_mcore.converters import conversion, convert

    try:
        source = conversion.open_model(conversion.Conversion(load_dir=checkpoints))
    except UserError:
        folder = iteration_directory(checkpoints)
        return digest(folder or checkpoints)
    return convert.combined({name: convert.look_at(name, lazy, lazy.read()) for name, lazy in source.tensors.items()})


def unfinished(job: Job, name: str) -> UserError:
    """Return the error of a job that begins with the weights of a job that has not finished."""
    return UserError(f"{job.name} begins with the weights of {name}, which has not finished: run {name} first")


class Records:
    """The records of a run, one file of JSON for each job.

    Args:
        folder: of the files.
        places: directories that occur in commands, by the names under which they are recorded. A run that is moved
            stays the same run.
    """

    def __init__(self, folder: Path, places: Mapping[str, Path]) -> None:
        self.folder, self.places = folder, places

    def file(self, name: str) -> Path:
        """Return the file of a job's record."""
        return self.folder / f"{name}.json"

    def read(self, name: str) -> Record:
        """Return a job's record; an empty one if there is none, or if it is damaged."""
        try:
            found: Record = json.loads(self.file(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, name: str, record: Record) -> None:
        """Write a job's record."""
        atomic_write_text(self.file(name), json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def finished(self, name: str) -> bool:
        """Whether a job of that name has finished, with whatever inputs."""
        return self.read(name).get("finished", False)

    def expected(self, job: Job) -> Record:
        """Return the part of a job's record that is known before the job runs.

        Raises:
            UserError: an input does not exist, or a job whose weights it needs has not finished.
        """
        inputs = {name: digest(path) for name, path in job.inputs.items()}
        for name in job.begins:
            before = self.read(name)
            if not before.get("finished") or "weights" not in before:
                raise unfinished(job, name)
            inputs[f"weights of {name}"] = before["weights"]
        settings = {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}
        commands = []
        for command in job.commands:
            words = [*(f"{name}={value}" for name, value in command.settings.items() if value), *command.words]
            commands.append(self._relative(" ".join(words)))
        return {"job": job.name, "inputs": inputs, "settings": settings, "commands": commands}

    def _relative(self, text: str) -> str:
        for name, place in self.places.items():
            text = text.replace(str(place), name)
        return text

    def agrees(self, job: Job, expected: Record) -> bool:
        """Whether the record of a job, finished or not, is of these inputs and settings."""
        found = self.read(job.name)
        return bool(found) and all(found.get(key) == value for key, value in expected.items())

    def is_done(self, job: Job, expected: Record) -> bool:
        """Whether a job has finished with these inputs and settings, and what it wrote is intact."""
        found = self.read(job.name)
        if not (self.agrees(job, expected) and found.get("finished")):
            return False
        outputs = {self._relative(str(path)): path for path in job.outputs}
        written = found.get("outputs", {})
        intact = all(path.exists() and written.get(name) == digest(path) for name, path in outputs.items())
        if intact and job.trains and job.folder:
            latest = iteration_directory(job.folder / "checkpoints")
            intact = latest is not None and not check_manifest(latest)
        return intact

    def finish(self, job: Job, record: Record) -> Record:
        """Record that a job has finished, with the digests of what it has written."""
        digest.cache_clear()
        record["outputs"] = {self._relative(str(path)): digest(path) for path in job.outputs}
        if job.trains and job.folder:
            record["weights"] = weights_digest(job.folder / "checkpoints")
        record["finished"] = True
        self.write(job.name, record)
        return record

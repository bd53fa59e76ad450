"""The jobs of a stage, and the record that marks a job as finished.

A record holds the digests of a job's inputs and outputs, its settings and its commands. A job whose record matches all
of them is skipped. File times are not used.
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

# Environment variables that change the result of a training, and those that change the result of an evaluation.
TRAINING = tuple(
    "RECIPE ROUTER_WEIGHT TP PP VPP EP CP MBS GBS SEQ_LENGTH EPOCHS TRAIN_ITERS LR PRECISION SPLIT SEED PACK "
    "CKPT_FORMAT HANDLER_NAME PROMPT_TYPE MAP_KEYS JSON_KEYS DEVICE BACKEND NPUS_PER_NODE NNODES".split()
)
EVALUATION = tuple(
    "PRECISION SEED PROMPT_TYPE DEVICE BACKEND TASK TASK_DATA_PATH NUM_FEWSHOT MAX_NEW_TOKENS HARNESS".split()
)
SETTINGS = tuple(dict.fromkeys((*TRAINING, *EVALUATION)))
# Environment variables that the commands of a run read and that no record holds. A container and a command that repeats
# a stage get these variables too.
UNRECORDED = tuple(
    "FORMAT PAD_HEAD_DIM VERIFY MERGE LORA_R LORA_ALPHA ENGINE BATCH SAVE_INTERVAL LOG_INTERVAL EVAL_INTERVAL "
    "EVAL_ITERS TEMPERATURE TOP_K TOP_P LEAST HF_ENDPOINT MODELSCOPE_ENDPOINT".split()
)
DEFAULT_BACKEND = "BACKEND=native "  # of trainings; older records do not name it


@dataclass(frozen=True)
class Command:
    """A command of the kit: the words after `minimind-mcore`, and environment variables."""

    words: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One unit of work of a stage.

    Attributes:
        name: name of the record: the stage, or "eval-" and the evaluated stage.
        commands: commands, run in this order.
        inputs: input files by purpose. If their content changes, the job runs again.
        begins: jobs that train the initial weights. If the weights change, the job runs again.
        folder: output directory of the job. A directory written with other inputs is renamed and kept.
        outputs: files that exist after the job.
        trains: the folder gets checkpoints. The digest of their weights is recorded.
        settings: environment variables. If the value of one of them changes, the job runs again.
    """

    name: str
    commands: tuple[Command, ...]
    inputs: Mapping[str, Path] = field(default_factory=dict)
    begins: tuple[str, ...] = ()
    folder: Path | None = None
    outputs: tuple[Path, ...] = ()
    trains: bool = False
    settings: tuple[str, ...] = ()

    def read_settings(self) -> list[str]:
        """Return the names in `settings` that no command gives a value for. The others are part of the commands."""
        given = {name for command in self.commands for name, value in command.settings.items() if value}
        return [name for name in self.settings if name not in given]


class Record(TypedDict, total=False):
    """The recorded facts of a job. `inputs` and `outputs` hold digests by name, `settings` holds values by name.

    `seconds` counts all attempts, and `processes` counts all hosts. Only the record of a running or killed job has
    `began`, the start of the attempt in seconds since the epoch.
    """

    job: str
    version: str
    inputs: dict[str, str]
    settings: dict[str, str]
    commands: list[str]
    outputs: dict[str, str]
    weights: str
    seconds: float
    processes: int
    began: float
    finished: bool


@functools.cache
def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a directory's files.

    Raises:
        UserError: the path does not exist.
    """
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist, but is an input of this stage")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def weights_digest(checkpoints: Path) -> str:
    """Return the digest of the newest checkpoint's weights. Equal tensors have equal digests in any parallel layout.

    A checkpoint of LoRA adapters does not hold a whole model, so its files are digested instead.
    """
    from minimind_mcore.converters import conversion, convert

    try:
        source = conversion.open_model(conversion.Conversion(load_dir=checkpoints))
    except UserError:
        folder = iteration_directory(checkpoints)
        return digest(folder or checkpoints)
    return convert.combined(
        {name: convert.checked_digest(name, lazy, lazy.read()) for name, lazy in source.tensors.items()}
    )


def unfinished(job: Job, name: str) -> UserError:
    """Return the error for a job whose initial weights come from an unfinished job."""
    return UserError(f"{job.name} begins with the weights of {name}, which has not finished: run {name} first")


class Records:
    """The records of a run, one JSON file per job.

    Args:
        folder: directory of the JSON files.
        placeholders: directories by the name that replaces them in a record. A run that is moved to another directory
            then still matches its records.
    """

    def __init__(self, folder: Path, placeholders: Mapping[str, Path]) -> None:
        self.folder, self.placeholders = folder, placeholders

    def file(self, name: str) -> Path:
        """Return the file of a job's record."""
        return self.folder / f"{name}.json"

    def read(self, name: str) -> Record:
        """Return a job's record, or an empty one if the file is missing or damaged."""
        try:
            found: Record = json.loads(self.file(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, name: str, record: Record) -> None:
        """Write a job's record."""
        atomic_write_text(self.file(name), json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def finished(self, name: str) -> bool:
        """Return whether the job has finished, with any inputs."""
        return self.read(name).get("finished", False)

    def expected(self, job: Job) -> Record:
        """Return the part of a job's record that is known before the job runs.

        Raises:
            UserError: an input does not exist, or the job that trains the initial weights has not finished.
        """
        inputs = {name: digest(path) for name, path in job.inputs.items()}
        for name in job.begins:
            before = self.read(name)
            if not before.get("finished") or "weights" not in before:
                raise unfinished(job, name)
            inputs[f"weights of {name}"] = before["weights"]
        settings = {name: os.environ[name] for name in job.read_settings() if os.environ.get(name)}
        commands = []
        for command in job.commands:
            words = [*(f"{name}={value}" for name, value in command.settings.items() if value), *command.words]
            commands.append(self._relative(" ".join(words)))
        return {"job": job.name, "inputs": inputs, "settings": settings, "commands": commands}

    def _relative(self, text: str) -> str:
        for name, directory in self.placeholders.items():
            text = text.replace(str(directory), name)
        return text

    def agrees(self, job: Job, expected: Record) -> bool:
        """Return whether the record of a job, finished or not, has these inputs and settings."""
        found = self.read(job.name)
        # Older records hold the variables of every kind of job.
        names = job.read_settings()
        settings = {name: value for name, value in found.get("settings", {}).items() if name in names}
        commands = [text.replace(DEFAULT_BACKEND, "") for text in found.get("commands", [])]
        wanted = {**expected, "commands": [text.replace(DEFAULT_BACKEND, "") for text in expected["commands"]]}
        return bool(found) and all(
            {**found, "settings": settings, "commands": commands}.get(key) == value for key, value in wanted.items()
        )

    def is_done(self, job: Job, expected: Record) -> bool:
        """Return whether a job has finished with these inputs and settings, and its outputs are undamaged."""
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

    def seconds(self, job: Job) -> float:
        """Return the seconds of a job's earlier attempts.

        A kill leaves no time to write the seconds of an attempt. They are taken from the file that was written last.
        """
        found = self.read(job.name)
        total = found.get("seconds", 0.0)
        if "began" in found and job.folder:
            times = [file.stat().st_mtime for file in job.folder.rglob("*") if file.is_file()]
            total += max(0.0, max(times, default=0.0) - found["began"])
        return total

    def finish(self, job: Job, record: Record) -> Record:
        """Record that a job has finished, with the digests of its outputs."""
        digest.cache_clear()
        record["outputs"] = {self._relative(str(path)): digest(path) for path in job.outputs}
        if job.trains and job.folder:
            record["weights"] = weights_digest(job.folder / "checkpoints")
        record["finished"] = True
        self.write(job.name, record)
        return record

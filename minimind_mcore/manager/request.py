"""What a client asks for, checked, and the kit's commands that do it.

The commands are those of the pipeline (`pipeline/stages.py`): this module only says where they read and write. Paths
are absolute, values are numbers, choices or switches, and nothing is passed to a shell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from minimind_mcore.cli.settings import data_dir
from minimind_mcore.errors import UserError, did_you_mean, shown
from minimind_mcore.manager.files import Directories
from minimind_mcore.manager.options import checked, options
from minimind_mcore.models.presets import find_model, is_path
from minimind_mcore.pipeline.job import Command, Records
from minimind_mcore.pipeline.stages import KIND, RL, STAGES, TRAININGS, UNSET, Run
from minimind_mcore.serve.protocol import validated

# The pipeline's stages that have commands, and the server, which outlives a pipeline and is a job here.
JOB_STAGES = (*(name for name in STAGES if name not in ("build", "vllm", "web")), "serve")
ON_WEIGHTS = ("eval", "convert", "serve")
INPUTS: tuple[str, ...] = ("data", "tokenizer", "weights", "lora", "teacher", "reward_model")
Recipe = Literal["", "minimind2", "minimind3", "tiny"]
LONGEST_NAME = 80
MOST = 64  # options or devices of a request


class JobRequest(BaseModel):
    """A job as a client asks for it.

    Attributes:
        stage: one of `JOB_STAGES`.
        name: shown in lists.
        model: a preset or a config.json; "" for minimind3, with sample data minimind3_tiny.
        recipe: generation whose recipes are used; "" for the model's own.
        data: a raw file or the prefix of a converted dataset; "" for the sample data.
        tokenizer: its directory.
        weights: what the job begins with or works on: a checkpoint in any form.
        lora: checkpoint of adapters to `weights`.
        teacher: model that distillation learns from.
        reward_model: for reinforcement learning; without it the sample problems are used.
        settings: options by name, see `options.options`.
        device: kind of device; "" for the host's.
        devices: numbers of the devices; [] for all of the host, or for one if the stage uses one.
        dry_run: check everything and start nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    stage: str
    name: str = ""
    model: str = ""
    recipe: Recipe = ""
    data: str = ""
    tokenizer: str = ""
    weights: str = ""
    lora: str = ""
    teacher: str = ""
    reward_model: str = ""
    settings: dict[str, bool | int | float | str | None] = Field(default={}, max_length=MOST)
    device: str = ""
    devices: list[int] = Field(default=[], max_length=MOST)
    dry_run: bool = False


def read(content: object) -> JobRequest:
    """Return a request from JSON.

    Raises:
        UserError: a field is unknown, missing or of another type, or the stage does not exist.
    """
    request = validated(JobRequest, content)
    if request.stage not in JOB_STAGES:
        hint = did_you_mean(request.stage[:40], JOB_STAGES)
        raise UserError(f"stage: found {shown(request.stage)}{hint}; expected one of {', '.join(JOB_STAGES)}")
    if len(request.name) > LONGEST_NAME or not request.name.isprintable():
        raise UserError(f"name: expected at most {LONGEST_NAME} printable characters; found {shown(request.name)}")
    return request


def inputs(stage: str) -> dict[str, bool]:
    """Return the inputs that a stage reads, and whether each must be given."""
    if stage in ON_WEIGHTS:
        found = {"data": False} if stage == "eval" else {}
        return {"weights": True, **found, "lora": False, "tokenizer": False}
    if stage in TRAININGS:
        found = {"data": False, "tokenizer": False}
        found |= {"weights": True} if TRAININGS[stage][1] else {}
        return found | ({"teacher": True} if stage == "distillation" else {})
    if stage in RL:
        return {"data": False, "tokenizer": False, "weights": False, "reward_model": False}
    return {"data": True} if stage == "tokenizer" else {}


def commands(request: JobRequest, directories: Directories, folder: Path) -> list[Command]:
    """Return the commands of a job that writes to a directory.

    Raises:
        UserError: an input or an option is wrong.
    """
    stage, paths = request.stage, _paths(request, directories)
    # A reward model needs the prompts of the user's data: the sample problems have rewards by rules.
    trains = stage in (*TRAININGS, *RL)
    sample = trains and not paths["data"] and not (stage in RL and paths["reward_model"])
    model = model_of(request, directories, "minimind3_tiny" if sample else "minimind3")
    known = options(stage, model, request.recipe)
    given = checked(known, request.settings)
    task = _task(given.pop("TASK", ""), paths["data"]) if stage == "eval" else None
    settings = {name: value for name, value in given.items() if name.isupper()}
    words = [
        name if known[name].kind == "flag" else f"{name}={value}" for name, value in given.items() if not name.isupper()
    ]
    if stage == "serve":
        where = {"LOAD_DIR": paths["weights"], "LORA_DIR": paths["lora"], "TOKENIZER_PATH": paths["tokenizer"]}
        # The queue gives the port as the setting PORT, which a flag would hide; 0 stands for a free one.
        words = [word for word in words if not word.startswith("--port=")]
        return [Command(("serve", *words), {**UNSET, **where, **settings, "HOST": "127.0.0.1"})]
    run = _run(request, directories.data, folder, paths, model, sample and stage in RL, "RAW" in settings)
    if task:
        run = replace(run, tasks=task[:1], task_data=task[1:])
    found = STAGES[stage](run)
    if not found:
        raise UserError(f"{stage}: nothing is left to do; all files are in {directories.data}")
    [job] = found
    changes = _changes(run, job.begins, paths)
    if stage in TRAININGS:
        # On an NPU the commands' own default is MindSpeed-LLM, which neither saves at a stop nor writes metrics.jsonl.
        settings = {"BACKEND": "native", **settings, "DATA_PATH": paths["data"]}
    settings |= {"DATA_DIR": str(data_dir())} if sample else {}
    if stage in (*TRAININGS, *ON_WEIGHTS) and (sample or not Path(run.tokenizer_dir(), "tokenizer.json").is_file()):
        settings["TOKENIZER_PATH"] = paths["tokenizer"]
    if stage in RL and not job.begins and paths["weights"]:
        words.insert(0, f"actor_config.load={paths['weights']}")
    done = [_changed(command, changes, settings) for command in job.commands]
    done[-1] = Command((*done[-1].words, *words), done[-1].settings)
    return done


def _task(task: str, data: str) -> tuple[str, str] | None:
    """Return the task of an evaluation and its data; None if only replies are scored.

    Raises:
        UserError: one of both is missing.
    """
    if task in ("", "toolcall"):
        if data and not task:
            raise UserError(f"TASK: expected the task that reads {data}; choose one, or leave data empty")
        return (task, data or "minimind") if task else None  # eight cases that the kit has
    if not data:
        raise UserError(f"data: the task {task} needs it; choose some")
    return task, data


def _paths(request: JobRequest, directories: Directories) -> dict[str, str]:
    """Return the checked inputs of a request by name; "" for those that are not given."""
    needed, found = inputs(request.stage), dict.fromkeys(INPUTS, "")
    for name in INPUTS:
        text = getattr(request, name)
        if text and name not in needed:
            raise UserError(f"{name}: the stage {request.stage} does not read it; leave the field empty")
        if text:
            is_dataset = name == "data" and request.stage in (*TRAININGS, "eval")
            found[name] = directories.check(name, text, is_dataset)
            if name == "reward_model" and not directories.trusts_reward_models:
                raise UserError(
                    "reward_model: the directory of a reward model has Python code, which the job would run with your "
                    "rights. Start the manager with --trust-reward-models if you trust the directories that it may read"
                )
        elif needed.get(name):
            raise UserError(f"{name}: the stage {request.stage} needs it; choose one of the list")
    return found


def model_of(request: JobRequest, directories: Directories, default: str = "minimind3") -> str:
    """Return the preset of a request, or the path of its config.json.

    Raises:
        UserError: the preset does not exist, or the path is not allowed.
    """
    text = request.model or default
    if len(text) > LONGEST_NAME or not text.isprintable() or is_path(text):
        return directories.check("model", text)
    try:
        find_model(text)
    except UserError as error:
        raise UserError(f"model: {error}") from error
    return text


def _run(
    request: JobRequest, datasets: Path, folder: Path, paths: Mapping[str, str], model: str, sample: bool, raw: bool
) -> Run:
    """Return what the pipeline needs to know about a job."""
    tokenizer = Path(paths["tokenizer"]) if paths["tokenizer"] else None
    weight = "lora" if paths["lora"] else "pretrain" if raw else "full_sft"
    data = Path(paths["data"])
    # The prefix of a converted dataset takes the place of the file afterwards.
    files = {} if not paths["data"] or not data.exists() else {KIND.get(request.stage, request.stage): data}
    return Run(
        model=model, recipe=request.recipe, output=folder, data=datasets, tokenizer=tokenizer, sample=sample,
        weight=weight, teacher=paths["teacher"], reward_model=paths["reward_model"], port=0, stages=(request.stage,),
        records=Records(folder, {}), files=files,
    )  # fmt: skip


def _changes(run: Run, begins: Sequence[str], paths: Mapping[str, str]) -> dict[str, str]:
    """Return the paths of the chosen weights by the paths where the pipeline would have put them.

    Raises:
        UserError: the stage begins with weights, and none are given.
    """
    if begins and not paths["weights"]:
        raise UserError(f"weights: the stage {run.stages[0]} begins with the weights of {begins[0]}; choose some")
    chosen = dict(zip(begins, (paths["weights"], paths["lora"]), strict=False))
    return {run.checkpoints(stage): path for stage, path in chosen.items()}


def _changed(command: Command, changes: Mapping[str, str], settings: Mapping[str, str]) -> Command:
    def moved(text: str) -> str:
        for old, new in changes.items():
            text = text.replace(old, new)
        return text

    return Command(
        tuple(map(moved, command.words)),
        {name: moved(value) for name, value in command.settings.items()} | dict(settings),
    )


def key_of(request: JobRequest) -> str:
    """Return what is equal for requests that ask for the same."""
    return json.dumps(request.model_dump(exclude={"name", "dry_run"}), sort_keys=True)

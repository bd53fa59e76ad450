"""minimind-mcore run STAGE|PRESET...: run the stages from data to a served model.

    minimind-mcore run --sample all serve           # all stages with sample data: minutes on a CPU
    minimind-mcore run --dry-run zero               # check every stage without running it
    minimind-mcore run zero                         # MiniMind-3 from downloads to scores
    minimind-mcore run --model minimind2 --data reason=FILE --from dpo all

A finished stage is skipped if the digests of its inputs, settings and outputs are unchanged. Repeat the same command
to continue an interrupted stage from its checkpoint. The first failure ends the run. The settings that
`minimind-mcore pretrain --help` lists (EPOCHS, MBS, TP, ...) apply to every training of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import minimind_mcore
from minimind_mcore import hosts
from minimind_mcore.checkpoint.padding import padded_config
from minimind_mcore.cli import launcher, quickstart
from minimind_mcore.cli.settings import CLI, choice, count, env, wait_for
from minimind_mcore.errors import UserError, naming
from minimind_mcore.inputs.flags import documented_parser
from minimind_mcore.models.presets import find_model, is_path
from minimind_mcore.paths import CHECKOUT, default_outputs
from minimind_mcore.pipeline import docker, download, report, serving
from minimind_mcore.pipeline.job import TRAINING, Command, Job, Records, unfinished
from minimind_mcore.pipeline.stages import (
    DATA,
    KIND,
    PRESETS,
    RL,
    RL_SETTINGS,
    STAGES,
    TRAININGS,
    Run,
    addition_accuracy,
    expand,
    has_no_reasoning,
    names_cases,
)
from minimind_mcore.pipeline.tables import find
from minimind_mcore.preprocess.indexed import datasets_at
from minimind_mcore.storage import free_bytes, require_writable, set_aside

logger = logging.getLogger(__name__)

# Commands with a dry run that accepts --data-pending and --weights-pending.
DRY_RUN = {"pretrain", "sft", "lora", "dpo", "reason", "distill"}

# Environment variables that hold paths. A command that repeats a stage gets them as absolute paths.
PATHS = ("OUTPUT_DIR", "DATA_DIR", "TOKENIZER_PATH", "HOSTFILE")
HOSTS = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # not in records, because they do not change the result


def main(argv: Sequence[str]) -> int:
    """Run the stages of a command line. Return the exit status."""
    args = parse(argv)
    if env("PRECISION"):
        os.environ["PRECISION"] = launcher.precision("")  # records hold the precision used, not "auto"
    run = make_run(args)
    find_model(run.model)  # report a wrong name before a download
    least()
    require_writable(run.output, "give another directory with OUTPUT_DIR")
    logger.info(f"stages: {' '.join(run.stages)}")
    unused = [name for name in TRAINING if env(name) and name not in RL_SETTINGS]
    if unused and (learning := " ".join(name for name in run.stages if name in RL)):
        logger.warning(f"ignored by {learning}: {', '.join(unused)}; set values in configs/rlxf (docs/rl_config.md)")
    kind = docker.kind_of_host(args.dry_run) if args.docker else ""
    stages = run.stages
    if kind:
        docker.mounted(run)  # report a missing file before the image is built
    if stage := first_impossible(run, bool(kind)):
        return failed(run, args, stage, 1, has_begun=False)
    if kind and (status := before_container(run, kind, args)):
        return failed(run, args, "", status)
    if kind:
        stages = tuple(name for name in stages if name in ("vllm", "web"))
    for stage in stages:
        with _named(stage):
            if status := run_stage(run, stage, args):
                return failed(run, args, stage, status)
    if args.dry_run:
        print("\ndry run: every stage is valid, nothing was run")
        return 0
    if not kind and any(run.records.finished(name) for name in (*TRAININGS, *RL)):
        report.write(run)
    return judge(run)


def failed(run: Run, args: argparse.Namespace, stage: str, status: int, has_begun: bool = True) -> int:
    """Log that a stage, or the container (stage ""), failed, and the command that repeats it. Return the status.

    A stage needs the earlier stages of the run. If none of them has run, the command repeats the whole run.
    """
    what = f"the stage {stage}" if stage else "the run"
    alone = stage if has_begun and not args.dry_run else ""
    logger.error(f"{what} failed with exit status {status}. To repeat it:\n  {repeat_command(run, args, alone)}")
    return status


def first_impossible(run: Run, in_container: bool) -> str:
    """Return the first stage that must fail, or "". Log why, so that it does not show after hours of earlier stages."""
    for stage in run.stages:
        try:
            require_space(run, stage)
            # The settings of sample stages depend on the devices that the container sees, so the container checks them.
            for job in [] if in_container and run.sample else STAGES[stage](run):
                require_inputs(run, stage, job)
                if stage == "download":
                    require_download(run, job)
            if stage == "convert":
                require_conversion(run)
            elif stage == "eval":
                require_tasks(run)
            elif stage == "vllm":
                if not in_container:  # the services of Docker choose the engine themselves
                    serving.require_engine()
                serving.require_model(run)
        except UserError as error:
            logger.error(error)
            return stage
    return ""


def before_container(run: Run, kind: str, args: argparse.Namespace) -> int:
    """Download on the host, build the image, and run the stages in a container. Return the exit status."""
    inside = [name for name in run.stages if name not in docker.OUTSIDE]
    if "download" in run.stages and not run.sample and (status := run_stage(run, "download", args)):
        return status
    if status := docker.build(kind, args.dry_run):
        return status
    return docker.run_inside(run, kind, options_of(run), inside, args.dry_run) if inside else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    presets = "\n".join(f"  {name:<6}{stages}" for name, stages in PRESETS.items())
    epilog = f"stages: {' '.join(STAGES)}\npresets:\n{presets}"
    parser = documented_parser("minimind-mcore run", __doc__, epilog=epilog)
    parser.add_argument("stages", nargs="*", metavar="STAGE|PRESET", help="stages to run, in this order")
    parser.add_argument("--model", help="a preset or a config.json (default: MODEL, else minimind3)")
    parser.add_argument("--recipe", choices=("minimind2", "minimind3", "tiny"), help="model generation of the recipes")
    parser.add_argument("--sample", action="store_true", help="use sample data and a tiny model: minutes on a CPU")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="skip the stages before this one")
    parser.add_argument("--until", metavar="STAGE", help="skip the stages after this one")
    parser.add_argument("--only", metavar="STAGE", help="run only this stage")
    parser.add_argument(
        "--data", action="append", default=[], metavar="KIND=FILE", help=f"data file; KIND: {', '.join(DATA)}"
    )
    parser.add_argument(
        "--mini", action="store_true", help="use the mini files of pretrain and full_sft only, as the preset zero does"
    )
    parser.add_argument("--weight", default="full_sft", metavar="STAGE", help="stage whose weights are served")
    parser.add_argument("--teacher", default="", help="teacher for distillation, a model in any format")
    parser.add_argument("--reward-model", default="", help="directory of the reward model for ppo, grpo and spo")
    parser.add_argument("--port", type=_port, default=env("PORT", "8998"), help="port of the server (default: 8998)")
    parser.add_argument("--docker", action="store_true", help="run in the Docker image for this host's device")
    parser.add_argument("--dry-run", action="store_true", help="check every stage without running it")
    parser.add_argument("--resume", action="store_true", help="accepted but not needed: a run always resumes")
    return parser.parse_intermixed_args(argv)  # options may stand between stages


def _port(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"found {text!r} (--port, or PORT), expected a number from 1 to 65535")
    return int(text)


def make_run(args: argparse.Namespace) -> Run:
    """Build the run that the command line describes.

    Raises:
        UserError: a stage, a kind of data or a model does not exist.
    """
    root = default_outputs()
    if args.sample:
        os.environ["DEVICE"] = env("DEVICE", "cpu")
        own = args.model in (None, quickstart.MODEL)
        ignored = {"--model": not own, "--data": args.data, "--reward-model": args.reward_model}
        if wrong := [flag for flag, value in ignored.items() if value]:
            raise UserError(f"--sample has its own model and data: leave out {', '.join(wrong)}, or --sample")
    model = quickstart.MODEL if args.sample else args.model or env("MODEL", "minimind3")
    model = _absolute(model) if is_path(model) else model
    file = Path(model)
    name = "quickstart" if args.sample else file.parent.name if file.name == "config.json" else file.name
    output = Path(
        env("OUTPUT_DIR", str(root / "outputs" / name if args.sample else root / "outputs/run" / name))
    ).absolute()
    data = Path(env("DATA_DIR", str(root / ("data/quickstart" if args.sample else "dataset")))).absolute()
    files = dict(_pair(word) for word in args.data)
    if args.weight not in (*TRAININGS, *RL):
        raise UserError(f"--weight {args.weight}: expected a training stage: {', '.join((*TRAININGS, *RL))}")
    tokenizer = Path(given).absolute() if (given := env("TOKENIZER_PATH")) and not args.sample else None
    records = Records(output / "records", {"$OUTPUT": output, "$DATA": data, "$KIT": root})
    run = Run(
        model=model, recipe=args.recipe or "", output=output, data=data, tokenizer=tokenizer, sample=args.sample,
        weight=args.weight, teacher=_absolute(args.teacher), reward_model=_absolute(args.reward_model), port=args.port,
        stages=tuple(chosen(args)), records=records, files=files, tasks=tuple(env("TASK").split()),
        task_data=task_data(env("TASK").split(), env("TASK_DATA_PATH").split()),
        mini=args.mini or "zero" in args.stages,
    )  # fmt: skip
    if "reason" in {*run.stages} - {*args.stages, args.only} and has_no_reasoning(run):
        logger.info("skipping reason: minimind-3 learns reasoning from the full_sft data and has no reason stage")
        run = replace(run, stages=tuple(name for name in run.stages if name != "reason"))
    return run


def task_data(tasks: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
    """Return the data of evaluation tasks: absolute paths, and names of tool-calling cases."""
    pairs = itertools.zip_longest(tasks[: len(words)], words, fillvalue="")
    return tuple(word if names_cases(task, word) else _absolute(word) for task, word in pairs)


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path else ""


def _pair(word: str) -> tuple[str, Path]:
    kind, _, file = word.partition("=")
    if kind not in DATA or not file:
        raise UserError(f"--data {word}: expected KIND=FILE, with KIND one of {', '.join(DATA)}")
    return kind, Path(file).absolute()


def chosen(args: argparse.Namespace) -> list[str]:
    """Return the stages of a run: presets expanded, then limited by --from, --until and --only.

    Raises:
        UserError: a stage does not exist, or was not requested.
    """
    stages = expand([*args.stages, *([args.only] if args.only and not args.stages else [])])
    for flag, name in {"--from": args.first, "--until": args.until, "--only": args.only}.items():
        if name and name not in stages:
            raise UserError(f"{flag} {name}: this stage is not among the stages of the run: {' '.join(stages)}")
    if args.first:
        stages = stages[stages.index(args.first) :]
    if args.until:
        if args.until not in stages:
            raise UserError(f"--until {args.until} comes before --from {args.first}: nothing is left to run")
        stages = stages[: stages.index(args.until) + 1]
    if args.only:
        stages = [args.only]
    if args.sample and "download" not in stages and stages != ["web"]:
        stages.insert(0, "download")  # makes the sample data
    return stages


@contextlib.contextmanager
def _named(stage: str) -> Iterator[None]:
    began = time.monotonic()
    logger.info(f"\n== {stage}")
    yield
    logger.info(f"== {stage}: {time.monotonic() - began:.0f} s")


def run_stage(run: Run, stage: str, args: argparse.Namespace) -> int:
    """Run the unfinished jobs of a stage. Return the exit status. A `UserError` is logged."""
    try:
        kind = KIND.get(stage, stage)
        if not run.sample and len(DATA.get(kind, ())) > 1:
            logger.info(f"data: {run.data_file(stage)}")
        if stage == "build":
            logger.info("skipped: only --docker needs an image")
        elif stage == "vllm":
            serving.serve(run, docker.kind_of_host(args.dry_run) if args.docker else "", args.dry_run)
        elif stage == "web" and not (args.dry_run and "vllm" in run.stages):
            serving.page(run)
        for job in STAGES[stage](run):
            if stage == "download":
                require_download(run, job)
            if status := dry_run(run, stage, job) if args.dry_run else run_job(run, job):
                return status
    except UserError as error:
        logger.error(error)
        return 1
    return 0


def run_job(run: Run, job: Job) -> int:
    """Run a job unless it is finished. Return the exit status of the command that failed, or 0."""
    record = run.records.expected(job)
    if run.records.is_done(job, record):
        logger.info(f"finished before: {job.folder or job.name}")
        return 0
    if job.folder and not run.records.agrees(job, record) and (old := set_aside(job.folder)):
        logger.info(f"{job.folder} was made with other inputs or settings; it is kept as {old.name}")
    seconds = run.records.seconds(job) if run.records.agrees(job, record) else 0.0
    record |= {"version": minimind_mcore.__version__}  # for information: a new version does not repeat a job
    processes = launcher.processes() * hosts.read(os.environ).count
    record |= {"seconds": seconds, "processes": processes, "began": time.time(), "finished": False}
    run.records.write(job.name, record)
    began = time.monotonic()
    status = 0
    for command in job.commands:
        if status := wait_for([*CLI, *command.words], command.settings):
            break
    record["seconds"] += time.monotonic() - began
    del record["began"]
    if status:
        run.records.write(job.name, record)
    else:
        run.records.finish(job, record)
    return status


def require_inputs(run: Run, stage: str, job: Job) -> None:
    """Check that the inputs of a job exist, or that an earlier stage of the run makes them.

    Raises:
        UserError: weights or a file will be missing.
    """
    earlier = run.before(stage)
    for name in job.begins:
        # A finished job does not read the weights again, so they may have been deleted since.
        there = _has_files(run.checkpoints(name)) or run.records.finished(job.name)
        if name not in earlier and not (run.records.finished(name) and there):
            raise unfinished(job, name)
    made = {path for name in earlier for before in STAGES[name](run) for path in before.outputs}
    for path in job.inputs.values():
        if not path.exists() and path not in made:
            raise UserError(
                f"{job.name} reads {path}, which does not exist and which no earlier stage of this run makes. Add the "
                "stage download or tokenizer, or give another path (--data, --teacher, --reward-model, TOKENIZER_PATH, "
                "TASK_DATA_PATH)"
            )


def require_download(run: Run, job: Job) -> None:
    """Check that the downloads of a run can start. Sample data needs no download.

    Raises:
        UserError: DATA_DIR cannot be written, the disk has too little space, or no client of a hub is installed.
    """
    if run.sample:
        return
    require_writable(run.data, "give another directory with DATA_DIR")
    named = [command.words[1:3] for command in job.commands]
    download.require_space(run.data, {name: find(what, name) for what, name in named})
    download.choose("auto")


def require_space(run: Run, stage: str) -> None:
    """Check that the disk has space for one checkpoint of this training and of each earlier one of the run.

    Raises:
        UserError: the disk has too little free space.
    """
    if stage not in (*TRAININGS, *RL):
        return
    # LoRA's checkpoints are small. A stage that has a checkpoint is left out, because it may have only a little to do.
    stages = [name for name in (*run.before(stage), stage) if name in (*TRAININGS, *RL) and name != "lora"]
    stages = [name for name in stages if not run.records.finished(name) and not _has_files(run.checkpoints(name))]
    # Weights and Adam's moments in fp32.
    needed, free = 12 * find_model(run.model).num_parameters() * len(stages), free_bytes(run.output)
    if needed > free:
        raise UserError(
            f"{run.output}: the checkpoints of {', '.join(stages)} need at least {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; free some space, or give another directory with OUTPUT_DIR"
        )


def require_tasks(run: Run) -> None:
    """Check the settings of the stage eval. A sample run has its own task.

    Raises:
        UserError: TASK has an unknown name, TASK_DATA_PATH has another number of paths, or HARNESS is not installed.
    """
    if not (env("HARNESS") or run.tasks or run.task_data):
        return
    from minimind_mcore.inference.evaluation import paired, require_harness

    if env("HARNESS"):
        require_harness()
    if not run.sample:
        with naming("TASK, TASK_DATA_PATH"):
            paired(run.tasks, run.task_data)


def require_conversion(run: Run) -> None:
    """Check the settings of the stage convert.

    Raises:
        UserError: FORMAT, PAD_HEAD_DIM or MERGE has a value that the model or another stage does not allow.
    """
    if run.weight == "lora" and choice("MERGE", "1", "0", "1") == "0" and "vllm" in run.stages:
        raise UserError("MERGE=0 writes an adapter, which the stage vllm cannot serve; unset MERGE, or leave out vllm")
    form = choice("FORMAT", "hf", "hf", "minimind")
    if not env("PAD_HEAD_DIM") or run.weight == "lora":  # the conversion of LoRA weights does not read the setting
        return
    padded_config(find_model(run.model), size := count("PAD_HEAD_DIM", 1))
    if form != "hf":
        raise UserError(
            f"FORMAT={form} with PAD_HEAD_DIM={size}: only FORMAT=hf can have padded heads; unset one setting"
        )


def dry_run(run: Run, stage: str, job: Job) -> int:
    """Print the commands of a job, and run each command that supports --dry-run. Return the exit status."""
    require_inputs(run, stage, job)
    for command in job.commands:
        settings = [f"{name}={shlex.quote(value)}" for name, value in command.settings.items() if value]
        print("+", *settings, shlex.join(["minimind-mcore", *command.words]), flush=True)
        kind, pending = command.words[0], _pending(command)
        if kind == "rl":
            loads = (word.partition("=")[2] for word in command.words if word.startswith("actor_config.load="))
            pending = [] if all(Path(folder).exists() for folder in loads) else ["--data-pending"]
        has_dry_run = kind in (*DRY_RUN, "rl") or (kind == "evaluate" and not pending)
        if has_dry_run and (status := wait_for([*CLI, *command.words, "--dry-run", *pending], command.settings)):
            return status
    return 0


def _has_files(folder: str) -> bool:
    return any(path.is_file() for path in Path(folder).rglob("*"))


def _pending(command: Command) -> list[str]:
    """Return the dry-run flags for inputs that an earlier stage has not made yet."""
    data, tokenizer = (command.settings.get(name, "") for name in ("DATA_PATH", "TOKENIZER_PATH"))
    there = (Path(data).exists() or datasets_at(data)) and Path(tokenizer, "tokenizer.json").exists()
    begins = [command.settings.get(name) for name in ("CKPT_LOAD_DIR", "LOAD_DIR", "LORA_DIR")]
    weights = all(_has_files(folder) for folder in begins if folder)
    return [*([] if there else ["--data-pending"]), *([] if weights else ["--weights-pending"])]


def repeat_command(run: Run, args: argparse.Namespace, stage: str) -> str:
    """Return the command that repeats a stage, with the environment variables that it needs.

    `download` needs all stages of the run to know which data to get. The stage "" stands for all stages of the run.
    """
    values = {name: os.environ[name] for name in (*docker.PASSED, *HOSTS, *PATHS) if os.environ.get(name)}
    values |= {name: os.path.abspath(values[name]) for name in PATHS if name in values}
    if run.task_data and not re.search(r"\s", "".join(run.task_data)):  # the setting is split at white space
        values["TASK_DATA_PATH"] = " ".join(run.task_data)
    script = CHECKOUT / "examples/run_all.sh"
    if script.is_file() and args.docker:  # the script needs CANN on an Ascend host
        values["PYTHONPATH"], program = str(CHECKOUT), [*CLI, "run"]
    elif script.is_file():  # the script works in any directory and uses this checkout
        values["PYTHON"], program = sys.executable, ["bash", str(script)]
    else:
        program = [*CLI, "run"]
    words = [*program, *(run.stages if stage in ("", "download") else ("--only", stage))]
    words += [f"--{name.replace('_', '-')}" for name in ("docker", "dry_run") if getattr(args, name)]
    words += options_of(run)
    # Only the value is quoted: a shell takes a quoted NAME=value for the name of a program.
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in values.items()), shlex.join(words)])


def options_of(run: Run) -> list[str]:
    """Return the options of a run except those that select stages. Paths are absolute."""
    words = [*(["--sample"] if run.sample else []), *(["--mini"] if run.mini else [])]
    for name in ("model", "recipe", "weight", "teacher", "reward_model", "port"):
        if value := getattr(run, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words + [word for kind, file in run.files.items() for word in ("--data", f"{kind}={file}")]


def judge(run: Run) -> int:
    """Print the accuracy on unseen sums in a sample run. Return 1 if the accuracy is below LEAST."""
    if not run.sample or "eval" not in run.stages or not run.records.finished("eval-full_sft"):
        return 0
    expected, found = least(), addition_accuracy(run, "full_sft")
    print(f"unseen sums {found:.1%} right, expected {expected:.0%} or more")
    return int(found < expected)


def least() -> float:
    """Return LEAST, the share of unseen sums that the model of the sample run must answer correctly.

    Raises:
        UserError: LEAST is not a number from 0 to 1.
    """
    text = env("LEAST", "0")
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise UserError(f"LEAST={text}: expected a number from 0 to 1")
    return found

"""minimind-mcore run STAGE|PRESET...: the stages from data to a served model, each by the kit's own command.

    minimind-mcore run --sample all serve           # everything with sample data, on a CPU, in minutes
    minimind-mcore run --dry-run zero               # check every stage and start nothing
    minimind-mcore run zero                         # MiniMind-3 from downloads to scores
    minimind-mcore run --model minimind2 --data reason=FILE --from dpo all

A finished stage is skipped if its inputs, settings and outputs are the same, which digests decide. An interrupted stage
continues from its checkpoint: give the same command again. The first failure ends the run. The settings of
`minimind-mcore pretrain --help` (EPOCHS, MBS, TP, ...) apply to every training of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import minimind_mcore
from minimind_mcore.cli import place, quickstart
from minimind_mcore.cli.settings import CLI, env, wait_for
from minimind_mcore.errors import UserError
from minimind_mcore.models.presets import is_path
from minimind_mcore.paths import default_outputs
from minimind_mcore.pipeline import docker, download, report, sample, serving
from minimind_mcore.pipeline.job import SETTINGS, Command, Job, Records, unfinished
from minimind_mcore.pipeline.stages import (
    DATA,
    PRESETS,
    RL,
    STAGES,
    TRAININGS,
    Run,
    addition_accuracy,
    expand,
    has_no_reasoning,
)
from minimind_mcore.pipeline.tables import find
from minimind_mcore.preprocess.check import datasets_at
from minimind_mcore.storage import set_aside

logger = logging.getLogger(__name__)

DRY_RUN = {"pretrain", "sft", "lora", "dpo", "reason", "distill"}  # commands whose dry run checks everything


def main(argv: Sequence[str]) -> int:
    """Run the stages of a command line. Return the exit status."""
    args = parse(argv)
    run = make_run(args)
    logger.info(f"stages: {' '.join(run.stages)}")
    kind = docker.kind_of_host(args.dry_run) if args.docker else ""
    stages = run.stages
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
    if not kind and any(run.records.finished(name) for name in TRAININGS):
        report.write(run)
    return judge(run)


def failed(run: Run, args: argparse.Namespace, stage: str, status: int) -> int:
    """Print that a stage, or the container (stage ""), failed, and the command that repeats it. Return the status."""
    what, repeat = f"the stage {stage}" if stage else "the run", shlex.join(repeat_command(run, args, stage))
    logger.error(f"{what} failed with exit status {status}. To repeat it:\n  {repeat}")
    return status


def before_container(run: Run, kind: str, args: argparse.Namespace) -> int:
    """Download on the host, build the image, and run the stages in a container. Return the exit status."""
    docker.mounted(run)  # a missing file shows before the image is built
    inside = [name for name in run.stages if name not in docker.OUTSIDE]
    if "download" in run.stages and not run.sample and (status := run_stage(run, "download", args)):
        return status
    if status := docker.build(kind, args.dry_run):
        return status
    return docker.run_inside(run, kind, options_of(run), inside, args.dry_run) if inside else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; see `main`."""
    raw = argparse.RawDescriptionHelpFormatter
    presets = "\n".join(f"  {name:<6}{stages}" for name, stages in PRESETS.items())
    epilog = f"stages: {' '.join(STAGES)}\npresets:\n{presets}"
    parser = argparse.ArgumentParser(prog="minimind-mcore run", description=__doc__, epilog=epilog, formatter_class=raw)
    parser.add_argument("stages", nargs="*", metavar="STAGE|PRESET", help="run in this order, each stage once")
    parser.add_argument("--model", help="a preset or a config.json (default: MODEL, else minimind3)")
    parser.add_argument("--recipe", choices=("minimind2", "minimind3", "tiny"), help="generation of the recipes")
    parser.add_argument("--sample", action="store_true", help="sample data and a tiny model, for minutes of a CPU")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="leave out the stages before this one")
    parser.add_argument("--until", metavar="STAGE", help="leave out the stages after this one")
    parser.add_argument("--only", metavar="STAGE", help="run this stage alone")
    parser.add_argument(
        "--data", action="append", default=[], metavar="KIND=FILE", help=f"data file; KIND: {', '.join(DATA)}"
    )
    parser.add_argument("--weight", default="full_sft", metavar="STAGE", help="convert and serve this stage's weights")
    parser.add_argument("--teacher", default="", help="distillation: checkpoints or a Hugging Face directory")
    parser.add_argument("--reward-model", default="", help="ppo, grpo, spo: directory of the reward model")
    parser.add_argument("--port", type=int, default=int(env("PORT", "8998")), help="of the server (default: 8998)")
    parser.add_argument("--docker", action="store_true", help="run in the image of this host's device")
    parser.add_argument("--dry-run", action="store_true", help="check every stage and run nothing")
    parser.add_argument("--resume", action="store_true", help="accepted; a run always continues")
    return parser.parse_args(argv)


def make_run(args: argparse.Namespace) -> Run:
    """Return what a command line asks for.

    Raises:
        UserError: a stage, a kind of data or a model does not exist.
    """
    root = default_outputs()
    if args.sample:
        os.environ["DEVICE"] = env("DEVICE", "cpu")
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
        raise UserError(f"--weight {args.weight}: expected a stage that trains: {', '.join((*TRAININGS, *RL))}")
    tokenizer = Path(given).absolute() if (given := env("TOKENIZER_PATH")) and not args.sample else None
    records = Records(output / "records", {"$OUTPUT": output, "$DATA": data, "$KIT": root})
    run = Run(
        model=model, recipe=args.recipe or "", output=output, data=data, tokenizer=tokenizer, sample=args.sample,
        weight=args.weight, teacher=_absolute(args.teacher), reward_model=_absolute(args.reward_model), port=args.port,
        stages=tuple(chosen(args)), records=records, files=files,
    )  # fmt: skip
    if "reason" in {*run.stages} - {*args.stages, args.only} and has_no_reasoning(run):
        logger.info("without reason: minimind-3 has no stage of reasoning; its data for full_sft has the thoughts")
        run = replace(run, stages=tuple(name for name in run.stages if name != "reason"))
    return run


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path else ""


def _pair(word: str) -> tuple[str, Path]:
    kind, equals, file = word.partition("=")
    if kind not in DATA or not equals:
        raise UserError(f"--data {word}: expected KIND=FILE, with KIND one of {', '.join(DATA)}")
    return kind, Path(file).absolute()


def chosen(args: argparse.Namespace) -> list[str]:
    """Return the stages of a run: the expanded words, cut by --from, --until and --only.

    Raises:
        UserError: a stage does not exist, or is not among the words.
    """
    stages = expand([*args.stages, *([args.only] if args.only and not args.stages else [])])
    for flag, name in {"--from": args.first, "--until": args.until, "--only": args.only}.items():
        if name and name not in stages:
            raise UserError(f"{flag} {name}: this stage is not among {' '.join(stages)}")
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
    """Run a stage, or what of it is not finished. Return its exit status; an error is printed."""
    try:
        if stage == "build":
            logger.info("skipped: native runs need no image; --docker builds it")
        elif stage == "vllm":
            serving.serve(run, docker.kind_of_host(args.dry_run) if args.docker else "", args.dry_run)
        elif stage == "web" and not (args.dry_run and "vllm" in run.stages):
            serving.page(run)
        for job in STAGES[stage](run):
            if status := dry_run(run, stage, job) if args.dry_run else run_job(run, job):
                return status
    except UserError as error:
        logger.error(error)
        return 1
    return 0


def run_job(run: Run, job: Job) -> int:
    """Run a job, unless it is finished. Return the exit status of the command that failed, or 0."""
    record = run.records.expected(job)
    if run.records.is_done(job, record):
        logger.info(f"finished before: {job.folder or job.name}")
        return 0
    if job.folder and not run.records.agrees(job, record) and (old := set_aside(job.folder)):
        logger.info(f"{job.folder} is of other inputs or settings; it is kept as {old.name}")
    before = run.records.read(job.name) if run.records.agrees(job, record) else {}
    record |= {"version": minimind_mcore.__version__}  # of interest, but another one repeats nothing
    record |= {"seconds": before.get("seconds", 0.0), "processes": place.processes(), "finished": False}
    run.records.write(job.name, record)
    began = time.monotonic()
    status = 0
    for command in job.commands:
        if status := wait_for([*CLI, *command.words], command.settings):
            break
    record["seconds"] += time.monotonic() - began
    if status:
        run.records.write(job.name, record)
    else:
        run.records.finish(job, record)
    return status


def require_inputs(run: Run, stage: str, job: Job) -> None:
    """Check for a dry run that what a job reads is there, or is made by an earlier stage of the run.

    Raises:
        UserError: weights or a file will be missing.
    """
    earlier = run.before(stage)
    for name in job.begins:
        if name not in earlier and not (run.records.finished(name) and _has_files(run.checkpoints(name))):
            raise unfinished(job, name)
    made = {path for name in earlier for before in STAGES[name](run) for path in before.outputs}
    for path in job.inputs.values():
        if not path.exists() and path not in made:
            raise UserError(
                f"{job.name} reads {path}, which does not exist and which no earlier stage of this run makes; add the "
                "stage download or tokenizer, or give another path (--data, --teacher, --reward-model, TOKENIZER_PATH, "
                "TASK_DATA_PATH)"
            )


def dry_run(run: Run, stage: str, job: Job) -> int:
    """Print the commands of a job, and run the dry run of those that have one. Return an exit status."""
    require_inputs(run, stage, job)
    for command in job.commands:
        settings = [f"{name}={shlex.quote(value)}" for name, value in command.settings.items() if value]
        print("+", *settings, shlex.join(["minimind-mcore", *command.words]), flush=True)
        status, kind = 0, command.words[0]
        if kind in DRY_RUN:
            status = wait_for([*CLI, *command.words, "--dry-run", *_pending(command)], command.settings)
        elif kind == "rl":
            there = not job.begins or run.folder(job.begins[0]).exists()
            status = wait_for(
                [*CLI, *command.words, "--dry-run", *([] if there else ["--data-pending"])], command.settings
            )
        elif kind == "evaluate" and not _pending(command):
            status = wait_for([*CLI, *command.words, "--dry-run"], command.settings)
        elif kind == "download":
            _, what, name = command.words
            download.require_space(run.data, find(what, name), name)
        if status:
            return status
    return 0


def _has_files(folder: str) -> bool:
    return any(path.is_file() for path in Path(folder).rglob("*"))


def _pending(command: Command) -> list[str]:
    """Return the flags of a dry run that say which inputs earlier stages have yet to make."""
    data, tokenizer = (command.settings.get(name, "") for name in ("DATA_PATH", "TOKENIZER_PATH"))
    there = (Path(data).exists() or datasets_at(data)) and Path(tokenizer, "tokenizer.json").exists()
    begins = [command.settings.get(name) for name in ("CKPT_LOAD_DIR", "LOAD_DIR", "LORA_DIR")]
    weights = all(_has_files(folder) for folder in begins if folder)
    return [*([] if there else ["--data-pending"]), *([] if weights else ["--weights-pending"])]


def repeat_command(run: Run, args: argparse.Namespace, stage: str) -> list[str]:
    """Return the command that repeats a stage, with the settings of the environment that it needs.

    A download needs to know all stages of the run, and the stages of a container (stage "") run together.
    """
    names = (*SETTINGS, *sample.SETTINGS, "OUTPUT_DIR", "DATA_DIR", "TOKENIZER_PATH", "LEAST")
    words = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    words += [*(["minimind-mcore"] if shutil.which("minimind-mcore") else CLI), "run"]
    words += run.stages if stage in ("", "download") else ("--only", stage)
    return [*words, *(["--docker"] if args.docker else []), *options_of(run)]


def options_of(run: Run) -> list[str]:
    """Return the options of a run that say what it is about, and not which stages it has. Paths are absolute."""
    words = ["--sample"] if run.sample else []
    for name in ("model", "recipe", "weight", "teacher", "reward_model", "port"):
        if value := getattr(run, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words + [word for kind, file in run.files.items() for word in ("--data", f"{kind}={file}")]


def judge(run: Run) -> int:
    """Print how many unseen sums the sample run's model answers correctly. Return 1 if fewer than LEAST are right."""
    if not run.sample or "eval" not in run.stages or not run.records.finished("eval-full_sft"):
        return 0
    least, found = float(env("LEAST", "0")), addition_accuracy(run, "full_sft")
    print(f"unseen sums {found:.1%} right, expected {least:.0%} or more")
    return int(found < least)

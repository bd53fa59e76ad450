"""The sample run: generated data, and settings with which a tiny model learns the data in minutes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.cli import launcher, quickstart
from minimind_mcore.cli.data import MATH_SFT, PROBLEMS
from minimind_mcore.cli.settings import count
from minimind_mcore.pipeline.job import TRAINING, Command, Job

FILES = {
    "pretrain": "drills.jsonl", "full_sft": "dialogues.jsonl", "lora": "dialogues.jsonl", "dpo": "preferences.jsonl",
    "reason": "thoughts.jsonl", "toolcall": "tools.jsonl", "rl": "math.jsonl",
}  # fmt: skip
MATH_SFT_STAGE = "math_sft"  # the fine-tuning from which reinforcement learning on sample problems begins
ITERATIONS = {
    "pretrain": 2000, "full_sft": 1000, "lora": 200, "dpo": 60, "reason": 300, "toolcall": 1000, "distillation": 300,
    MATH_SFT_STAGE: quickstart.MATH_SFT_ITERATIONS,
}  # fmt: skip
SETTINGS = ("QUICKSTART_PRETRAIN_ITERS", "QUICKSTART_SFT_ITERS")  # override TRAIN_ITERS for one stage


def data_job(folder: Path) -> Job:
    """Return the job that makes all sample data, the test questions and a tokenizer."""
    corpus = ("corpus", "--seed", "42", "--output")
    text, tokenizer = folder / "sample.jsonl", folder / "tokenizer"
    made = {
        "drills.jsonl": ("--kind", "drills"),
        "dialogues.jsonl": ("--kind", "sft", "--held-out", str(folder / "questions.jsonl")),
        "preferences.jsonl": ("--kind", "dpo"),
        "thoughts.jsonl": ("--kind", "reason"),
        "tools.jsonl": ("--kind", "tools", "--held-out", str(folder / "tool_cases.jsonl")),
    }
    commands = [Command((*corpus, str(text)))]
    commands += [Command((*corpus, str(folder / name), *words)) for name, words in made.items()]
    # One token per digit lets a tiny model learn digit-wise addition.
    commands.append(Command(("tokenizer", "--input", str(text), "--output", str(tokenizer), "--split-digits")))
    names = ("questions.jsonl", "tokenizer/tokenizer.json")
    outputs = tuple(folder / name for name in (*made, *names))
    return Job(name="download", commands=tuple(commands), outputs=outputs)


def iterations_of(stage: str) -> int:
    """Return the iterations of a training: a QUICKSTART_* setting, else TRAIN_ITERS, else the default."""
    iterations = count("TRAIN_ITERS", ITERATIONS[stage])
    if stage == "pretrain":
        return count("QUICKSTART_PRETRAIN_ITERS", iterations)
    return count("QUICKSTART_SFT_ITERS", iterations) if stage == "full_sft" else iterations


def training(data: Path, stage: str) -> tuple[tuple[Command, ...], dict[str, str], list[str]]:
    """Return the commands that run before a training of the sample run, its settings, and its flags."""
    iterations = iterations_of(stage)
    settings = {**quickstart.sizes(launcher.processes()), "TRAIN_ITERS": str(iterations), "SAVE_INTERVAL": "250"}
    flags = quickstart.schedule(iterations)
    if stage == "pretrain":
        return (), settings, flags
    raw = data / FILES["full_sft" if stage == "distillation" else stage]
    prefix, packed = str(raw.with_suffix("")), ("--pack", "--neat-pack")
    if stage == "dpo":
        settings |= {"LR": "1e-5"}
    else:
        settings |= {"PACK": "1"}
    if stage == "toolcall":
        settings |= {**quickstart.sizes(launcher.processes(), 4), "SEQ_LENGTH": "1024"}
    elif stage in ("lora", "reason", "distillation"):
        settings |= {"LR": "1e-3"}
    kind = "dpo" if stage == "dpo" else "sft"
    convert = Command(
        ("data", kind, *(packed if kind == "sft" else ()), *quickstart.FORM),
        {"DATA_PATH": str(raw), "OUTPUT_PREFIX": prefix, "TOKENIZER_PATH": str(data / "tokenizer"),
         "SEQ_LENGTH": settings["SEQ_LENGTH"], "DATA_DIR": str(data)},
    )  # fmt: skip
    return (convert,), {**settings, "DATA_PATH": prefix}, flags


def problems(data: Path, full_sft: str, folder: Path) -> Job:
    """Return the job that makes the sample problems, and fine-tunes a model on wrong answers to them.

    Args:
        data: directory of the data files.
        full_sft: checkpoints with which the training begins.
        folder: directory of the job. `hf` in it has the model for a rollout engine.
    """
    tokenizer, checkpoints, iterations = str(data / "tokenizer"), folder / "checkpoints", iterations_of(MATH_SFT_STAGE)
    here = {"DATA_DIR": str(data), "TOKENIZER_PATH": tokenizer}
    tuning = {
        **here, **quickstart.math_sft(launcher.processes(), iterations), "BACKEND": "native",
        "DATA_PATH": str(data / MATH_SFT), "CKPT_LOAD_DIR": full_sft, "OUTPUT_DIR": str(folder),
    }  # fmt: skip
    export = {"LOAD_DIR": str(checkpoints), "SAVE_DIR": str(folder / "hf"), "TOKENIZER_PATH": tokenizer}
    commands = (
        Command(("data", PROBLEMS), here),
        Command(("sft", *quickstart.schedule(iterations)), tuning),
        Command(("convert", "mcore2hf"), export),
    )
    return Job(
        name=folder.name, commands=commands, inputs={"tokenizer": data / "tokenizer/tokenizer.json"},
        begins=("full_sft",), folder=folder, trains=True, settings=TRAINING,
    )  # fmt: skip


def problem_overrides(data: Path, folder: Path, roles: Sequence[str]) -> list[str]:
    """Return the overrides with which reinforcement learning begins with the results of `problems`."""
    return [
        f"megatron_training.data_path={data / PROBLEMS}",
        f"megatron_training.tokenizer_name_or_path={folder / 'hf'}",
        "minimind.eval_interval=20",
        *(f"{role}_config.load={folder / 'checkpoints'}" for role in roles),
    ]

"""From nothing to a chat that answers questions it has never seen, on a CPU: data, pretraining, fine-tuning, scores."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimind_mcore.cli import data, place
from minimind_mcore.cli.settings import CLI, env, help_of, path, wait_for
from minimind_mcore.errors import UserError
from minimind_mcore.paths import default_outputs

BATCH = 8  # sequences of an update, in one micro-batch of each process
SCHEDULE = ("--lr-warmup-iters", "50", "--adam-beta2", "0.99")


def sizes(processes: int) -> dict[str, str]:
    """Return the settings of a training of the tiny model in the quickstart."""
    return {
        "MODEL": "minimind3_tiny", "TP": "1", "SEQ_LENGTH": "256", "GBS": str(BATCH), "MBS": str(BATCH // processes),
        "LR": "3e-3", "LOG_INTERVAL": "50", "EVAL_INTERVAL": "200",
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """minimind-mcore quickstart: train a tiny model to add and to look up, and let it answer unseen questions.

    Settings: QUICKSTART_PRETRAIN_ITERS (2000) and QUICKSTART_SFT_ITERS (1000), OUTPUT_DIR, DATA_DIR, and LEAST, the
    share of the sums that must be right (0.8): with fewer the exit status is 1. What is finished is skipped.
    """
    help_of(argv, main.__doc__)
    os.environ["DEVICE"] = env("DEVICE", "cpu")
    Quickstart().run()


class Quickstart:
    """The stages and their files."""

    def __init__(self) -> None:
        self.data = Path(path("DATA_DIR", default_outputs() / "data/quickstart"))
        output = Path(path("OUTPUT_DIR", default_outputs() / "outputs/quickstart"))
        self.iterations = {
            "pretrain": env("QUICKSTART_PRETRAIN_ITERS", "2000"),
            "sft": env("QUICKSTART_SFT_ITERS", "1000"),
        }
        self.folders = {stage: output / f"{stage}-{number}" for stage, number in self.iterations.items()}
        self.least = float(env("LEAST", "0.8"))
        self.questions, self.tokenizer = self.data / "questions.jsonl", self.data / "tokenizer"
        self.times: list[str] = []
        number = place.processes()
        if BATCH % number:
            raise UserError(f"NPUS_PER_NODE={number}: expected 1, 2, 4 or 8")
        os.environ.update(DATA_DIR=str(self.data), TOKENIZER_PATH=str(self.tokenizer), **sizes(number))

    def run(self) -> None:
        """Run the stages. Exit with status 1 if too few sums are right."""
        pretrained, tuned = self.folders.values()
        dialogues = str(self.data / "dialogues")
        sft = {"DATA_PATH": dialogues, "PACK": "1", "CKPT_LOAD_DIR": f"{pretrained}/checkpoints"}
        with self.stage("data"):
            self.make_data()
        with self.stage("pretraining"):
            self.train("pretrain", {"DATA_PATH": str(self.data / "drills.jsonl")})
        with self.stage("fine-tuning"):
            self.train("sft", sft)
        with self.stage("chat"):
            self.chat()
        with self.stage("marks"):
            scored = {
                "LOAD_DIR": f"{tuned}/checkpoints",
                "TASK": "exact_match",
                "OUTPUT_DIR": str(tuned),
                "BATCH": "100",
            }
            self.call(["evaluate", "--task-data-path", str(self.questions)], **scored)
        tasks = json.loads((tuned / "scores.json").read_text(encoding="utf-8"))["accuracy"]["exact_match"]["subjects"]
        found = tasks["addition"]["accuracy"]
        print("", *self.times, "", sep="\n")
        print(f"losses      {pretrained}/loss.png  {tuned}/loss.png")
        print(f"marks       {tuned}/scores.png  {tuned}/answers.jsonl")
        print(f"the model   {tuned}/checkpoints")
        print(f"unseen sums {found:.1%} right, expected {self.least:.0%} or more")
        sys.exit(found < self.least)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name a stage, and measure how long it takes."""
        began = time.monotonic()
        print(f"\n== {name}", flush=True)
        yield
        self.times.append(f"{name:<12} {time.monotonic() - began:4.0f} s")

    def call(self, command: Sequence[str], **changes: str) -> None:
        """Run a command of the kit with further settings. End the program if it fails."""
        if status := wait_for([*CLI, *command], changes):
            sys.exit(status)

    def make_data(self) -> None:
        """Make text, dialogues, questions and a tokenizer, unless they exist, and convert the dialogues."""
        text, dialogues = self.data / "sample.jsonl", self.data / "dialogues.jsonl"
        corpus, drills = ["corpus", "--seed", "42", "--output"], self.data / "drills.jsonl"
        steps = {
            text: [*corpus, str(text)],
            drills: [*corpus, str(drills), "--kind", "drills"],
            self.questions: [*corpus, str(dialogues), "--kind", "sft", "--held-out", str(self.questions)],
            # One token per digit: the sum of two numbers then follows from few rules.
            self.tokenizer: ["tokenizer", "--input", str(text), "--output", str(self.tokenizer), "--split-digits"],
        }
        data.make(steps, dry=False)
        # In the form in which the chat template asks: without system prompt, with the empty thought.
        packed = ["--pack", "--neat-pack", "--system-ratio", "0", "--empty-think-ratio", "1"]
        self.call(["data", "sft", *packed], DATA_PATH=str(dialogues), OUTPUT_PREFIX=str(self.data / "dialogues"))

    def train(self, stage: str, changes: dict[str, str], command: str = "", *flags: str) -> None:
        """Run a training, unless it is finished. `command` is its command, if not called like the stage."""
        folder, iterations = self.folders[stage], self.iterations[stage]
        tracker = folder / "checkpoints/latest_checkpointed_iteration.txt"
        if tracker.is_file() and tracker.read_text(encoding="utf-8") == iterations:
            print(f"finished before: {tracker.parent}")
            return
        self.call([command or stage, *SCHEDULE, *flags], **changes, OUTPUT_DIR=str(folder), TRAIN_ITERS=iterations)

    def chat(self) -> None:
        """Ask the first unseen sum and the first unseen lookup, as typed into a chat."""
        first: dict[str, str] = {}
        for line in self.questions.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            first.setdefault(record["task"], record["conversations"][0]["content"])
        settings = {"LOAD_DIR": f"{self.folders['sft']}/checkpoints", "TOP_K": "1", "HISTORY_TURNS": "0"}
        typed = "\n".join(first.values())
        subprocess.run([*CLI, "chat"], input=typed, text=True, check=True, env=os.environ | settings)

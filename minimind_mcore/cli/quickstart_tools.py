"""The stage after the quickstart: the tiny model learns to choose a tool and to copy the tool's arguments."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimind_mcore.checkpoint.tracker import read_tracker
from minimind_mcore.cli import data, launcher, quickstart
from minimind_mcore.cli.settings import CLI, count, env, help_of, path, wait_for
from minimind_mcore.errors import UserError
from minimind_mcore.paths import default_outputs

logger = logging.getLogger(__name__)

BATCH = 4  # global batch size
LENGTH = "1024"  # tokens per sequence


def main(argv: Sequence[str]) -> None:
    """minimind-mcore quickstart-tools: teach the quickstart's model to call tools, and score calls with unseen values.

    The stage starts from the fine-tuned checkpoint of the quickstart. Settings: those of the quickstart,
    QUICKSTART_TOOL_ITERS (700), QUICKSTART_TOOL_MORE_ITERS (400, at a lower learning rate), QUICKSTART_TOOL_SEED (42)
    and LEAST (0.8). The exit status is 1 if the share of calls with the right tool and arguments is below LEAST.
    """
    help_of(argv, main.__doc__)
    os.environ["DEVICE"] = env("DEVICE", "cpu")
    ToolStage().run()


class ToolStage:
    """The stage: its settings, directories and steps."""

    def __init__(self) -> None:
        self.data = Path(path("DATA_DIR", default_outputs() / "data/quickstart"))
        output = Path(path("OUTPUT_DIR", default_outputs() / "outputs/quickstart"))
        self.seed = str(count("QUICKSTART_TOOL_SEED", 42))
        self.tuned = output / "full_sft"
        self.iterations = {
            "tools": count("QUICKSTART_TOOL_ITERS", 700), "again": count("QUICKSTART_TOOL_MORE_ITERS", 400)
        }  # fmt: skip
        self.folders = {name: output / f"{name}-{n}-seed{self.seed}" for name, n in self.iterations.items()}
        self.cases = self.data / "tool_cases.jsonl"
        self.least = float(env("LEAST", "0.8"))
        self.times: list[str] = []
        tokenizer = str(self.data / "tokenizer")
        sizes = quickstart.sizes(launcher.processes(), BATCH)
        os.environ.update(sizes, SEQ_LENGTH=LENGTH, DATA_DIR=str(self.data), TOKENIZER_PATH=tokenizer)

    def run(self) -> None:
        """Run the stage, and exit. The status is 1 if too few calls are exact."""
        if not (self.tuned / "checkpoints").is_dir():
            raise UserError(f"{self.tuned}/checkpoints does not exist: run examples/quickstart.sh first")
        dialogues = self.data / "tools"
        with self.stage("data"):
            words = ["corpus", "--kind", "tools", "--output", f"{dialogues}.jsonl"]
            words += ["--held-out", str(self.cases)]
            data.make({self.cases: words}, dry=False)
            self.call(
                ["data", "sft", "--pack", "--neat-pack", *quickstart.FORM],
                DATA_PATH=f"{dialogues}.jsonl",
                OUTPUT_PREFIX=str(dialogues),
            )
        with self.stage("before"):
            before = self.judge(self.tuned)
        with self.stage("training"):
            changes = {"DATA_PATH": str(dialogues), "PACK": "1", "CKPT_LOAD_DIR": f"{self.tuned}/checkpoints"}
            self.train("tools", changes, self.seed)
            changes |= {"CKPT_LOAD_DIR": f"{self.folders['tools']}/checkpoints", "LR": "2e-3"}
            self.train("again", changes, f"{self.seed}1")
        with self.stage("after"):
            after = self.judge(self.folders["again"])
        print("", *self.times, "", sep="\n")
        print(f"the model   {self.folders['again']}/checkpoints")
        print(f"exact calls {before:.1%} before, {after:.1%} after, expected {self.least:.0%} or more")
        sys.exit(after < self.least)

    def judge(self, folder: Path) -> float:
        """Return the share of calls with the right tool and arguments."""
        output = self.folders["tools"] / ("before" if folder == self.tuned else "after")
        settings = {
            "LOAD_DIR": f"{folder}/checkpoints", "OUTPUT_DIR": str(output), "BATCH": "100", "MAX_NEW_TOKENS": "80",
        }  # fmt: skip
        self.call(["evaluate", "--task", "toolcall", "--task-data-path", str(self.cases)], **settings)
        scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
        return float(scores["accuracy"]["toolcall"]["subjects"]["exact"]["accuracy"])

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Log the name of a step, and measure its time."""
        began = time.monotonic()
        logger.info(f"\n== {name}")
        yield
        self.times.append(f"{name:<12} {time.monotonic() - began:4.0f} s")

    def call(self, command: Sequence[str], **changes: str) -> None:
        """Run a command of the kit with changed settings. Exit if the command fails."""
        if status := wait_for([*CLI, *command], changes):
            sys.exit(status)

    def train(self, stage: str, changes: dict[str, str], seed: str) -> None:
        """Run a training, unless it is finished."""
        folder, iterations = self.folders[stage], self.iterations[stage]
        if read_tracker(folder / "checkpoints") == str(iterations):
            logger.info(f"finished before: {folder / 'checkpoints'}")
            return
        flags = [*quickstart.schedule(iterations), "--seed", seed]
        self.call(["sft", *flags], **changes, OUTPUT_DIR=str(folder), TRAIN_ITERS=str(iterations))

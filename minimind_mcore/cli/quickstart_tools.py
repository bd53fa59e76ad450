"""The stage after the quickstart: a tiny model learns to choose a tool and to copy its arguments."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.cli import data
from minimind_mcore.cli.quickstart import Quickstart, sizes
from minimind_mcore.cli.settings import count, env, help_of
from minimind_mcore.errors import UserError

BATCH = 4  # sequences of an update
LENGTH = "1024"


def main(argv: Sequence[str]) -> None:
    """minimind-mcore quickstart-tools: teach the quickstart's model to call tools, and judge calls with unseen values.

    Settings: those of the quickstart, whose fine-tuned checkpoint this stage starts from; QUICKSTART_TOOL_ITERS (1000)
    and QUICKSTART_TOOL_MORE_ITERS (700, at a lower learning rate); QUICKSTART_TOOL_SEED (42); and LEAST, the share of
    the calls whose tool and arguments must be exact (0.8): with fewer the exit status is 1.
    """
    help_of(argv, main.__doc__)
    os.environ["DEVICE"] = env("DEVICE", "cpu")
    ToolStage().run()


class ToolStage(Quickstart):
    """The stage and its files."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = str(count("QUICKSTART_TOOL_SEED", 42))
        self.iterations["tools"] = env("QUICKSTART_TOOL_ITERS", "1000")
        self.tuned = self.folders["sft"]
        self.iterations["again"] = env("QUICKSTART_TOOL_MORE_ITERS", "700")
        for round_name in ("tools", "again"):
            name = f"{round_name}-{self.iterations[round_name]}-seed{self.seed}"
            self.folders[round_name] = self.tuned.parent / name
        self.cases = self.data / "tool_cases.jsonl"
        processes = 8 // int(os.environ["MBS"])
        if BATCH % processes:
            raise UserError(f"NPUS_PER_NODE={processes}: expected 1, 2 or 4")
        micro = str(BATCH // processes)
        os.environ.update(sizes(processes), SEQ_LENGTH=LENGTH, GBS=str(BATCH), MBS=micro)

    def run(self) -> None:
        """Run the stage. Exit with status 1 if too few calls are exact."""
        if not (self.tuned / "checkpoints").is_dir():
            raise UserError(f"{self.tuned}/checkpoints does not exist: run examples/quickstart.sh first")
        dialogues = self.data / "tools"
        with self.stage("data"):
            words = ["corpus", "--kind", "tools", "--output", f"{dialogues}.jsonl", "--held-out", str(self.cases)]
            data.make({self.cases: words}, dry=False)
            packed = ["--pack", "--neat-pack", "--system-ratio", "0", "--empty-think-ratio", "1"]
            self.call(["data", "sft", *packed], DATA_PATH=f"{dialogues}.jsonl", OUTPUT_PREFIX=str(dialogues))
        with self.stage("before"):
            before = self.judge(self.tuned)
        with self.stage("training"):
            changes = {"DATA_PATH": str(dialogues), "PACK": "1", "CKPT_LOAD_DIR": f"{self.tuned}/checkpoints"}
            self.train("tools", changes, "sft", "--seed", self.seed)
            changes |= {"CKPT_LOAD_DIR": f"{self.folders['tools']}/checkpoints", "LR": "2e-3"}
            self.train("again", changes, "sft", "--seed", f"{self.seed}1")
        with self.stage("after"):
            after = self.judge(self.folders["again"])
        print("", *self.times, "", sep="\n")
        print(f"the model   {self.folders['again']}/checkpoints")
        print(f"exact calls {before:.1%} before, {after:.1%} after, expected {self.least:.0%} or more")
        sys.exit(after < self.least)

    def judge(self, folder: Path) -> float:
        """Return the share of calls whose tool and arguments are exact."""
        output = self.folders["tools"] / ("before" if folder == self.tuned else "after")
        settings = {
            "LOAD_DIR": f"{folder}/checkpoints", "TASK": "toolcall", "TASK_DATA_PATH": str(self.cases),
            "OUTPUT_DIR": str(output), "BATCH": "100", "MAX_NEW_TOKENS": "80",
        }  # fmt: skip
        self.call(["evaluate"], **settings)
        scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
        return float(scores["accuracy"]["toolcall"]["subjects"]["exact"]["accuracy"])

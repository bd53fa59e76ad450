"""Metrics of a run, under MindSpeed-RL's names: metrics.jsonl, tensorboard, wandb, swanlab; one short line on screen.

    step 3/60  reward 0.422  len 12  KL 0.0012  loss -0.012  2.1s  1234 tok/s  ETA 2m00s

metrics.jsonl also has names that MindSpeed-RL documents but does not emit (`ALIASES`). `rollout/logp_diff` is the mean
difference between the trainer's and the rollout engine's log-probabilities of the same tokens. Expected is 0 up to
rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import textwrap
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime.batch import Batch
from minimind_mcore.storage import append_line, set_aside, writing
from minimind_mcore.training.config import Loggers
from minimind_mcore.training.metrics import EndForecast, Progress, forget_after, open_sinks, read_history

logger = logging.getLogger(__name__)

OTHER_PLACE = "give another directory with minimind.output_dir"
ALIASES = {
    "grpo/rewards/mean": "grpo/score/mean",
    "grpo/rewards/max": "grpo/score/max",
    "grpo/rewards/min": "grpo/score/min",
    "tokens/p/s": "e2e_tps",
}
Row = dict[str, float]
# Columns of a step's line: short name, candidate metrics (the first that exists is shown), format.
SHOWN = {
    "reward": (("grpo/score/mean",), ".3g"),
    "len": (("response_length/mean",), ".0f"),
    "KL": (("actor/kl_loss", "actor/reward_kl"), ".2g"),
    "loss": (("actor/pg_loss",), ".2g"),
}
# `rollout/logp_diff` with the weights that generated the responses. Differs only under `rl_config.blocking: false`.
SAME_WEIGHTS = "rollout/logp_diff_same_weights"
# Largest allowed mean difference, by `minimind.precision`. In fp32 the implementations differ by about 1e-6.
MOST_DIFFERENT = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}


class Clock:
    """Measures the seconds of each phase of a step, for MindSpeed-RL's `timing/...`."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside the context as the given phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def row(self) -> Row:
        """Return the seconds of all phases, and of the whole step as `timing/all`."""
        phases = {f"timing/{name}": seconds for name, seconds in self.seconds.items()}
        return {"timing/all": time.perf_counter() - self.began, **phases}


def data_metrics(family: str, batch: Batch) -> Row:
    """Return scores and lengths of a step's responses. `family` is "grpo", "dapo" or "ppo"."""
    assert batch.rewards is not None
    columns = {
        f"{family}/score": batch.rewards,
        "response_length": batch.policy_lengths,
        "prompt_length": batch.prompt_lengths,
    }
    found: Row = {}
    for name, values in columns.items():
        x = values.float()
        found |= {f"{name}/mean": x.mean().item(), f"{name}/max": x.max().item(), f"{name}/min": x.min().item()}
    return {**found, "response_length/truncated": (~batch.finished).float().mean().item()}


def lengths_of(batch: Batch) -> tuple[float, float]:
    """Return the tokens of prompts and responses, and their number if every response were as long as the longest."""
    lengths = batch.lengths.float()
    return float(lengths.sum()), float(lengths.max() * len(batch))


def throughput(lengths: tuple[float, float], timing: Row, devices: int, longest: bool) -> Row:
    """Return tokens per second and device, by MindSpeed-RL's formula.

    Args:
        lengths: result of `lengths_of`.
        timing: result of `Clock.row`.
        devices: number of devices that train.
        longest: count every response as long as the longest, as MindSpeed-RL does under `log_max_throughput`.
    """
    tokens = lengths[longest]
    phases = {"e2e_tps": "timing/all", "update_tps": "timing/update", "vllm_tps": "timing/rollout"}
    return {name: tokens / devices / timing[key] for name, key in phases.items() if timing.get(key)}


def difference(batch: Batch, logp: Tensor) -> Row:
    """Return the difference between the trainer's log-probabilities [rows, T] and the rollout engine's."""
    assert batch.rollout_logp is not None
    apart = (logp - batch.rollout_logp)[batch.mask.bool()].abs()
    return {"rollout/logp_diff": apart.mean().item(), "rollout/logp_diff_max": apart.max().item()}


def require_same_model(row: Row, precision: str) -> None:
    """Check that the rollout engine computes the same function as the trainer.

    Args:
        row: metrics of a step.
        precision: `minimind.precision`.

    Raises:
        UserError: the mean difference of the log-probabilities is above the bound, or is not a number.
    """
    name = SAME_WEIGHTS if SAME_WEIGHTS in row else "rollout/logp_diff"
    found, most = row[name], MOST_DIFFERENT[precision]
    if not found <= most:
        raise UserError(
            f"{name}: the log-probabilities of the rollout engine and of the trainer differ by {found:.4g} on "
            f"average with equal weights; expected at most {most:g} in {precision}. The engine does not run the "
            "trainer's model: weights are missing, or computed differently. Nothing of this step is saved. "
            "Try minimind.rollout_engine=transformers, and minimind.weight_check_interval=1"
        )


class Log:
    """Write the metrics of a run to the console, metrics.jsonl and the chosen loggers.

    Args:
        config: configuration of the run.
        iteration: iteration from which the run resumes. Later rows of an earlier run are dropped.
    """

    def __init__(self, config: Config, iteration: int) -> None:
        rl, self.folder = config.rl, Path(config.minimind.output_dir)
        self.steps = config.actor.train_iters
        self.history, self.samples = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        with writing(self.folder, OTHER_PLACE):
            self.folder.mkdir(parents=True, exist_ok=True)
            if iteration == 0:
                set_aside(self.history)
                set_aside(self.samples)
            forget_after(self.history, iteration)
            forget_after(self.samples, iteration)
        board = {"mode": rl.swanlab_mode, "experiment_name": rl.swanlab_exp_name}
        board["logdir"] = rl.swanlab_save_dir or str(self.folder / "swanlab")
        loggers = Loggers(
            tensorboard_dir=str(self.folder / "tensorboard") if rl.use_tensorboard else None,
            use_wandb=rl.use_wandb,
            wandb_project=rl.wandb_project if rl.use_wandb else "",
            wandb_exp_name=rl.wandb_exp_name,
            wandb_save_dir=rl.wandb_save_dir or str(self.folder),
            swanlab_project=(rl.swanlab_project or "minimind") if rl.use_swanlab else "",
            swanlab={name: value for name, value in board.items() if value},
        )
        self.end = EndForecast()
        self.sinks = open_sinks(loggers, dataclasses.asdict(loggers), Progress(iteration), lambda name: f"train/{name}")

    def step(self, iteration: int, row: Row) -> None:
        """Write a step's row, or an evaluation's, and print the most important values in one line."""
        left = None
        if "timing/all" in row:
            self.end.add(row["timing/all"])
            left = self.end.remaining(self.steps - iteration)
        logger.info(line(iteration, self.steps, row, left, shutil.get_terminal_size().columns))
        if left and (text := self.end.announcement(self.steps - iteration)):
            say(text)
        aliases = {alias: row[name] for alias, name in ALIASES.items() if name in row}
        whole = {"iteration": iteration, **row, **aliases, **({} if left is None else {"eta_seconds": left})}
        append_line(self.history, json.dumps(whole), OTHER_PLACE)
        for sink in self.sinks:
            sink(whole)

    def sample(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print some responses of a step as a table, and write them in full to samples.jsonl."""
        logger.info(table(rows, {"reward": 6, "label": 8, "prompt": 24, "response": 36}))
        for row in rows:
            append_line(self.samples, json.dumps({"iteration": iteration, **row}, ensure_ascii=False), OTHER_PLACE)

    def outcome(self) -> str:
        """Return the accuracy before and after the run, if it was evaluated, and the paths of the curves."""
        found = [row["eval/accuracy"] for row in read_history(self.history) if "eval/accuracy" in row]
        change = f"accuracy on held-out questions: {found[0]:.1%} before, {found[-1]:.1%} after\n" if found else ""
        return f"{change}curves: {self.folder}/reward.png, {self.folder}/report.html"

    def close(self) -> None:
        """Flush what the sinks hold."""
        for sink in self.sinks:
            sink(None)


def say(text: str) -> None:
    """Log a message that is not a metric, with the time."""
    logger.info(f"[{_now()}] INFO {text}")


def line(iteration: int, steps: int, row: Row, left: float | None = None, width: int = 80) -> str:
    """Return the most important values of a step, or the metrics of an evaluation, in one line of `width` columns.

    Args:
        iteration: number of the step.
        steps: number of steps of the run.
        row: metrics of the step.
        left: seconds to the end of the run.
        width: columns of the terminal.
    """
    fields = [f"{key} {value:.3g}" for key, value in row.items() if key.startswith("eval/")]
    for name, (keys, form) in SHOWN.items():
        fields += [f"{name} {row[key]:{form}}" for key in keys if key in row][:1]
    if seconds := row.get("timing/all"):
        fields.append(f"{seconds:.{1 if seconds < 100 else 0}f}s")
    if rate := row.get("e2e_tps"):
        fields.append(f"{rate:.0f} tok/s" if rate < 1e4 else f"{rate / 1e3:.0f}k tok/s")
    if left is not None:
        minutes, seconds = divmod(round(left), 60)
        fields.append(f"ETA {minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"ETA {minutes}m{seconds:02}s")
    head = f"{iteration}/{steps}"
    texts = [f"step {'  '.join([head, *fields])}", f"step {' '.join([head, *fields])}", " ".join([head, *fields])]
    return next((text for text in texts if len(text) <= width), textwrap.fill(texts[-1], width))


def _now() -> str:
    return str(datetime.now(tz=timezone.utc)).split(".")[0]


def table(rows: Sequence[Mapping[str, Any]], widths: Mapping[str, int]) -> str:
    """Format rows as a table. A text that is too long for its column is cut in the middle."""
    head = "  ".join(_fit(name, width) for name, width in widths.items())
    lines = ["  ".join(_fit(str(row[name]), width) for name, width in widths.items()) for row in rows]
    return "\n".join(text.rstrip() for text in [head, "-" * _columns(head), *lines])


def _fit(text: str, width: int) -> str:
    text = text.replace("\n", "\\n")
    if _columns(text) > width:
        start, end = _taken(text, width * 2 // 3), _taken(text[::-1], width - width * 2 // 3 - 3)[::-1]
        text = f"{start}...{end}"
    return text + " " * (width - _columns(text))


def _taken(text: str, width: int) -> str:
    taken = ""
    for letter in text:
        if _columns(taken + letter) > width:
            break
        taken += letter
    return taken


def _columns(text: str) -> int:
    """Return the number of terminal columns. Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)

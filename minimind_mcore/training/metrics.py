"""Logging of a run: Megatron's log line, metrics.jsonl, tensorboard, wandb, swanlab.

Only rank 0 prints and writes. The reductions behind a line are collective, so every rank calls `Metrics.record` in
every step.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.platform import device, ranks
from minimind_mcore.storage import append_line, atomic_write_text, set_aside, writing
from minimind_mcore.training import step
from minimind_mcore.training.config import Loggers, TrainConfig
from minimind_mcore.training.job import Job
from minimind_mcore.training.mfu import matmul_rate, mfu

logger = logging.getLogger(__name__)

OTHER_PLACE = "give another directory with --output-dir (OUTPUT_DIR)"


Row = dict[str, float]  # a row of metrics.jsonl, by column name
Sink = Callable[[Row | None], None]  # takes a row, or None to close


@dataclass
class Progress:
    """The position of a run: finished iterations and consumed samples. Stored in every checkpoint."""

    iteration: int = 0
    consumed: int = 0
    skipped: int = 0


def output_dir(config: TrainConfig) -> Path:
    """Return the directory of metrics.jsonl, loss.png and report.html."""
    save = config.checkpoint.save
    return Path(config.logging.output_dir or (Path(save).parent if save else "outputs"))


class EndForecast:
    """Predicts the end of a run from the median step time, which a few slow steps do not affect.

    Attributes:
        AFTER: number of steps of this process before the prediction is announced.
        RECENT: number of measurements that the median uses.
    """

    AFTER, RECENT = 20, 20

    def __init__(self) -> None:
        self.steps, self.announced, self.warm = 0, False, False
        self.recent: deque[float] = deque(maxlen=self.RECENT)

    def add(self, seconds: float, steps: int = 1) -> None:
        """Add a measurement: the mean time of a number of steps."""
        if self.steps and not self.warm:  # the first measurement includes warm-up
            self.recent.clear()
            self.warm = True
        self.recent.append(seconds)
        self.steps += steps

    def remaining(self, steps: int) -> float:
        """Return the predicted seconds of a number of further steps."""
        return statistics.median(self.recent) * steps

    def announcement(self, steps: int) -> str:
        """Return the predicted end of a run with `steps` remaining steps, once; otherwise an empty text."""
        if self.announced or self.steps < self.AFTER or steps <= 0:
            return ""
        self.announced = True
        rest = datetime.timedelta(seconds=round(self.remaining(steps)))
        end = datetime.datetime.now() + rest
        step = f"{statistics.median(self.recent):.3g} s per iteration"
        return f"forecast: the run ends at {end:%Y-%m-%d %H:%M}, in {rest}, at {step} (median of recent steps)"


class Metrics:
    """Collects steps and reports every `--log-interval` of them."""

    def __init__(self, config: TrainConfig, job: Job, progress: Progress) -> None:
        self.config, self.job = config, job
        self.model = config.architecture
        # Measured once, before the first step. A CPU has no MFU, because ranks and programs share its cores.
        self.matmul_rate = matmul_rate(config.precision.params_dtype) if device.current().kind != "cpu" else None
        self.steps: list[step.StepResult] = []
        self.since = time.perf_counter()
        self.end = EndForecast()
        self.sinks: list[Sink] = []
        self.history: Path | None = None
        if ranks.is_main():
            self.history = output_dir(config) / "metrics.jsonl"
            with writing(self.history.parent, OTHER_PLACE):
                self.history.parent.mkdir(parents=True, exist_ok=True)
                if progress.iteration == 0:
                    set_aside(self.history)
                forget_after(self.history, progress.iteration)
            self.sinks = open_sinks(config.logging, vars(config.saved_arguments()), progress)

    def record(self, progress: Progress, result: step.StepResult, lr: float) -> None:
        """Add the result of a finished step. Log a line every --log-interval steps and after the last step."""
        self.steps.append(result)
        config, iteration = self.config, progress.iteration
        if iteration % config.logging.log_interval and iteration != config.schedule.train_iters:
            return
        device.synchronize()
        now = time.perf_counter()
        seconds = (now - self.since) / len(self.steps)
        row = self._row(progress, lr, seconds)
        self.steps, self.since = [], time.perf_counter()
        if ranks.is_main():
            logger.info(self._line(row))
            self._write(row)
            if text := self.end.announcement(config.schedule.train_iters - iteration):
                logger.info(f" {text}")

    def _row(self, progress: Progress, lr: float, seconds: float) -> Row:
        config, last = self.config, self.steps[-1]
        (loss, *metrics), positions = step.averages(config, self.job, self.steps)
        tokens_per_second = positions / (seconds * len(self.steps))
        self.end.add(seconds, len(self.steps))
        row: Row = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed,
            "learning_rate": lr,
            "global_batch_size": config.schedule.global_batch_size,
            "lm_loss": loss,
            **dict(zip(self.job.metrics, metrics, strict=True)),
            **self._aux_losses(),
            "grad_norm": last.grad_norm,
            "skipped_iterations": progress.skipped,
            "seconds_per_iteration": seconds,
            "tokens_per_second": tokens_per_second,
            "eta_seconds": self.end.remaining(config.schedule.train_iters - progress.iteration),
            "memory_bytes": device.peak_memory(),
        }
        if not config.data.variable_seq_lengths:
            row["consumed_tokens"] = progress.consumed * config.data.seq_length
        if last.zeros is not None:
            row["zero_gradients"] = last.zeros
        per_device = tokens_per_second / config.layout.world_size
        length, frozen = config.data.seq_length, bool(config.model.lora_target_modules)
        row["tflops_per_device"] = self.model.flops_per_token(length, frozen) * per_device / 1e12
        if self.matmul_rate is not None:
            row["mfu"] = mfu(self.model, length, per_device, self.matmul_rate, frozen)
        return row

    def _aux_losses(self) -> dict[str, float]:
        if not self.config.model.num_experts:
            return {}
        from minimind_mcore.models.moe import collect_aux_losses

        return collect_aux_losses(self.config.schedule.num_microbatches * len(self.steps))

    def _line(self, row: Row) -> str:
        """Return Megatron's log line, followed by further values."""
        train_iters = self.config.schedule.train_iters
        names = [n for n in row if n in self.job.metrics or (n.endswith("_loss") and n != "lm_loss")]
        stamp = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        parts = [
            f" [{stamp}] iteration {row['iteration']:8d}/{train_iters:8d}",
            f"consumed samples: {row['consumed_samples']:12d}",
            f"elapsed time per iteration (ms): {row['seconds_per_iteration'] * 1e3:.1f}",
            f"learning rate: {row['learning_rate']:.6E}",
            f"global batch size: {row['global_batch_size']:5d}",
            f"lm loss: {row['lm_loss']:.6E}",
            *(f"{name.replace('_', ' ')}: {row[name]:.6E}" for name in names),
            f"grad norm: {row['grad_norm']:.3f}",
            f"number of skipped iterations: {row['skipped_iterations']:3d}",
            "number of nan iterations:   0",  # such an iteration stops the run
            f"tokens/s: {row['tokens_per_second']:.0f}",
            *([f"MFU: {row['mfu']:.1%}"] if "mfu" in row else []),
            f"memory: {row['memory_bytes'] / 2**30:.2f} GiB",
            f"ETA: {datetime.timedelta(seconds=round(row['eta_seconds']))}",
        ]
        return " | ".join(parts) + " |"

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time inside the context from the step times, for an evaluation or a save."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def record_evaluation(self, progress: Progress, loss: float) -> None:
        """Log a validation loss (mean over tokens, nats)."""
        if ranks.is_main():
            logger.info(f" validation loss at iteration {progress.iteration} | lm loss value: {loss:.6E} |")
            self._write({"iteration": progress.iteration, "validation_loss": loss})

    def _write(self, row: Row) -> None:
        assert self.history is not None
        append_line(self.history, json.dumps(row), OTHER_PLACE)
        for sink in self.sinks:
            sink(row)

    def close(self) -> None:
        """Flush and close the sinks."""
        for sink in self.sinks:
            sink(None)


def read_history(path: Path) -> list[Row]:
    """Return the rows of a metrics.jsonl. A line that a kill or a full disk has truncated is dropped."""
    return parse_rows(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []


def parse_rows(text: str) -> list[Row]:
    """Parse the rows of a metrics.jsonl, without damaged lines."""
    rows = []
    for line in text.split("\n"):  # not splitlines(): a sample completion may contain U+2028
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "iteration" in row:
            rows.append(row)
    return rows


def forget_after(path: Path, iteration: int) -> None:
    """Drop the rows that a resumed run will write again, and a truncated last line."""
    kept = [row for row in read_history(path) if row["iteration"] <= iteration]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    # Compare bytes: without the rewrite the next row would be appended to a truncated line, and both would be lost.
    if path.is_file() and path.read_bytes() != text.encode("utf-8"):
        atomic_write_text(path, text)


def open_sinks(
    loggers: Loggers,
    flags: Mapping[str, object],
    progress: Progress,
    tag: Callable[[str], str] = lambda name: name.replace("_", " "),
) -> list[Sink]:
    """Open one sink per requested logger.

    Args:
        loggers: the requested loggers and their destinations.
        flags: flags of the run, shown by wandb and SwanLab.
        progress: position at the start of the run.
        tag: maps column names to tensorboard tags.
    """
    shown = {key: value for key, value in flags.items() if isinstance(value, str | int | float | bool | None)}
    sinks: list[Sink] = []
    if loggers.tensorboard_dir:
        sinks.append(_tensorboard(loggers.tensorboard_dir, progress, tag))
    if loggers.wandb_project or loggers.use_wandb:
        wandb = _import("wandb", "--wandb-project")
        name = loggers.wandb_exp_name or None
        project, folder = loggers.wandb_project or "minimind", loggers.wandb_save_dir or None
        run = wandb.init(project=project, name=name, dir=folder, config=shown)
        sinks.append(lambda row: run.finish() if row is None else run.log(row, step=row["iteration"]))
    if loggers.swanlab_project:
        swanlab = _import("swanlab", "--swanlab-project")
        if folder := loggers.swanlab.get("logdir"):
            Path(folder).mkdir(parents=True, exist_ok=True)
        board = swanlab.init(project=loggers.swanlab_project, config=shown, **loggers.swanlab)
        sinks.append(lambda row: board.finish() if row is None else board.log(row, step=row["iteration"]))
    return sinks


def _import(name: str, flag: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{flag} needs the package {name}, which is not installed: pip install {name}") from error


def _tensorboard(directory: str, progress: Progress, tag: Callable[[str], str]) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    # Drop events after the checkpoint, because their steps are repeated.
    with writing(Path(directory), "give another directory with --tensorboard-dir (LOG_DIR)"):
        writer = SummaryWriter(directory, purge_step=progress.iteration + 1)

    def write(row: Row | None) -> None:
        if row is None:
            writer.close()
            return
        for name, value in row.items():
            if name != "iteration":
                writer.add_scalar(tag(name), value, row["iteration"])

    return write

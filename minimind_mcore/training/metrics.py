"""What a run says about itself: Megatron's log line, metrics.jsonl, tensorboard, wandb, swanlab.

Only rank 0 prints and writes; the reductions behind a line are collective, so every rank calls
`Metrics.record` for every step.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform import device, ranks
from minimind_mcore.storage import append_line, atomic_write_text, writing
from minimind_mcore.training import step
from minimind_mcore.training.job import Job
from minimind_mcore.training.mfu import matmul_rate, mfu

OTHER_PLACE = "give another directory with --output-dir (OUTPUT_DIR)"


@dataclass
class Progress:
    """Where a run is. `iteration` steps are done, `consumed` samples read; both are in every checkpoint."""

    iteration: int = 0
    consumed: int = 0
    skipped: int = 0


def output_dir(args: argparse.Namespace) -> Path:
    """Directory of metrics.jsonl, loss.png and report.html."""
    return Path(args.output_dir or (Path(args.save).parent if args.save else "outputs"))


class Metrics:
    """Collects steps and reports every `--log-interval` of them."""

    def __init__(self, args: argparse.Namespace, job: Job, layout: ParallelLayout, progress: Progress) -> None:
        self.args, self.job, self.layout = args, job, layout
        self.model = ModelConfig.from_args(args)
        # Measured once, before the first step. A CPU's cores are shared between ranks and programs: it has no MFU.
        self.matmul_rate = matmul_rate(args.params_dtype) if device.current().kind != "cpu" else None
        self.steps: list[step.StepResult] = []
        self.since = time.perf_counter()
        self.speed: float | None = None
        self.sinks: list[Any] = []
        self.history: Path | None = None
        if ranks.is_main():
            self.history = output_dir(args) / "metrics.jsonl"
            with writing(self.history.parent, OTHER_PLACE):
                self.history.parent.mkdir(parents=True, exist_ok=True)
                if progress.iteration == 0:
                    set_aside(self.history)
                forget_after(self.history, progress.iteration)
            self.sinks = open_sinks(args, progress)

    def record(self, progress: Progress, result: step.StepResult, lr: float) -> None:
        """Take note of a finished step; report if a line is due."""
        self.steps.append(result)
        if progress.iteration % self.args.log_interval and progress.iteration != self.args.train_iters:
            return
        device.synchronize()
        now = time.perf_counter()
        seconds = (now - self.since) / len(self.steps)
        row = self._row(progress, lr, seconds)
        self.steps, self.since = [], time.perf_counter()
        if ranks.is_main():
            print(self._line(row), flush=True)
            self._write(row)

    def _row(self, progress: Progress, lr: float, seconds: float) -> dict[str, Any]:
        args, last = self.args, self.steps[-1]
        (loss, *metrics), positions = step.averages(args, self.job, self.steps)
        tokens_per_second = positions / (seconds * len(self.steps))
        # The first line includes warm-up; the estimate of the remaining time forgets it quickly.
        self.speed = seconds if self.speed is None else 0.5 * self.speed + 0.5 * seconds
        row: dict[str, Any] = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed,
            "learning_rate": lr,
            "global_batch_size": args.global_batch_size,
            "lm_loss": loss,
            **dict(zip(self.job.metrics, metrics, strict=True)),
            **self._aux_losses(),
            "grad_norm": last.grad_norm,
            "skipped_iterations": progress.skipped,
            "seconds_per_iteration": seconds,
            "tokens_per_second": tokens_per_second,
            "eta_seconds": self.speed * (args.train_iters - progress.iteration),
            "memory_bytes": device.peak_memory(),
        }
        if not args.variable_seq_lengths:
            row["consumed_tokens"] = progress.consumed * args.seq_length
        if last.zeros is not None:
            row["zero_gradients"] = last.zeros
        per_device = tokens_per_second / self.layout.world_size
        row["tflops_per_device"] = self.model.flops_per_token(args.seq_length) * per_device / 1e12
        if self.matmul_rate is not None:
            row["mfu"] = mfu(self.model, args.seq_length, per_device, self.matmul_rate)
        return row

    def _aux_losses(self) -> dict[str, float]:
        if not self.args.num_experts:
            return {}
        from minimind_mcore.models.moe import collect_aux_losses

        return collect_aux_losses(self.args.num_microbatches * len(self.steps))

    def _line(self, row: dict[str, Any]) -> str:
        """Megatron's log line, with what people ask for after it."""
        args = self.args
        names = [n for n in row if n in self.job.metrics or (n.endswith("_loss") and n != "lm_loss")]
        stamp = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        parts = [
            f" [{stamp}] iteration {row['iteration']:8d}/{args.train_iters:8d}",
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
        """Inside, time does not count as training: an evaluation, a save."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def record_evaluation(self, progress: Progress, loss: float) -> None:
        """Report a validation loss (mean over tokens, nats)."""
        if ranks.is_main():
            print(f" validation loss at iteration {progress.iteration} | lm loss value: {loss:.6E} |", flush=True)
            self._write({"iteration": progress.iteration, "validation_loss": loss})

    def _write(self, row: dict[str, Any]) -> None:
        assert self.history is not None
        append_line(self.history, json.dumps(row), OTHER_PLACE)
        for sink in self.sinks:
            sink(row)

    def close(self) -> None:
        """Flush what the sinks hold."""
        for sink in self.sinks:
            sink(None)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; a line that a kill or a full disk has cut off is dropped."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "iteration" in row:
                rows.append(row)
    return rows


def set_aside(path: Path) -> None:
    """Rename the metrics of a former run, which a run from the beginning would otherwise drop."""
    if path.exists():
        numbers = itertools.count(1)
        path.rename(next(p for n in numbers if not (p := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists()))


def forget_after(path: Path, iteration: int) -> None:
    """Drop the rows that a resumed run is about to write again, and a line that is cut off."""
    kept = [row for row in read_history(path) if row["iteration"] <= iteration]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    # The bytes are compared: the next row would be appended to half a line, and both would be lost.
    if path.is_file() and path.read_bytes() != text.encode("utf-8"):
        atomic_write_text(path, text)


def open_sinks(
    args: argparse.Namespace, progress: Progress, tag: Callable[[str], str] = lambda name: name.replace("_", " ")
) -> list[Any]:
    """One callable per requested logger; it takes a row, or None to close. `tag` names columns in tensorboard."""
    sinks: list[Any] = []
    if args.tensorboard_dir:
        sinks.append(_tensorboard(args.tensorboard_dir, progress, tag))
    if args.wandb_project or args.use_wandb:
        wandb = _import("wandb", "--wandb-project")
        name = args.wandb_exp_name or None
        project, folder = args.wandb_project or "minimind", args.wandb_save_dir or None
        run = wandb.init(project=project, name=name, dir=folder, config=_plain(args))
        sinks.append(lambda row: run.finish() if row is None else run.log(row, step=row["iteration"]))
    if args.swanlab_project:
        swanlab = _import("swanlab", "--swanlab-project")
        given = vars(args)  # of these keys MindSpeed-RL's alone has all
        names = {"mode": "swanlab_mode", "experiment_name": "swanlab_exp_name", "logdir": "swanlab_save_dir"}
        options = {name: given[key] for name, key in names.items() if given.get(key)}
        if "logdir" in options:
            Path(options["logdir"]).mkdir(parents=True, exist_ok=True)
        board = swanlab.init(project=args.swanlab_project, config=_plain(args), **options)
        sinks.append(lambda row: board.finish() if row is None else board.log(row, step=row["iteration"]))
    return sinks


def _import(name: str, flag: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{flag} needs the package {name}, which is not installed: pip install {name}") from error


def _tensorboard(directory: str, progress: Progress, tag: Callable[[str], str]) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # Events past the checkpoint belong to steps that are done again.
    with writing(Path(directory), "give another directory with --tensorboard-dir (LOG_DIR)"):
        writer = SummaryWriter(directory, purge_step=progress.iteration + 1)

    def write(row: dict[str, Any] | None) -> None:
        if row is None:
            writer.close()
            return
        for name, value in row.items():
            if name != "iteration":
                writer.add_scalar(tag(name), value, row["iteration"])

    return write


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if isinstance(value, str | int | float | bool | None)}

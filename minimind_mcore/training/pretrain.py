"""The training loop, from the flags to the last checkpoint. Pretraining by default; post-training passes another job.

torchrun --nproc-per-node 2 pretrain_gpt.py --tensor-model-parallel-size 2 ... (see examples/mcore/minimind)
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from minimind_mcore import arguments
from minimind_mcore.platform import device, ranks
from minimind_mcore.training import checkpointing, data, distributed, liveness, report, run_lock, step, summary
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.job import Job
from minimind_mcore.training.metrics import Metrics, Progress, output_dir
from minimind_mcore.training.model import build_model
from minimind_mcore.training.optimizer import build_optimizer, learning_rate
from minimind_mcore.training.stop import StopSignal
from minimind_mcore.validation import validate

logger = logging.getLogger(__name__)

J = TypeVar("J", bound=Job)


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain with the flags of a command line."""
    run(Job, arguments.parse(sys.argv[1:] if argv is None else argv))


def run(kind: type[J], args: argparse.Namespace) -> J | None:
    """Validate the flags, train a job of class `kind`, and return the job. `--dry-run` stops before building the
    model."""
    has_length = bool(args.train_iters or args.train_samples)
    if args.dry_run and args.data_pending and not has_length:
        args.train_iters = 1
    config = kind.check(TrainConfig.from_args(args, validate(args, distributed.world_size())))
    if args.dry_run:
        summary.dry_run(config, kind, has_length)
        return None
    device.setup()
    if config.precision.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    distributed.initialize(config)
    stop = StopSignal()
    watch = liveness.Liveness(config.parallel.distributed_timeout_minutes * 60)
    try:
        ranks.check_on_main(lambda: lock(config))
        distributed.log_to(config.logging.log_file)
        config, router = checkpointing.settle_router_weight(config)
        job = kind(config)
        logger.info(summary.describe(config, job.sequences, router))
        train(config, job, stop, watch)
        stop.leave()
    except Exception as error:
        if not liveness.is_lost_connection(error):
            raise
        watch.give_up(error)
    run_lock.release()
    distributed.finish()
    if stop.exit_status:
        sys.exit(stop.exit_status)
    return job


def lock(config: TrainConfig) -> None:
    """Refuse directories that are not writable, and lock them against a second run."""
    summary.require_writable_outputs(config)
    save = Path(config.checkpoint.save) if config.checkpoint.save else None
    run_lock.take(output_dir(config), save, "give another directory with --output-dir and --save (OUTPUT_DIR)")


def train(config: TrainConfig, job: Job, stop: StopSignal, watch: liveness.Liveness) -> None:
    """Train until `--train-iters`, a signal, or a limit; save, and draw the curves."""
    started = time.monotonic()
    stop.watch_launcher()
    if config.checkpoint.save:
        checkpointing.require_shared_directory(Path(config.checkpoint.save))
    datasets = train_set, valid_set, _ = job.build_datasets()
    assert train_set is not None  # build_datasets refuses a split without training data
    model = build_model(config, job)
    engine = step.Engine(config, model, *build_optimizer(config, model))
    job.begin(engine, datasets)
    progress = checkpointing.load(config, engine)
    batches = [data.micro_batches(config, job, train_set, progress.consumed) for _ in model]
    metrics = Metrics(config, job, progress)
    saved, schedule = progress.iteration, config.schedule

    watch.start()
    while progress.iteration < schedule.train_iters:
        lr = learning_rate(engine.optimizer)
        number = progress.iteration + 1
        result = engine.step(job, batches, schedule.num_microbatches, schedule.global_batch_size, number)
        progress.iteration = number
        progress.consumed += schedule.global_batch_size
        progress.skipped += not result.updated
        metrics.record(progress, result, lr)

        last = number == schedule.train_iters
        if valid_set is not None and schedule.eval_iters and (last or _is_due(number, schedule.eval_interval)):
            with metrics.pause():
                loss = evaluate(config, job, engine, valid_set)
            metrics.record_evaluation(progress, loss)
        stopping = stop.agreed(also=_limit_reached(config, progress, started))
        if config.checkpoint.save and (stopping or _is_due(progress.iteration, config.checkpoint.save_interval)):
            with metrics.pause(), liveness.busy():
                checkpointing.save(config, progress, engine)
            saved = progress.iteration
        if stopping:
            break

    if config.checkpoint.save and saved != progress.iteration:
        with liveness.busy():
            checkpointing.save(config, progress, engine)
    watch.close()
    metrics.close()
    if ranks.is_main():
        report.write_report(
            output_dir(config), f"MiniMind {job.title}, {config.model.num_layers} x {config.model.hidden_size}"
        )
        logger.info(summary.next_steps(config, progress))


def evaluate(config: TrainConfig, job: Job, engine: step.Engine, dataset: data.MapDataset) -> float:
    """Return the mean loss (pretraining: nats per token) of the first `--eval-iters` validation batches."""
    # New iterators without workers for each evaluation: worker processes would cost more than the few batches.
    batches = [data.micro_batches(config, job, dataset, 0, workers=0) for _ in engine.model]
    rounds = min(config.schedule.eval_iters, len(dataset) // config.schedule.global_batch_size)
    return step.averages(config, job, engine.measure(job, batches, config.schedule.num_microbatches, rounds))[0][0]


def _is_due(iteration: int, interval: int | None) -> bool:
    return bool(interval) and iteration % (interval or 1) == 0


def _limit_reached(config: TrainConfig, progress: Progress, started: float) -> bool:
    minutes = (time.monotonic() - started) / 60
    return _is_due(progress.iteration, config.schedule.exit_interval) or (
        config.schedule.exit_duration_in_mins is not None and minutes > config.schedule.exit_duration_in_mins
    )

"""Training: the whole run, from top to bottom. By itself it pretrains; post-training gives it another job.

torchrun --nproc-per-node 2 pretrain_gpt.py --tensor-model-parallel-size 2 ... (see examples/mcore/minimind)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minimind_mcore import arguments
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.platform import device, ranks
from minimind_mcore.training import checkpointing, data, distributed, liveness, plan, report, run_lock, step
from minimind_mcore.training.job import Job
from minimind_mcore.training.layout import validate
from minimind_mcore.training.metrics import Metrics, Progress, output_dir
from minimind_mcore.training.model import build_model
from minimind_mcore.training.optimizer import build_optimizer, learning_rate
from minimind_mcore.training.stop import StopSignal


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain, by the flags of a command line."""
    run(Job(arguments.parse(sys.argv[1:] if argv is None else argv)))


def run(job: Job) -> None:
    """Validate, train. `--dry-run` stops before anything is built."""
    args = job.args
    job.check()
    if args.dry_run:
        plan.show(args, job)
        return
    layout = validate(args, distributed.world_size())
    device.setup()
    if args.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    distributed.initialize(args, layout)
    stop = StopSignal()
    watch = liveness.Liveness(args.distributed_timeout_minutes * 60)
    try:
        ranks.check_on_main(lambda: lock(args))
        distributed.log_to(args.log_file)
        router = checkpointing.settle_router_weight(args)
        if ranks.is_main():
            plan.announce(args, layout, job.sequences, router)
        train(args, job, layout, stop, watch)
        stop.leave()
    except Exception as error:
        if not liveness.is_lost_connection(error):
            raise
        watch.give_up(error)
    run_lock.release()
    distributed.finish()
    if stop.exit_status:
        sys.exit(stop.exit_status)


def lock(args: argparse.Namespace) -> None:
    """Refuse directories that cannot be written, and let no second run write to them."""
    plan.require_places(args)
    save = Path(args.save) if args.save else None
    run_lock.take(output_dir(args), save, "give another directory with --output-dir and --save (OUTPUT_DIR)")


def train(
    args: argparse.Namespace, job: Job, layout: ParallelLayout, stop: StopSignal, watch: liveness.Liveness
) -> None:
    """Train until `--train-iters`, a signal, or a limit; save, and draw the curves."""
    started = time.monotonic()
    stop.watch_launcher()
    if args.save:
        checkpointing.require_shared_directory(Path(args.save))
    datasets = train_set, valid_set, _ = job.build_datasets()
    model = build_model(args, layout, job)
    engine = step.Engine(args, model, *build_optimizer(args, model))
    job.begin(layout, engine, datasets)
    progress = checkpointing.load(args, engine)
    batches = [data.micro_batches(args, job, train_set, progress.consumed) for _ in model]
    metrics = Metrics(args, job, layout, progress)
    saved = progress.iteration

    watch.start()
    while progress.iteration < args.train_iters:
        lr = learning_rate(engine.optimizer)
        result = engine.step(job, batches, args.num_microbatches, args.global_batch_size, progress.iteration + 1)
        progress.iteration += 1
        progress.consumed += args.global_batch_size
        progress.skipped += not result.updated
        metrics.record(progress, result, lr)

        last = progress.iteration == args.train_iters
        if valid_set is not None and args.eval_iters and (last or _is_due(progress.iteration, args.eval_interval)):
            with metrics.pause():
                loss = evaluate(args, job, engine, valid_set)
            metrics.record_evaluation(progress, loss)
        stopping = stop.agreed(also=_limit_reached(args, progress, started))
        if args.save and (stopping or _is_due(progress.iteration, args.save_interval)):
            with metrics.pause(), liveness.busy():
                checkpointing.save(args, progress, engine)
            saved = progress.iteration
        if stopping:
            break

    if args.save and saved != progress.iteration:
        with liveness.busy():
            checkpointing.save(args, progress, engine)
    watch.close()
    metrics.close()
    if ranks.is_main():
        report.write_report(output_dir(args), f"MiniMind {job.title}, {args.num_layers} x {args.hidden_size}")
        plan.say_what_next(args, progress)


def evaluate(args: argparse.Namespace, job: Job, engine: step.Engine, dataset: Any) -> float:
    """Mean loss (pretraining: nats per token) of the first `--eval-iters` global batches of the validation set."""
    # Iterators of its own each time: worker processes would cost more than the few batches.
    batches = [data.micro_batches(args, job, dataset, 0, workers=0) for _ in engine.model]
    rounds = min(args.eval_iters, len(dataset) // args.global_batch_size)
    return step.averages(args, job, engine.measure(job, batches, args.num_microbatches, rounds))[0][0]


def _is_due(iteration: int, interval: int | None) -> bool:
    return bool(interval) and iteration % (interval or 1) == 0


def _limit_reached(args: argparse.Namespace, progress: Progress, started: float) -> bool:
    minutes = (time.monotonic() - started) / 60
    return _is_due(progress.iteration, args.exit_interval) or (
        args.exit_duration_in_mins is not None and minutes > args.exit_duration_in_mins
    )

"""Messages before and after a run: its plan, its estimates, and the next steps."""

from __future__ import annotations

import datetime
from pathlib import Path

from minimind_mcore.checkpoint.files import directory_of
from minimind_mcore.errors import UserError
from minimind_mcore.forecast import machines, memory, speed
from minimind_mcore.forecast.memory import GIB, Workload
from minimind_mcore.platform import device
from minimind_mcore.storage import free_bytes, require_writable
from minimind_mcore.training import checkpointing, data
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.job import Job
from minimind_mcore.training.metrics import Progress, output_dir


def workload(config: TrainConfig, sequences: int = 1) -> Workload:
    """Return the workload that forecasts need. `sequences` is the number of sequences in a sample (2 for a pair)."""
    return Workload.from_flags(config.flags, config.layout, config.architecture, sequences)


def forecast(config: TrainConfig, sequences: int, has_length: bool = True) -> dict[str, str]:
    """Return memory and time of a rank of this run on this device, as lines of text.

    The time is missing for devices without data in the forecasts.

    Args:
        config: configuration of the run.
        sequences: number of sequences in a sample.
        has_length: False if the number of iterations is not known yet.
    """
    found, work = device.current(), workload(config, sequences)
    parts = memory.of_training(work, machines.like(found.kind))
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    total = sum(parts.values()) / GIB
    lines = {"memory": f"about {total:.2f} GiB per rank ({shown}), without the memory of Python and its libraries"}
    cores = found.count / min(config.layout.world_size, found.count)
    if machine := machines.recognize(found.kind, found.name, cores):
        seconds = speed.of_training(work, machine)
        step = sum(seconds.values())
        shown = ", ".join(f"{name} {part / step:.0%}" for name, part in seconds.items() if part / step >= 0.005)
        whole = f", {datetime.timedelta(seconds=round(step * config.schedule.train_iters))} for all"
        whole = whole if has_length else ""
        lines["time"] = f"about {step:.3g} s per iteration ({shown}){whole}; docs/plan.md has the sources"
    return lines


def describe(config: TrainConfig, sequences: int = 1, router: str = "", has_length: bool = True) -> str:
    """Return lines with device, layout, sizes, router weight, memory, time and the flags without effect."""
    found, model, schedule = device.current(), config.architecture, config.schedule
    total, active = model.num_parameters(), model.num_active_parameters()
    sizes = f"{total / 1e6:.2f}M" + (f" ({active / 1e6:.2f}M active)" if active != total else "")
    precision = str(config.precision.params_dtype).removeprefix("torch.")
    iterations = f"{schedule.train_iters} iterations" if has_length else "as many iterations as the data has"
    rows = {
        "device": f"{found.kind}: {found.name}, {found.count} {'cores' if found.kind == 'cpu' else 'on this host'}",
        "layout": str(config.layout),
        "model": f"{sizes} parameters, {model.num_layers} layers, hidden {model.hidden_size}, {precision}",
        "batch": f"{schedule.global_batch_size} {'pairs' if sequences == 2 else 'samples'} of "
        f"{config.data.seq_length} tokens in {schedule.num_microbatches} micro-batches of "
        f"{schedule.micro_batch_size} per rank; {iterations}",
        **forecast(config, sequences, has_length),
    }
    if router:
        rows["router"] = f"weight {router}"
    if config.logging.no_effect:
        rows["no effect"] = " ".join(config.logging.no_effect) + " (kernels of another device, or done here anyway)"
    return "\n".join(f"{name + ':':<12}{text}" for name, text in rows.items())


def require_memory(config: TrainConfig, sequences: int) -> None:
    """Refuse a run whose estimate exceeds the memory of a device, or of this host if the device is its CPU.

    Raises:
        UserError: the memory does not suffice.
    """
    found = device.current()
    # On a CPU the processes of a host share its memory. On several hosts each has only its own share of the processes.
    sharing = min(config.layout.world_size, found.count) if found.kind == "cpu" else 1
    parts = memory.of_training(workload(config, sequences), machines.like(found.kind))
    needed = (sum(parts.values()) - parts.get("fragmentation", 0.0)) * sharing  # without the uncertain part
    if found.memory and needed > found.memory:
        raise UserError(
            f"this run needs about {needed / GIB:.1f} GiB but the {found.kind} has {found.memory / GIB:.1f} GiB; lower "
            "MBS (--micro-batch-size), or split the model with TP or PP"
        )


def require_writable_outputs(config: TrainConfig) -> None:
    """Check that all output directories are writable. Nothing is created.

    Raises:
        UserError: a directory is not writable.
    """
    places = [(output_dir(config), "--output-dir (OUTPUT_DIR)")]
    if config.checkpoint.save:
        places.append((Path(config.checkpoint.save), "--save (CKPT_SAVE_DIR)"))
    if config.logging.log_file:
        places.append((Path(config.logging.log_file).parent, "--log-file (LOG_DIR)"))
    if config.logging.tensorboard_dir:
        places.append((Path(config.logging.tensorboard_dir), "--tensorboard-dir (LOG_DIR)"))
    for directory, flag in places:
        require_writable(directory, f"give another directory with {flag}")


def dry_run(config: TrainConfig, kind: type[Job], has_length: bool) -> None:
    """`--dry-run`: validate everything that a run would need, and print the plan.

    Args:
        config: configuration of the run.
        kind: class of the job.
        has_length: False if the number of iterations follows from data that is not converted yet.

    Raises:
        UserError: any error that the run itself would raise.
    """
    config, router = checkpointing.settle_router_weight(config)
    print(describe(config, kind.sequences, router, has_length))
    if config.data.data_pending:
        print(f"{'data:':<12}not converted yet; --train-iters follows from its size")
    else:
        tokenizer = data.open_tokenizer(config)
        kind(config).check_data(tokenizer)
        print(f"{'data:':<12}{' '.join(data.prefixes(config.data))}")
        print(f"{'tokenizer:':<12}{data.tokenizer_path(config.data)} (fingerprint {tokenizer.fingerprint[:12]})")
    require_writable_outputs(config)
    for name, text in checkpointing.previews(config, has_length).items():
        print(f"{name + ':':<12}{text}")
    require_memory(config, kind.sequences)
    if config.checkpoint.save:
        needed, free = checkpointing.expected_bytes(config), free_bytes(config.checkpoint.directory)
        save = config.checkpoint.save
        print(f"{'save:':<12}{save}: {needed / GIB:.2f} GiB a checkpoint, {free / GIB:.1f} GiB free")
        if needed > free:
            raise UserError(f"--save {save}: a checkpoint needs {needed / GIB:.2f} GiB, {free / GIB:.2f} are free")
    print("dry run: everything is valid, nothing was trained")


def next_steps(config: TrainConfig, progress: Progress) -> str:
    """Return lines with the output paths and the command that continues from here."""
    out = output_dir(config)
    done = progress.iteration >= config.schedule.train_iters
    state = "finished" if done else "stopped"
    lines = [f"\n{state} at iteration {progress.iteration} of {config.schedule.train_iters}"]
    lines.append(f"  curves      {out / 'loss.png'}  {out / 'report.html'}  {out / 'metrics.jsonl'}")
    if config.logging.tensorboard_dir:
        lines.append(f"  tensorboard tensorboard --logdir {config.logging.tensorboard_dir}")
    if config.checkpoint.save:
        lines.append(f"  checkpoint  {directory_of(Path(config.checkpoint.save), progress.iteration)}")
        where = "" if config.checkpoint.load == config.checkpoint.save else f" with --load {config.checkpoint.save}"
        more = " and more --train-iters (TRAIN_ITERS), --override-opt_param-scheduler" if done else ""
        lines.append(f"  go on       the same command{where}{more}")
    return "\n".join(lines)

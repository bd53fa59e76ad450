"""What a run is going to do, before it does it, and what to do after it."""

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
    """Return what forecasts read of a run whose samples have that many sequences (2 for a pair)."""
    return Workload.from_flags(config.flags, config.layout, config.architecture, sequences)


def forecast(config: TrainConfig, sequences: int) -> dict[str, str]:
    """Return memory and time of a rank of this run on this device, as lines of text.

    Devices that forecasts have no figures for have no time.
    """
    found, work = device.current(), workload(config, sequences)
    parts = memory.of_training(work, machines.like(found.kind))
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    lines = {"memory": f"about {sum(parts.values()) / GIB:.2f} GiB per rank ({shown}), beside the program itself"}
    cores = found.count / min(config.layout.world_size, found.count)
    if machine := machines.recognize(found.kind, found.name, cores):
        seconds = speed.of_training(work, machine)
        step = sum(seconds.values())
        shown = ", ".join(f"{name} {part / step:.0%}" for name, part in seconds.items() if part / step >= 0.005)
        whole = datetime.timedelta(seconds=round(step * config.schedule.train_iters))
        lines["time"] = f"about {step:.3g} s per iteration ({shown}), {whole} for all; docs/plan.md has the sources"
    return lines


def describe(config: TrainConfig, sequences: int = 1, router: str = "") -> str:
    """Return lines with device, layout, sizes, router weight, memory, time and the flags without effect."""
    found, model, schedule = device.current(), config.architecture, config.schedule
    total, active = model.num_parameters(), model.num_active_parameters()
    sizes = f"{total / 1e6:.2f}M" + (f" ({active / 1e6:.2f}M active)" if active != total else "")
    precision = str(config.precision.params_dtype).removeprefix("torch.")
    rows = {
        "device": f"{found.kind}: {found.name}, {found.count} {'cores' if found.kind == 'cpu' else 'on this host'}",
        "layout": str(config.layout),
        "model": f"{sizes} parameters, {model.num_layers} layers, hidden {model.hidden_size}, {precision}",
        "batch": f"{schedule.global_batch_size} {'pairs' if sequences == 2 else 'samples'} of "
        f"{config.data.seq_length} tokens in {schedule.num_microbatches} micro-batches of "
        f"{schedule.micro_batch_size} per rank; {schedule.train_iters} iterations",
        **forecast(config, sequences),
    }
    if router:
        rows["router"] = f"weight {router}"
    if config.logging.no_effect:
        rows["no effect"] = " ".join(config.logging.no_effect) + " (kernels of another device, or done here anyway)"
    return "\n".join(f"{name + ':':<12}{text}" for name, text in rows.items())


def require_memory(config: TrainConfig, sequences: int) -> None:
    """Refuse a run whose estimate exceeds the memory of a device, or of this host if the device is its CPU.

    Raises:
        UserError: see above.
    """
    found = device.current()
    # The processes of a CPU share its memory. A host of several has its own share of them.
    sharing = min(config.layout.world_size, found.count) if found.kind == "cpu" else 1
    parts = memory.of_training(workload(config, sequences), machines.like(found.kind))
    needed = (sum(parts.values()) - parts.get("fragmentation", 0.0)) * sharing  # what is certain
    if found.memory and needed > found.memory:
        raise UserError(
            f"this run needs about {needed / GIB:.1f} GiB, the {found.kind} has {found.memory / GIB:.1f} GiB; lower "
            "MBS (--micro-batch-size), or spread the model with TP or PP"
        )


def require_writable_outputs(config: TrainConfig) -> None:
    """Refuse directories that the run could not write to.

    Raises:
        UserError: see above; nothing is created.
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
        config: of the run.
        kind: of job.
        has_length: False if the number of iterations follows from data that is not converted yet.

    Raises:
        UserError: what the run itself would raise.
    """
    config, router = checkpointing.settle_router_weight(config)
    print(describe(config, kind.sequences, router))
    if config.data.data_pending:
        print(f"{'data:':<12}to be converted first; --train-iters follows from its size")
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
    """Return lines that say where everything is, and which command goes on from here."""
    out = output_dir(config)
    done = progress.iteration >= config.schedule.train_iters
    lines = [
        f"\n{'finished' if done else 'stopped'} at iteration {progress.iteration} of {config.schedule.train_iters}"
    ]
    lines.append(f"  curves      {out / 'loss.png'}  {out / 'report.html'}  {out / 'metrics.jsonl'}")
    if config.logging.tensorboard_dir:
        lines.append(f"  tensorboard tensorboard --logdir {config.logging.tensorboard_dir}")
    if config.checkpoint.save:
        lines.append(f"  checkpoint  {directory_of(Path(config.checkpoint.save), progress.iteration)}")
        where = "" if config.checkpoint.load == config.checkpoint.save else f" with --load {config.checkpoint.save}"
        more = " and more --train-iters (TRAIN_ITERS), --override-opt_param-scheduler" if done else ""
        lines.append(f"  go on       the same command{where}{more}")
    return "\n".join(lines)

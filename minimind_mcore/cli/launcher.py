"""Read the launch settings (device, processes per host, hosts), and start the kit's programs with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from minimind_mcore import hosts
from minimind_mcore.cli.settings import CLI, choice, count, show
from minimind_mcore.errors import UserError
from minimind_mcore.platform import device, processor

BACKENDS = ("native", "mindspeed-llm")


@dataclass(frozen=True)
class LaunchSettings:
    """The launch settings of a job.

    Attributes:
        on_cpu: the device is a CPU.
        processes: processes on this host, one per device.
        world: world size, the processes on all hosts.
        torchrun: torchrun's flags on this host.
        backend: "native" or "mindspeed-llm".
        dry: check everything without running it.
    """

    on_cpu: bool
    processes: int
    world: int
    torchrun: tuple[str, ...]
    backend: str
    dry: bool


def processes() -> int:
    """Return NPUS_PER_NODE, the number of processes on this host (default: one per device).

    Raises:
        UserError: this host has fewer devices.
    """
    found = device.current()
    on_cpu = found.kind == "cpu"
    number = count("NPUS_PER_NODE", min(2, found.count) if on_cpu else found.count)
    if not on_cpu and number > found.count:
        raise UserError(
            f"NPUS_PER_NODE={number}, but this host has {found.count} {found.kind} devices; each process needs its own"
        )
    return number


def precision(default: str) -> str:
    """Return PRECISION: bf16, fp16 or fp32. `auto` is fp32 on a CPU without bf16 matrix instructions, else bf16.

    Raises:
        UserError: the setting has another value.
    """
    found = choice("PRECISION", default, "auto", "bf16", "fp16", "fp32")
    if found == "auto":
        return "fp32" if device.current().kind == "cpu" and not processor.multiplies_bf16() else "bf16"
    return found


def read_settings(argv: Sequence[str]) -> LaunchSettings:
    """Read the settings of device and hosts. Set the network variables of HCCL and gloo in the environment.

    Raises:
        UserError: a setting is wrong.
    """
    found, dry = device.current(), "--dry-run" in argv
    os.environ["DEVICE"] = found.kind
    backend = choice("BACKEND", "mindspeed-llm" if found.is_ascend else "native", *BACKENDS)
    job = hosts.read(os.environ)
    port = hosts.port(job, os.environ)
    os.environ.update(hosts.named(job, found.is_ascend, dry))
    local = processes()
    torchrun = {
        "--nproc-per-node": local,
        "--nnodes": job.count,
        "--node-rank": job.rank,
        "--master-addr": job.master,
        "--master-port": port,
    }
    words = tuple(str(word) for pair in torchrun.items() for word in pair)
    return LaunchSettings(found.kind == "cpu", local, local * job.count, words, backend, dry)


def run_program(settings: LaunchSettings, program: str, flags: Sequence[str]) -> None:
    """Run one of the kit's programs on every device of this host. In a dry run print the command and check its flags.

    BACKEND=mindspeed-llm runs MindSpeed-LLM's program with the same name and flags.
    """
    if settings.backend == "mindspeed-llm":
        from minimind_mcore.mindspeed import launch as mindspeed_launch

        if settings.dry:
            show([sys.executable, "-m", "minimind_mcore.mindspeed.launch", *settings.torchrun, program, *flags])
        mindspeed_launch.main([*settings.torchrun, program, *flags])
        return
    rank = ["-m", "minimind_mcore.cli", program, *flags]
    if not settings.dry:
        from minimind_mcore import launch

        launch.main([*settings.torchrun, *rank])
        return
    show([sys.executable, "-m", "minimind_mcore.launch", *settings.torchrun, *rank])
    os.environ["WORLD_SIZE"] = str(settings.world)
    run_here(program, flags)


def run_here(program: str, flags: Sequence[str], dry: bool = False) -> None:
    """Run one of the kit's programs in this process, on one device, and exit. In a dry run print the command first."""
    from minimind_mcore.cli import dispatch

    if dry:
        show([*CLI, program, *flags])
    sys.exit(dispatch([program, *flags]))

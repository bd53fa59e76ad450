"""Where a job runs: the device, the processes of this host, the hosts; and how the kit's programs are started there."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from minimind_mcore import hosts
from minimind_mcore.cli.settings import CLI, choice, count, show
from minimind_mcore.errors import UserError
from minimind_mcore.platform import device

BACKENDS = ("native", "mindspeed-llm")


@dataclass(frozen=True)
class Place:
    """The hosts and devices of a job.

    Attributes:
        on_cpu: the device is a CPU.
        cores: CPU cores that this process may use.
        processes: of the job on this host, one per device.
        world: processes of the job.
        torchrun: torchrun's flags for this host.
        backend: "native" or "mindspeed-llm".
        dry: check everything and run nothing.
    """

    on_cpu: bool
    processes: int
    world: int
    torchrun: tuple[str, ...]
    backend: str
    dry: bool


def processes() -> int:
    """Return the processes of a job on this host, one per device: NPUS_PER_NODE.

    Raises:
        UserError: there are fewer devices.
    """
    found = device.current()
    on_cpu = found.kind == "cpu"
    number = count("NPUS_PER_NODE", min(2, found.count) if on_cpu else found.count)
    if not on_cpu and number > found.count:
        raise UserError(
            f"NPUS_PER_NODE={number}, but this host has {found.count} {found.kind} devices; each process needs its own"
        )
    return number


def find(argv: Sequence[str]) -> Place:
    """Read the settings of device and hosts, and put the variables of the network into the environment.

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
    return Place(found.kind == "cpu", local, local * job.count, words, backend, dry)


def run_program(place: Place, program: str, flags: Sequence[str]) -> None:
    """Run one of the kit's programs on every device of this host. In a dry run show the command and check its flags.

    Under BACKEND=mindspeed-llm it is MindSpeed-LLM's program of that name, with the same flags.
    """
    if place.backend == "mindspeed-llm":
        from minimind_mcore.mindspeed import launch as mindspeed_launch

        if place.dry:
            show([sys.executable, "-m", "minimind_mcore.mindspeed.launch", *place.torchrun, program, *flags])
        mindspeed_launch.main([*place.torchrun, program, *flags])
        return
    rank = ["-m", "minimind_mcore.cli", program, *flags]
    if not place.dry:
        from minimind_mcore import launch

        launch.main([*place.torchrun, *rank])
        return
    show([sys.executable, "-m", "minimind_mcore.launch", *place.torchrun, *rank])
    os.environ["WORLD_SIZE"] = str(place.world)
    run_here(program, flags)


def run_here(program: str, flags: Sequence[str], dry: bool = False) -> None:
    """Run one of the kit's programs in this process: a MiniMind fits on any device. In a dry run show it first."""
    from minimind_mcore.cli import dispatch

    if dry:
        show([*CLI, program, *flags])
    sys.exit(dispatch([program, *flags]))

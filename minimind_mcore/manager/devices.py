"""The table of devices: accelerators as the driver's tool lists them, and the CPU."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable

import psutil
from typing_extensions import override

from minimind_mcore.doctor import devices
from minimind_mcore.doctor.installed import Host
from minimind_mcore.manager.queue import CPU, Hardware
from minimind_mcore.manager.record import JobRecord
from minimind_mcore.platform.processor import cpu_name, usable_cores


@functools.lru_cache(maxsize=4)
def _printed(command: tuple[str, ...], period: int) -> str | None:
    return Host().run(*command)


def printed(*command: str) -> str | None:
    """Return what a driver's tool has printed within the last 5 s; None if it is missing or failed.

    npu-smi takes a second or more, and every open page asks for the devices.
    """
    return _printed(command, int(time.monotonic() / 5))


class CachedHost(Host):
    """This host, whose tools run once in 5 s."""

    @override
    def run(self, *command: str, timeout: float = 60) -> str | None:
        return printed(*command)


def table(hardware: Hardware, jobs: Iterable[JobRecord], host: Host | None = None) -> list[dict[str, object]]:
    """Return a row for each accelerator, then one for the CPU; each names the jobs that run there. Memory in MiB."""
    running = [job for job in jobs if job.state in ("running", "stopping")]
    memory = psutil.virtual_memory()
    cpu = {
        "kind": CPU, "number": 0, "name": f"{cpu_name()}, {usable_cores()} cores", "health": "OK",
        "used": (memory.total - memory.available) >> 20, "total": memory.total >> 20, "power": "", "temperature": "",
        "load": round(os.getloadavg()[0], 2), "usable": True, "jobs": [job.id for job in running if job.device == CPU],
    }  # fmt: skip
    if hardware.kind == CPU:
        return [cpu]
    rows = []
    for card in devices.cards(host or CachedHost(), hardware.kind):
        on_it = [job.id for job in running if job.device == hardware.kind and card.number in job.devices]
        usable = card.number in hardware.numbers
        rows.append({"kind": hardware.kind, **vars(card), "load": None, "usable": usable, "jobs": on_it})
    return [*rows, cpu]

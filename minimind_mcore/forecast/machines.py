"""Performance numbers of devices for forecasts. machines.json has each number with its source."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from minimind_mcore.paths import package_json


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One device and its links, in bytes, seconds and FLOP/s. Bandwidths are per direction.

    Attributes:
        kind: see `platform.device.Device.kind`.
        efficiency: share of `matmul_flops` that training turns into model FLOPs. `efficiency_compiled`: same with
            compiled layers.
        hidden_vectors: vectors of the hidden size that a layer keeps per token. `hidden_vectors_compiled`: same with
            compiled layers.
        layer_seconds: time of the host to launch the kernels of a layer, forward and backward.
        decode_layer_seconds: time of the host to launch the kernels of a layer for one generated token.
        program: memory of a process without a model.
        fragmentation: bytes that the allocator reserves per byte of activations and logits. `_moe`: with experts,
            whose tensor sizes differ in each step. `_tp`: with TP, where gathered tensors and shards alternate.
        collective_seconds: latency of any collective. `host_seconds` and `network_seconds`: latency of each hop.
    """

    name: str
    kind: str
    matmul_flops: float
    efficiency: float
    efficiency_compiled: float
    hidden_vectors: float
    hidden_vectors_compiled: float
    layer_seconds: float
    layer_seconds_moe: float
    decode_layer_seconds: float
    memory: float
    program: float
    fragmentation: float
    fragmentation_moe: float
    fragmentation_tp: float
    memory_bandwidth: float
    devices_per_host: float
    host_bandwidth: float
    network_bandwidth: float
    collective_seconds: float
    host_seconds: float
    network_seconds: float

    def with_cores(self, cores: float) -> Machine:
        """Return this CPU with several cores per process."""
        flops, bandwidth = self.matmul_flops * cores, self.memory_bandwidth * cores
        return dataclasses.replace(self, matmul_flops=flops, memory_bandwidth=bandwidth)


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """Return the content of machines.json, without its comment."""
    return {name: row for name, row in package_json("forecast/machines.json").items() if name != "about"}


def machine(name: str) -> Machine:
    """Return the device of a name in machines.json."""
    numbers = {field: float(value[0]) for field, value in table()[name].items() if field not in ("kind", "names")}
    return Machine(name=name, kind=table()[name]["kind"], **numbers)


def recognize(kind: str, name: str, cores: float = 1) -> Machine | None:
    """Return the known device whose name is part of a vendor's name, or None.

    Args:
        kind: see `platform.device.Device.kind`.
        name: the vendor's name of the device.
        cores: cores of each process on a CPU.
    """
    for key, row in table().items():
        if row["kind"] == kind and any(known in name for known in row["names"]):
            return machine(key).with_cores(cores if kind == "cpu" else 1)
    return None


def like(kind: str) -> Machine:
    """Return any device of a kind, for memory forecasts, which depend only on the kind."""
    return machine(next(key for key, row in table().items() if row["kind"] == kind))


def sources(name: str) -> list[str]:
    """Return each number of a device with its source, as lines of text."""
    rows = {field: value for field, value in table()[name].items() if field not in ("kind", "names")}
    width = max(map(len, rows))
    return [f"{field:<{width}}  {value:<10.4g}  {source}" for field, (value, source) in rows.items()]

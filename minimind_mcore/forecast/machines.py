"""What forecasts know of devices: the numbers of machines.json, each with its source."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any

from minimind_mcore.paths import PACKAGE


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One device and its links. Bytes, seconds, FLOP/s; bandwidths are of one direction.

    Attributes:
        kind: as `platform.device.Device.kind`.
        efficiency: share of `matmul_flops` that a training turns into model FLOPs; `_compiled`: of compiled layers.
        hidden_vectors: vectors of the hidden size that a layer keeps for each token; `_compiled`: of compiled layers.
        layer_seconds: that the host needs to start the kernels of a layer, forward and backward.
        decode_layer_seconds: the same, for one generated token.
        program: memory that a process holds besides the model.
        fragmentation: bytes that the allocator holds for each byte of activations and logits; `_moe`: with experts,
            whose tensors have another size in each step.
        collective_seconds: latency of any collective; `host_seconds` and `network_seconds` of each hop.
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
    memory_bandwidth: float
    devices_per_host: float
    host_bandwidth: float
    network_bandwidth: float
    collective_seconds: float
    host_seconds: float
    network_seconds: float

    def with_cores(self, cores: float) -> Machine:
        """This CPU, with several cores for each process."""
        flops, bandwidth = self.matmul_flops * cores, self.memory_bandwidth * cores
        return dataclasses.replace(self, matmul_flops=flops, memory_bandwidth=bandwidth)


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """The content of machines.json, without its comment."""
    text = (PACKAGE / "forecast/machines.json").read_text(encoding="utf-8")
    return {name: row for name, row in json.loads(text).items() if name != "about"}


def machine(name: str) -> Machine:
    """The device of that name in machines.json."""
    numbers = {field: float(value[0]) for field, value in table()[name].items() if field not in ("kind", "names")}
    return Machine(name=name, kind=table()[name]["kind"], **numbers)


def recognize(kind: str, name: str, cores: float = 1) -> Machine | None:
    """The device of that kind whose maker's name contains one of the known names; None if there is none.

    Args:
        kind: as `platform.device.Device.kind`.
        name: the maker's name.
        cores: of each process on a CPU.
    """
    for key, row in table().items():
        if row["kind"] == kind and any(known in name for known in row["names"]):
            return machine(key).with_cores(cores if kind == "cpu" else 1)
    return None


def like(kind: str) -> Machine:
    """A device of that kind, for what a name does not matter: memory."""
    return machine(next(key for key, row in table().items() if row["kind"] == kind))


def sources(name: str) -> list[str]:
    """Each number of a device and where it comes from, as lines of text."""
    rows = {field: value for field, value in table()[name].items() if field not in ("kind", "names")}
    width = max(map(len, rows))
    return [f"{field:<{width}}  {value:<10.4g}  {source}" for field, (value, source) in rows.items()]

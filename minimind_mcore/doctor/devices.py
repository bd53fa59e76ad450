"""The devices of a host: their number, visibility, health and free memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind_mcore.doctor.finding import Finding, fail, ok, warn
from minimind_mcore.doctor.installed import Host
from minimind_mcore.platform.device import DAVINCI

MANAGERS = (DAVINCI.name, "devmm_svm", "hisi_hdc")
VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
LEAST_FREE_MIB = 4096  # weights, Adam and activations of the largest MiniMind, in half precision


@dataclass(frozen=True)
class Card:
    """One device, as the driver's tool lists it. Memory in MiB, power in W, temperature in °C; "" if not listed."""

    number: int
    name: str
    health: str
    used: int
    total: int
    power: str = ""
    temperature: str = ""

    @property
    def free(self) -> int:
        """Free memory in MiB."""
        return self.total - self.used


def kind(host: Host) -> str:
    """Return the device that a job would use, decided as in `minimind_mcore.platform.device` but without importing
    torch.

    An NPU counts if its device files or torch_npu exist, because the doctor must report one without the other.
    """
    if asked := host.environ.get("DEVICE"):
        return asked
    if (host.root / "dev/davinci_manager").exists() or host.run("npu-smi", "info"):
        return "npu"
    return "cuda" if cards(host, "cuda") else "cpu"


def cards(host: Host, device: str) -> list[Card]:
    """Return the devices that npu-smi or nvidia-smi lists, in order."""
    if device == "npu":
        return _npu_cards(host.run("npu-smi", "info") or "")
    query = "--query-gpu=index,name,memory.used,memory.total"
    printed = host.run("nvidia-smi", query, "--format=csv,noheader,nounits") or ""
    rows = [[word.strip() for word in line.split(",")] for line in printed.splitlines()]
    return [
        Card(int(row[0]), row[1], "OK", int(row[2]), int(row[3]))
        for row in rows
        if len(row) == 4 and row[0].isdigit() and row[2].isdigit() and row[3].isdigit()
    ]


def _npu_cards(printed: str) -> list[Card]:
    """Parse two lines per chip: "| 0  910B2 | OK | 94.5 40 0 / 0 |", "| 0 | 0000:C1:00.0 | 0  0 / 0  3410/ 65536 |"."""
    found: list[Card] = []
    head: tuple[str, str] | None = None
    measured: list[str] = []
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3 or not re.match(r"\d+\b", cells[0]):
            continue
        if named := re.match(r"\d+\s+(\S*[A-Za-z]\S*)$", cells[0]):
            head, measured = (named[1], cells[1]), cells[2].split()
            continue
        memory = re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])
        if head and memory:
            power, temperature = [word if re.fullmatch(r"[\d.]+", word) else "" for word in [*measured, "", ""][:2]]
            used, total = map(int, memory[-1])
            found.append(Card(len(found), *head, used, total, power, temperature))
            head = None
    return found


def visible(host: Host, device: str, count: int) -> list[int] | None:
    """Return the numbers of visible devices from the environment. None if it has an entry that is not a number."""
    given = host.environ.get(VISIBLE[device])
    if given is None:
        return list(range(count))
    words = [word.strip() for word in given.split(",") if word.strip()]
    return [int(word) for word in words] if all(word.isdigit() for word in words) else None


def check(host: Host, device: str) -> list[Finding]:
    """Check the devices.

    Args:
        host: the host to check.
        device: "npu", "cuda" or "cpu".
    """
    if device == "cpu":
        return [ok("device", "a CPU: no accelerator was found or asked for")]
    if device == "npu" and (missing := [name for name in MANAGERS if not (host.root / "dev" / name).exists()]):
        text = f"/dev has no {', '.join(missing)}: no driver is loaded, or the container was started without them"
        return [fail("device files", text, "on the host: npu-smi info; for a container: bash docker/run_ascend.sh")]
    listed = cards(host, device)
    if not listed:
        tool = "npu-smi" if device == "npu" else "nvidia-smi"
        return [fail("driver", f"{tool} lists no device here", f"{tool}; reinstall the driver if it fails")]
    return _visibility(host, device, listed)


def selection(device: str, numbers: Sequence[int]) -> dict[str, str]:
    """Return the settings that make only these devices visible to a process, numbered as in the driver's tool."""
    # CUDA's default order starts with the fastest GPU.
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if device == "cuda" else {}
    return {VISIBLE[device]: ",".join(map(str, numbers)), **order}


def _visibility(host: Host, device: str, listed: list[Card]) -> list[Finding]:
    variable = VISIBLE[device]
    given = host.environ.get(variable)
    numbers = visible(host, device, len(listed))
    if numbers is None:  # CUDA accepts UUIDs too
        return [warn("device", f"{variable}={given} is not a list of numbers: not checked")]
    if not numbers:
        text = f"no device is visible: {variable}={given!r} names none of {len(listed)}"
        return [fail("device", text, f"unset {variable}    # or name some, such as 0,1")]
    there = {card.number for card in listed} & _nodes(host, device, len(listed))
    if absent := [number for number in numbers if number not in there]:
        text = f"{variable}={given or 'unset'} means {absent}, but this host has {sorted(there)}"
        return [fail("device", text, f"export {variable}={','.join(map(str, sorted(there)))}")]
    chosen = [card for card in listed if card.number in numbers]
    found = [_count(host, device, len(numbers), len(listed))]
    found += [
        fail("health", f"device {card.number} ({card.name}) is in state {card.health}", "npu-smi info -t health")
        for card in chosen
        if card.health not in ("OK", "Warning")
    ]
    return [*found, _memory(device, chosen)]


def _nodes(host: Host, device: str, count: int) -> set[int]:
    """Return the numbers of the devices that can be opened. For NVIDIA these are all that its tool lists.

    In a container that got /dev/davinci4 and 5 these are devices 0 and 1.
    """
    if device == "cuda":
        return set(range(count))
    names = [path.name.removeprefix("davinci") for path in Path(host.root, "dev").glob("davinci[0-9]*")]
    nodes = {int(name) for name in names if name.isdigit()}
    return nodes if nodes and max(nodes) < count else set(range(len(nodes)))


def _count(host: Host, device: str, visible_count: int, count: int) -> Finding:
    wanted = host.environ.get("NPUS_PER_NODE", "")
    text = f"{visible_count} of {count} {device} devices visible"
    if wanted.isdigit() and int(wanted) > visible_count:
        return fail("device", f"NPUS_PER_NODE={wanted}, but {text}", f"export NPUS_PER_NODE={visible_count}")
    return ok("device", text)


def _memory(device: str, chosen: list[Card]) -> Finding:
    tool = "npu-smi info" if device == "npu" else "nvidia-smi"
    least = min(chosen, key=lambda card: card.free)
    text = f"device {least.number} has {least.free / 1024:.1f} of {least.total / 1024:.1f} GiB free"
    if least.free < LEAST_FREE_MIB:
        fix = f"{tool}    # lists them; end yours, or choose other devices with {VISIBLE[device]}"
        text += f"; a job needs {LEAST_FREE_MIB / 1024:.0f} GiB: other processes hold the rest"
        return fail("device memory", text, fix)
    if least.free < 0.5 * least.total:
        return warn("device memory", f"{text}: somebody else is at work there", tool)
    return ok("device memory", f"{text}, the least of those visible")

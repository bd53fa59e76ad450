"""The support matrix: `matrix.json` as objects, and the search for the row of an installation."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from minimind_mcore.paths import package_json


@dataclass(frozen=True)
class Stack:
    """A row of the support matrix: versions that work together.

    Attributes:
        name: name such as "MindSpeed-LLM 26.1.0".
        device: "npu", "cuda" or "cpu".
        backend: "mindspeed-llm", "mindspeed-rl" or "native".
        programs: versions that distinguish this row from others of its device: {"MindSpeed-LLM": "26.1.0"}.
        needs: version specifiers by component. A job fails with other versions.
        best: version specifiers by component of versions that were released together or tested by the kit.
        proof: "tested in CI", "rehearsed", "rehearsed in part" or "untested".
        note: further information, in one sentence.
        sources: sources of the row.
    """

    name: str
    device: str
    backend: str
    programs: Mapping[str, str]
    needs: Mapping[str, str]
    best: Mapping[str, str]
    proof: str
    note: str
    sources: tuple[str, ...]

    def judge(self, component: str, version: str | None) -> str:
        """Judge a version of a component.

        Returns:
            "ok", "untried" (may work, but was neither released nor tested with the row), "wrong" (the job would fail),
            "missing", or "-" if the row does not mention the component.
        """
        if component in self.programs:
            return "missing" if version is None else "ok" if version == self.programs[component] else "untried"
        needed, best = self.needs.get(component), self.best.get(component)
        if needed is None and best is None:
            return "-"
        if version is None:
            return "missing" if needed else "-"
        if needed is not None and not allows(needed, version):
            return "wrong"
        return "ok" if best is None or allows(best, version) else "untried"

    def wanted(self, component: str) -> str:
        """Return the row's best version of a component as text, else the required one."""
        given = self.programs.get(component)
        return given or readable(self.best.get(component) or self.needs.get(component) or "-")


def data() -> dict[str, Any]:
    """Return the content of matrix.json."""
    return package_json("doctor/matrix.json")


@functools.cache
def stacks() -> tuple[Stack, ...]:
    """Return all rows, in the file's order."""
    return tuple(Stack(**{**row, "sources": tuple(row["sources"])}) for row in data()["stacks"])


def allows(specifier: str, version: str) -> bool:
    """Return whether a specifier allows a version. Versions that are not numbers are compared as text."""
    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except (InvalidVersion, InvalidSpecifier):
        return specifier.removeprefix("==") == version


def readable(specifier: str) -> str:
    """Format a specifier for readers: `==9.1.*` is 9.1, `>=8.3rc1,<9.2` is >=8.3, <9.2."""
    if specifier.startswith("==") and "," not in specifier:
        return specifier[2:].removesuffix(".*")
    return specifier.replace(",", ", ").replace("8.3rc1", "8.3").replace("8.2rc1", "8.2")


def find(device: str, backend: str, versions: Mapping[str, str | None]) -> Stack | None:
    """Return the row of an installation: its device, its backend and the versions of its programs.

    Args:
        device: "npu", "cuda" or "cpu".
        backend: see `Stack`.
        versions: installed versions by component.
    """
    for stack in sorted(stacks(), key=lambda stack: -len(stack.programs)):  # a row without programs matches everything
        if (stack.device, stack.backend) == (device, backend) and all(
            versions.get(name) == version for name, version in stack.programs.items()
        ):
            return stack
    return None


def newest(device: str, backend: str) -> Stack:
    """Return the first row of a device and backend, which is recommended for a new installation."""
    return next(stack for stack in stacks() if (stack.device, stack.backend) == (device, backend))


def torch_npu_pair(version: str) -> dict[str, str] | None:
    """Return the TorchNPU release of a torch_npu package, with its torch and CANN. None if unknown."""
    pairs: list[dict[str, str]] = data()["torch_npu"]["pairs"]
    return next((pair for pair in pairs if pair["package"] == version), None)


def torch_npu_for(torch: str | None, cann: str, stack: Stack) -> str | None:
    """Return the torch_npu package for a torch and a CANN: the row's own if it fits, else the newest that fits, or
    None."""
    pairs: list[dict[str, str]] = data()["torch_npu"]["pairs"]
    fitting = [p["package"] for p in pairs if p["torch"] == torch and allows(f"=={p['CANN']}.*", cann)]
    named = stack.wanted("torch_npu").lstrip("<>= ").split(",")[0]
    return named if named in fitting else next(iter(fitting), None)

"""The support matrix: `matrix.json` as objects, and which row an installation is."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from minimind_mcore.paths import PACKAGE


@dataclass(frozen=True)
class Stack:
    """A row: versions that go together.

    Attributes:
        name: such as "MindSpeed-LLM 26.1.0".
        device: "npu", "cuda" or "cpu".
        backend: "mindspeed-llm", "mindspeed-rl" or "native".
        programs: what tells this row from others of its device: {"MindSpeed-LLM": "26.1.0"}.
        needs: specifiers by component, without which the job fails.
        best: specifiers by component, of what was released together or tried here.
        proof: "tested in CI", "rehearsed", "rehearsed in part" or "untested".
        note: in a sentence, what else to know.
        sources: where this was read.
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
        """What a version is in this row.

        Returns:
            "ok", "untried" (it may work, but is not the one released or tried), "wrong" (the job would fail),
            "missing", or "-" where the row says nothing.
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
        """What the row has for a component, to read: the best, else what is needed."""
        given = self.programs.get(component)
        return given or readable(self.best.get(component) or self.needs.get(component) or "-")


@functools.cache
def data() -> dict[str, Any]:
    """The content of matrix.json."""
    content: dict[str, Any] = json.loads((PACKAGE / "doctor/matrix.json").read_text(encoding="utf-8"))
    return content


@functools.cache
def stacks() -> tuple[Stack, ...]:
    """All rows, in the file's order."""
    return tuple(Stack(**{**row, "sources": tuple(row["sources"])}) for row in data()["stacks"])


def allows(specifier: str, version: str) -> bool:
    """Whether a version is one that a specifier has; a version that is no number is compared as text."""
    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except (InvalidVersion, InvalidSpecifier):
        return specifier.removeprefix("==") == version


def readable(specifier: str) -> str:
    """A specifier as a reader likes it: `==9.1.*` is 9.1, `>=8.3rc1,<9.2` is >=8.3, <9.2."""
    if specifier.startswith("==") and "," not in specifier:
        return specifier[2:].removesuffix(".*")
    return specifier.replace(",", ", ").replace("8.3rc1", "8.3").replace("8.2rc1", "8.2")


def find(device: str, backend: str, versions: Mapping[str, str | None]) -> Stack | None:
    """The row of an installation: of its device and backend, with the versions of its programs.

    Args:
        device: "npu", "cuda" or "cpu".
        backend: see `Stack`.
        versions: what is installed, by component.
    """
    for stack in sorted(stacks(), key=lambda stack: -len(stack.programs)):  # a row without programs fits all
        if (stack.device, stack.backend) == (device, backend) and all(
            versions.get(name) == version for name, version in stack.programs.items()
        ):
            return stack
    return None


def newest(device: str, backend: str) -> Stack:
    """The first row of a device and backend: what to install where nothing is."""
    return next(stack for stack in stacks() if (stack.device, stack.backend) == (device, backend))


def torch_npu_pair(version: str) -> dict[str, str] | None:
    """The release of TorchNPU that a package of torch_npu belongs to, with its torch and CANN; None if unknown."""
    pairs: list[dict[str, str]] = data()["torch_npu"]["pairs"]
    return next((pair for pair in pairs if pair["package"] == version), None)


def torch_npu_for(torch: str | None, cann: str, stack: Stack) -> str | None:
    """The package of torch_npu for a torch and a CANN: the row's own if it fits, else the newest; None if none does."""
    pairs: list[dict[str, str]] = data()["torch_npu"]["pairs"]
    fitting = [p["package"] for p in pairs if p["torch"] == torch and allows(f"=={p['CANN']}.*", cann)]
    named = stack.wanted("torch_npu").lstrip("<>= ").split(",")[0]
    return named if named in fitting else next(iter(fitting), None)

"""Detect calls that the real torch_npu or HCCL would refuse or compute differently.

Every operator call is checked against the signature in a torch_npu wheel (`schemas_VERSION.txt`, written by
rehearsal/schemas.py) and against the operator's documented limits (`_rules.py`). Every collective of a device's group
is checked against HCCL's data types and reductions.

NPU_EMULATION_STRICT   report (default): print each violation once to standard error; raise: end the program; off
NPU_EMULATION_VERSION  the torch_npu whose signatures count: 2.7.1 (default) or 2.10.0
"""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

MODE = os.environ.get("NPU_EMULATION_STRICT") or "report"
VERSION = os.environ.get("NPU_EMULATION_VERSION") or "2.7.1"
if MODE not in ("report", "raise", "off"):
    raise ValueError(f"NPU_EMULATION_STRICT={MODE}: expected report, raise or off")

_HERE = str(Path(__file__).parent)
_REPORTED: set[tuple[str, str]] = set()


class Violation(RuntimeError):
    """A call that a device would refuse or compute differently."""


def report(what: str) -> None:
    """Raise, or print a violation and the three calls that lead to it."""
    if MODE == "off":
        return
    if MODE == "raise":
        raise Violation(what)
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(_HERE) and "/torch/" not in f.filename]
    place = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames[-3:]))
    if (what, place) not in _REPORTED:
        _REPORTED.add((what, place))
        rank = os.environ.get("RANK", "0")
        print(f"npu_emulation rank {rank}: strict: {what}\n    at {place}", file=sys.stderr, flush=True)


class Schema:
    """One signature, such as `npu_swiglu(Tensor input, int dim=-1) -> Tensor`."""

    def __init__(self, text: str) -> None:
        self.positional: list[tuple[str, str, str | None]] = []
        self.keyword: list[tuple[str, str, str | None]] = []
        target = self.positional
        inside = text[text.index("(") + 1 : text.index(") -> ")]
        for part in re.split(r", ", inside) if inside else []:
            if part == "*":
                target = self.keyword
            elif match := re.match(r"(.+?) (\w+)(?:=(.*))?$", part):
                target.append((match[1], match[2], match[3]))

    def problems(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
        """Yield the errors of torch_npu's argument parser for a call."""
        if len(args) > len(self.positional):
            yield f"{len(args)} positional arguments; torch_npu takes {len(self.positional)}"
        kinds = {name: kind for kind, name, _ in (*self.positional, *self.keyword)}
        given = {name: value for (_, name, _), value in zip(self.positional, args, strict=False)}
        given |= {"input" if name == "self" else name: value for name, value in kwargs.items()}
        for name, value in given.items():
            if name not in kinds:
                yield f"no argument {name}"
            elif not _fits(kinds[name], value):
                yield f"{name} is {type(value).__name__} {str(value)[:40]!r}; torch_npu takes {kinds[name]}"
        for _, name, default in (*self.positional, *self.keyword):
            if default is None and name not in given:
                yield f"argument {name} is missing"


def _fits(kind: str, value: Any) -> bool:
    """Whether a value is of a kind such as `Tensor?` or `int[]`."""
    if value is None:
        return kind.endswith("?")
    kind = re.sub(r"\(.*?\)", "", kind.rstrip("?")).replace("SymInt", "int")
    if kind.endswith("[]"):
        return isinstance(value, (list, tuple)) and all(_fits(kind[:-2], item) for item in value)
    types: dict[str, Any] = {"Tensor": torch.Tensor, "int": int, "float": (int, float), "bool": (bool, int), "str": str}
    types |= {"Scalar": (int, float, complex), "ScalarType": (torch.dtype, int)}
    if kind in ("int", "float", "bool", "Scalar") and torch.is_tensor(value):
        return value.dim() == 0
    return kind not in types or isinstance(value, types[kind])


@functools.cache
def schemas() -> dict[str, list[Schema]]:
    """The signatures of each operator of torch_npu VERSION, its overloads among them."""
    file = Path(__file__).parent / f"schemas_{VERSION}.txt"
    if not file.is_file():
        raise ValueError(f"NPU_EMULATION_VERSION={VERSION}: no {file}; rehearsal/schemas.py writes it")
    found: dict[str, list[Schema]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            found.setdefault(re.split(r"[.(]", line)[0], []).append(Schema(line))
    return found


def hold(name: str, function: Callable[..., Any], signature: bool = True) -> Callable[..., Any]:
    """An operator that checks how it is called.

    Args:
        name: of the operator in torch_npu.
        function: the stand-in's.
        signature: check the arguments against torch_npu's; operators that MindSpeed compiles have their own.
    """
    from . import _rules

    if MODE == "off":
        return function
    rule = _rules.RULES.get(name)

    @functools.wraps(function)
    def held(*args: Any, **kwargs: Any) -> Any:
        if signature:
            found = [list(schema.problems(args, kwargs)) for schema in schemas().get(name, [])]
            for problem in min(found, key=len, default=["torch_npu has no such operator"]):
                report(f"{name}: {problem}")
        if rule is not None:
            for problem in rule(*args, **kwargs):
                report(f"{name}: {problem}")
        return function(*args, **kwargs)

    return held


# ProcessGroupHCCL of torch_npu 2.7.1: checkSupportedDataType, and bool, which it reduces as int32.
_REDUCED = {
    torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16, torch.bool,
}  # fmt: skip


def check_reduction(name: str, tensor: Any, op: Any) -> None:
    """Report a reduction that HCCL has not."""
    if torch.is_tensor(tensor) and tensor.dtype not in _REDUCED:
        report(f"{name} of {tensor.dtype}: HCCL reduces int8 to int64, float16, bfloat16 and float32")
    if op is not None and str(op).rpartition(".")[2] in ("BAND", "BOR", "BXOR"):
        report(f"{name} with {op}: HCCL has SUM, AVG, PRODUCT, MIN and MAX")

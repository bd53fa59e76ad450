"""The type and the range of every number in user input. ranges.json has the table, docs/flags.md shows it.

    problem("num_layers", 0)                       # "found 0, expected 1 to 1024"
    parser.add_argument("--keep-last", type=flag_type("keep_last"))

Flags, the YAML of reinforcement learning and `config.json` share the names of the table: those of Megatron's
arguments. `HF_NAMES` maps the names of `config.json` to them. A key such as "sampling_config.temperature" holds for
that section of the YAML only. Numbers that are not in the table must be finite and fit into 64 bits.

The size limits are far above every published model. They prevent endless work after a wrong digit in a file, because
tensor names are listed per layer and expert.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minimind_mcore.paths import package_json

Number = int | float


@dataclass(frozen=True)
class Range:
    """The allowed values of a field.

    Attributes:
        kind: int, or float (which accepts integers too).
        low: smallest value. None: any.
        high: largest value. None: any.
        above: `low` itself is excluded.
        below: `high` itself is excluded.
        hint: what to do instead, appended to the message.
    """

    kind: type[int] | type[float]
    low: Number | None = None
    high: Number | None = None
    above: bool = False
    below: bool = False
    hint: str = ""

    def problem(self, value: object) -> str | None:
        """Return what is wrong with a value, or None."""
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return f"found {value!r}, expected {'a whole number' if self.kind is int else 'a number'}"
        if not _fits(value):
            return f"found {_shown(value)}, expected {self} (a finite number that fits into 64 bits){self.hint}"
        low = self.low is None or (value > self.low if self.above else value >= self.low)
        high = self.high is None or (value < self.high if self.below else value <= self.high)
        return None if low and high else f"found {value}, expected {self}{self.hint}"

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            least = f"more than {self.low}" if self.above else f"{self.low} or more"
            return "any number" if self.low is None else least
        if self.above:
            return f"more than {self.low}, {'less than' if self.below else 'at most'} {self.high}"
        return f"{self.low} to {'less than ' if self.below else ''}{self.high}"


def _fits(value: Number) -> bool:
    return -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)


def _shown(value: Number) -> str:
    """Format a number for a message. Python refuses to print integers with thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return str(value)


ANY = {int: Range(int), float: Range(float)}


def _read() -> tuple[dict[str, Range], dict[str, str]]:
    """Return the ranges by name, and the table from names in config.json to these names."""
    content = package_json("inputs/ranges.json")
    rows = {name: row for group in content["groups"].values() for name, row in group.items()}
    found = {name: Range(**row | {"kind": int if row["kind"] == "int" else float}) for name, row in rows.items()}
    return found, content["config.json"]


RANGES, HF_NAMES = _read()


def find(name: str, section: str = "") -> Range | None:
    """Return the range of a field for its section, else for all sections. None if the table has neither."""
    return RANGES.get(f"{section}.{name}") or RANGES.get(name)


def problem(name: str, value: object, section: str = "") -> str | None:
    """Return what is wrong with a field's value. None if nothing is, or if it is not a number and has no range."""
    if found := find(name, section):
        return found.problem(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return ANY[int if isinstance(value, int) else float].problem(value)


def problems(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield the parsed arguments that are out of range, with the problem. None means that the flag is not given."""
    for name in RANGES:
        value = getattr(args, name, None)
        if value is not None and (wrong := problem(name, value)):
            yield name, wrong


def flag_type(name: str, kind: type[int] | type[float] | None = None) -> Callable[[str], Number]:
    """Return the `type` of a flag for argparse, which adds the flag's name to error messages.

    Args:
        name: the flag's dest.
        kind: int or float, for a flag that is not in the table or is read as another type than the table's.
    """
    found = RANGES.get(name) or ANY[kind or float]
    parsed: type[int] | type[float] = kind or found.kind

    def parse(text: str) -> Number:
        value = parsed(text)
        if wrong := found.problem(value):
            raise argparse.ArgumentTypeError(wrong)
        return value

    parse.__name__ = parsed.__name__  # argparse: "invalid int value"
    return parse

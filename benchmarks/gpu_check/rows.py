"""The results of the check: rows, the printed table, and the JSON file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "failed", "noted", "not measured"]
Value = float | int | str | None
LARGEST_FILE = 9_000_000  # bytes of the JSON and of the log, each
ROWS_FILE = "GPU_CHECK_ROWS"  # environment variable: the file that a check appends its rows to
MATMUL_RATE = "matrix products, bf16"  # row name; the unit is TFLOP/s
WIDEST_NAME, WIDEST_NOTE = 58, 160


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        name: name of the check or measurement.
        value: a number in `unit`, a word, or None.
        unit: unit of the value.
        status: "failed" makes the whole check fail. "noted" is a failure that is ignored. "not measured" marks a
            check without a result.
        note: reason of the status, or the reference that the value is compared with.
    """

    name: str
    value: Value = None
    unit: str = ""
    status: Status = "ok"
    note: str = ""


def emit(name: str, value: Value = None, unit: str = "", ok: bool = True, note: str = "") -> None:
    """Print a row, and append it to the results of this process's check."""
    if isinstance(value, float) and not math.isfinite(value):
        value, unit = str(value), ""  # JSON has no NaN
    row = Row(name, value, unit, "ok" if ok else "failed", note)
    print(f"{row.status}: {name} {formatted(row)} {note}".rstrip(), flush=True)
    if path := os.environ.get(ROWS_FILE):
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(asdict(row)) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a check. A line truncated by a kill is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(Row(**json.loads(line)))
        except ValueError:
            continue
    return rows


def formatted(row: Row) -> str:
    """Format value and unit for the table."""
    if row.value is None:
        return ""
    if isinstance(row.value, float):
        size = abs(row.value)
        text = f"{row.value:.2e}" if 0 < size < 1e-2 else f"{row.value:,.3f}" if size < 100 else f"{row.value:,.0f}"
    else:
        text = f"{row.value:,}" if isinstance(row.value, int) else row.value
    return f"{text} {row.unit}".strip()


def table(parts: Mapping[str, Sequence[Row]]) -> str:
    """Format the rows of all parts as an aligned table."""
    lines = []
    for part, rows in parts.items():
        lines.append(f"== {part}")
        width = min(WIDEST_NAME, max((len(row.name) for row in rows), default=0))
        for row in rows:
            text = f"  {row.name:<{width}}  {row.status:<12}  {formatted(row)}"
            lines.append(f"{text}  {row.note[:WIDEST_NOTE]}".rstrip())
    return "\n".join(lines)


def document(facts: dict[str, Value], parts: Mapping[str, Sequence[Row]]) -> str:
    """Return the JSON of a whole check. Notes are shortened so that it has at most `LARGEST_FILE` bytes."""
    for longest in (100_000, 1_000, 100, 0):
        body = {
            part: [asdict(row) | {"note": row.note[:longest], "name": row.name[:1_000]} for row in rows]
            for part, rows in parts.items()
        }
        text = json.dumps(facts | {"parts": body}, indent=1) + "\n"
        if len(text.encode()) <= LARGEST_FILE:
            break
    return text


def failed(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return the names of the failed rows with their part."""
    return [f"{part}: {row.name}" for part, rows in parts.items() for row in rows if row.status == "failed"]

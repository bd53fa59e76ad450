"""The pages for users, README and docs/, and what both languages of a page must share.

PYTHONPATH=tests python -m helpers.pages    # list pages whose counterpart changed later
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from helpers.engine import ROOT

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.S | re.M)
MONTHS = "January February March April May June July August September October November December".split()


def english_pages() -> list[Path]:
    """Return README.md and the English pages of docs/."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in pages if not page.stem.endswith("_zh")]


def counterpart(page: Path) -> Path:
    """Return the Chinese page of an English page."""
    return page.with_name(f"{page.stem}_zh.md")


def changed_later() -> list[tuple[Path, Path]]:
    """Return pairs of pages, old and new, whose last commits differ: the old one may lack what the new one says."""

    def last(page: Path) -> int:
        command = ["git", "log", "-1", "--format=%ct", "--", str(page)]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout or 0)

    pairs = [sorted((page, counterpart(page)), key=last) for page in english_pages()]
    return [(old, new) for old, new in pairs if last(old) != last(new)]


def commands(page: str | Path) -> list[str]:
    """Return the commands of a page's bash blocks. Lines that end in a backslash are joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


# A line that begins a command: settings, then a program.
PROGRAMS = "bash python3.10 python pip docker curl git apt cd cp ls export source npu-smi minimind-mcore".split()
COMMAND = re.compile(rf"""(?:[A-Z_]+=(?:"[^"]*"|\S+) )*(?:\.venv/bin/|\./|(?:{"|".join(map(re.escape, PROGRAMS))}) )""")


def all_commands(name: str) -> list[str]:
    """Return the commands of an English page: of its bash blocks, of blocks without a language, of indented blocks."""
    page = ROOT / ("README.md" if name == "README" else f"docs/{name}.md")
    text = page.read_text(encoding="utf-8")
    other = [body for language, body in FENCE.findall(text) if not language]
    other += re.findall(r"(?:^    .*\n)+", FENCE.sub("", text), re.M)
    lines = [" ".join(line.split()) for line in "".join(other).replace("\\\n", " ").splitlines()]
    found = [*commands(page), *filter(COMMAND.match, lines)]
    return [re.sub(r"\s+# .*", "", command) for command in found if not command.startswith("#")]


@dataclass(frozen=True)
class Row:
    """A row of a table: the code of each cell, and the numbers outside code."""

    code: tuple[frozenset[str], ...]
    numbers: frozenset[str]


@dataclass(frozen=True)
class Content:
    """What the two languages of a page must have in common."""

    headings: list[int]  # levels
    code: list[tuple[str, list[str]]]  # language and lines, without comments
    tables: list[list[Row]]
    pictures: list[str]
    numbers: frozenset[str]


def content(page: Path) -> Content:
    """Read a page."""
    text = page.read_text(encoding="utf-8")
    blocks = [(language, _without_comments(body)) for language, body in FENCE.findall(text) if language != "{toctree}"]
    text = FENCE.sub("", text)
    tables: list[list[Row]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            tables[-1].append(Row(tuple(frozenset(re.findall(r"`[^`]+`", cell)) for cell in cells), _numbers(line)))
        elif tables[-1]:
            tables.append([])
    return Content(
        headings=[len(marks) for marks in re.findall(r"^(#+) ", text, re.M)],
        code=blocks,
        tables=tables,
        pictures=re.findall(r"!\[[^\]]*\]\(([^)]*?)(?:_zh)?(?:\.png)?\)", text),  # a page of the kit in its language
        numbers=_numbers(text),
    )


def _without_comments(body: str) -> list[str]:
    lines = [re.sub(r"\s+#.*", "", line) for line in body.splitlines()]
    return [line for line in lines if not line.startswith("#")]


def _numbers(text: str) -> frozenset[str]:
    """The numbers outside code and addresses. A month counts as its number, as Chinese writes it."""
    for number, month in enumerate(MONTHS, 1):
        text = re.sub(rf"\b{month}\b", str(number), text)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    return frozenset(number.rstrip(",.") for number in re.findall(r"(?<![\w.])\d[\d,.]*(?:e-\d+)?", text))


if __name__ == "__main__":
    for old, new in changed_later():
        print(f"{new.relative_to(ROOT)} changed after {old.relative_to(ROOT)}")

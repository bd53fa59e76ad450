"""The published files that can be downloaded: names, places, licences, and what replaced the withdrawn ones."""

from __future__ import annotations

import functools
import json
from typing import TypedDict

from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.paths import PACKAGE


class Entry(TypedDict, total=False):
    """A published file or directory.

    Attributes:
        hf: repository on Hugging Face.
        modelscope: repository on ModelScope.
        files: file names in the repository; without them all files.
        gb: size of the download, as published; for the disk check.
        sha256: of each file, where its digest is published.
        licence: as the repository names it.
    """

    hf: str
    modelscope: str
    files: list[str]
    gb: float
    sha256: dict[str, str]
    licence: str


class Tables(TypedDict):
    """The whole file: entries by kind and name; successors of withdrawn names."""

    data: dict[str, Entry]
    weights: dict[str, Entry]
    tokenizer: dict[str, Entry]
    withdrawn: dict[str, str]


@functools.cache
def tables() -> Tables:
    """Return the tables."""
    found: Tables = json.loads((PACKAGE / "pipeline/downloads.json").read_text(encoding="utf-8"))
    return found


def successor(name: str) -> str:
    """Return the end of a message about a withdrawn file, or nothing."""
    new = tables()["withdrawn"].get(name)
    return f": upstream withdrew {name}; its replacement is {new} (minimind-mcore download data {new})" if new else ""


def find(kind: str, name: str) -> Entry:
    """Return the entry of a name.

    Raises:
        UserError: there is none, or upstream withdrew it.
    """
    entries: dict[str, Entry] = tables()[kind]  # type: ignore[literal-required]
    if name in entries:
        return entries[name]
    if text := successor(name):
        raise UserError(f"download {kind} {name}{text}")
    hint = did_you_mean(name, entries)
    raise UserError(f"download {kind}: {name} is not in the table{hint}; it has {', '.join(entries)}")

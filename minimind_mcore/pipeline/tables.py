"""The published files that can be downloaded: names, places, licences, and what replaced the withdrawn ones."""

from __future__ import annotations

import functools
import json
from typing import Any, TypedDict

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


KINDS = ("data", "weights", "tokenizer", "reward-model")


def _file() -> Any:
    return json.loads((PACKAGE / "pipeline/downloads.json").read_text(encoding="utf-8"))


@functools.cache
def tables() -> dict[str, dict[str, Entry]]:
    """Return the entries by kind and name."""
    found: dict[str, dict[str, Entry]] = _file()
    return {kind: found[kind] for kind in KINDS}


@functools.cache
def withdrawn() -> dict[str, str]:
    """Return the successors of withdrawn data files by name."""
    found: dict[str, str] = _file()["withdrawn"]
    return found


def successor(name: str) -> str:
    """Return the end of a message about a withdrawn file, or nothing."""
    new = withdrawn().get(name)
    return f": upstream withdrew {name}; its replacement is {new} (minimind-mcore download data {new})" if new else ""


def find(kind: str, name: str) -> Entry:
    """Return the entry of a name.

    Raises:
        UserError: there is none, or upstream withdrew it.
    """
    entries = tables()[kind]
    if name in entries:
        return entries[name]
    if command := _file()["made"].get(name):
        raise UserError(f"download {kind} {name}: nobody publishes this file; make it with {command}")
    if text := successor(name):
        raise UserError(f"download {kind} {name}{text}")
    hint = did_you_mean(name, entries)
    raise UserError(f"download {kind}: {name} is not in the table{hint}; it has {', '.join(entries)}")

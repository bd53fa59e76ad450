"""The table of downloadable files: names, repositories, licences, and successors of withdrawn files."""

from __future__ import annotations

from typing import TypedDict

from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.paths import package_json


class Entry(TypedDict, total=False):
    """A published file or directory.

    Attributes:
        hf: repository on Hugging Face.
        modelscope: repository on ModelScope.
        files: file names in the repository. If missing, all files are downloaded.
        gb: size of the download in GB, for the disk check.
        sha256: digest of each file that has a published one.
        licence: licence named by the repository.
    """

    hf: str
    modelscope: str
    files: list[str]
    gb: float
    sha256: dict[str, str]
    licence: str


KINDS = ("data", "weights", "tokenizer", "reward-model")


TABLE = "pipeline/downloads.json"


def tables() -> dict[str, dict[str, Entry]]:
    """Return the entries by kind and name."""
    return {kind: package_json(TABLE)[kind] for kind in KINDS}


def successor(name: str) -> str:
    """Return a message suffix that names the successor of a withdrawn file, or an empty string."""
    new = package_json(TABLE)["withdrawn"].get(name)
    return f": upstream withdrew {name}; its replacement is {new} (minimind-mcore download data {new})" if new else ""


def find(kind: str, name: str) -> Entry:
    """Return the entry with this name.

    Raises:
        UserError: no such entry exists, or upstream withdrew the file.
    """
    entries = tables()[kind]
    if name in entries:
        return entries[name]
    if command := package_json(TABLE)["made"].get(name):
        raise UserError(f"download {kind} {name}: this file is not published anywhere; make it with {command}")
    if text := successor(name):
        raise UserError(f"download {kind} {name}{text}")
    hint = did_you_mean(name, entries)
    raise UserError(f"download {kind}: {name} is not in the table{hint}; it has {', '.join(entries)}")

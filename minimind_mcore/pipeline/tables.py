"""The table of downloadable files: names, repositories, licences, and successors of withdrawn files."""

from __future__ import annotations

from pathlib import Path
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
        fingerprint: fingerprint of a tokenizer, see `preprocess.tokenize.tokenizer_fingerprint`.
    """

    hf: str
    modelscope: str
    files: list[str]
    gb: float
    sha256: dict[str, str]
    licence: str
    fingerprint: str


KINDS = ("data", "weights", "tokenizer", "reward-model")


TABLE = "pipeline/downloads.json"
LFS_POINTER = b"version https://git-lfs"  # beginning of the text that Git stores in place of a large file


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
    name = name.removesuffix(".jsonl") if kind == "data" else name
    if name in entries:
        return entries[name]
    if command := package_json(TABLE)["made"].get(name):
        raise UserError(f"download {kind} {name}: this file is not published anywhere; make it with {command}")
    if text := successor(name):
        raise UserError(f"download {kind} {name}{text}")
    same = [known for known in entries if known.lower() == name.lower()]
    hint = f"; did you mean {same[0]}?" if same else did_you_mean(name, entries)
    raise UserError(f"download {kind}: {name} is not in the table{hint}; it has {', '.join(entries)}")


def require_content(file: Path, other: str) -> None:
    """Check that a file, if it exists, is neither empty nor a Git LFS pointer.

    Args:
        file: data file, or tokenizer.json.
        other: what the user can give instead, for the message.

    Raises:
        UserError: the file has no data.
    """
    if not file.is_file():
        return
    with file.open("rb") as opened:
        begin = opened.read(len(LFS_POINTER))
    if begin and begin != LFS_POINTER:
        return
    found = "a Git LFS pointer, which only names the content" if begin else "an empty file"
    raise UserError(
        f"{file}: found {found}, expected the content itself. Delete the file and run the stage download, or give "
        f"{other}"
    )

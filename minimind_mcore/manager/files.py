"""The files that jobs may read: which directories they are in, and lists of datasets, checkpoints and tokenizers."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind_mcore.checkpoint.tracker import TRACKER
from minimind_mcore.errors import UserError, shown
from minimind_mcore.preprocess.indexed import datasets_at

DEPTH = 6  # directories below a readable one that are searched
MOST = 1000  # entries of a list
LONGEST = 1000  # characters of a path
DATA = (".jsonl", ".parquet", ".txt", ".csv")
CONVERTED = "_document.idx"
SPLITS = ("val", "dev", "test")  # directories of a benchmark
OF_THE_KIT = ("cache", "logs", "records", "tokenizer")  # directories whose text files are no data
OF_MODELS = {TRACKER, "tokenizer.json", "config.json"}  # text next to them, such as merges.txt, is no data


@dataclass(frozen=True)
class Directories:
    """Directories of the manager.

    Attributes:
        jobs: has a directory for each job, with what the job writes.
        data: of the data files, where minimind-ascend's API looks names up.
        readable: directories whose files jobs may read; `jobs` and `data` are among them.
        trusts_reward_models: jobs may use reward models, whose directories have Python code that is run.
    """

    jobs: Path
    data: Path
    readable: tuple[Path, ...]
    trusts_reward_models: bool = False

    def check(self, name: str, text: str, is_dataset: bool = False) -> str:
        """Return a path of a request as an absolute one, links resolved.

        Args:
            name: of the field.
            text: the path, absolute or relative to the current directory.
            is_dataset: it may be the prefix of a converted dataset.

        Raises:
            UserError: nothing is there, or it is outside of the readable directories.
        """
        if len(text) > LONGEST or not text.isprintable():
            raise UserError(f"{name}: found {shown(text)}, expected a path of at most {LONGEST} printable characters")
        path = Path(text).resolve()
        if not any(path.is_relative_to(place.resolve()) for place in self.readable):
            raise UserError(
                f"{name}: {shown(text)} is outside of the directories that jobs may read: "
                f"{', '.join(map(str, self.readable))}. Start the manager with --allow DIRECTORY to add one"
            )
        if not path.exists() and not (is_dataset and datasets_at(path)):
            raise UserError(f"{name}: {shown(text)} does not exist; choose one of the list")
        return str(path)

    def datasets(self) -> list[dict[str, object]]:
        """Return raw data files, and prefixes of converted datasets. Jobs write no raw data."""
        found: dict[str, int] = {}
        for folder, _, files in self._walk():
            is_raw = not folder.is_relative_to(self.jobs) and folder.name not in OF_THE_KIT
            suffixes = [name for name in DATA if is_raw and not (name == ".txt" and OF_MODELS & set(files))]
            for file in files:
                path = folder / file
                if path.suffix in suffixes and file not in ("metrics.jsonl", "samples.jsonl"):
                    found[str(path)] = _size(path)
                    if folder.name in SPLITS and path.suffix == ".csv":  # of a benchmark, which is read as a whole
                        found[str(folder.parent)] = found.get(str(folder.parent), 0) + _size(path)
                elif file.endswith(CONVERTED):
                    prefix = str(path.with_suffix("")).partition("_packed_")[0]
                    found[prefix] = found.get(prefix, 0) + _size(path.with_suffix(".bin"))
        return [entry(Path(path), size) for path, size in sorted(found.items())[:MOST]]

    def checkpoints(self) -> list[dict[str, object]]:
        """Return directories of Megatron checkpoints, Hugging Face models and .pth files."""
        found: list[dict[str, object]] = []
        for folder, folders, files in self._walk():
            if TRACKER in files or any(file.endswith(".safetensors") for file in files):
                found.append(entry(folder))
                folders.clear()
            found += [entry(folder / file, _size(folder / file)) for file in files if file.endswith(".pth")]
        return sorted(found, key=lambda row: str(row["path"]))[:MOST]

    def tokenizers(self) -> list[dict[str, object]]:
        """Return directories with a tokenizer.json."""
        return [entry(folder, 0) for folder, _, files in self._walk() if "tokenizer.json" in files][:MOST]

    def _walk(self) -> Iterator[tuple[Path, list[str], Sequence[str]]]:
        """Yield each directory once, with its directories and files; links are not followed."""
        seen = set[Path]()
        for top in self.readable:
            for name, folders, files in os.walk(top):
                folder = Path(name)
                depth = len(folder.relative_to(top).parts)
                folders[:] = sorted(n for n in folders if not n.startswith(".") and depth < DEPTH)
                if (key := folder.resolve()) not in seen:
                    seen.add(key)
                    yield folder, folders, sorted(files)


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 of a directory, or of a file that a job has just removed."""
    try:
        found = path.lstat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def entry(path: Path, size: int | None = None) -> dict[str, object]:
    """Return name, path and size of a file or directory; a directory is measured unless its size is given."""
    size = sum(map(_size, path.rglob("*"))) if size is None else size
    return {"name": path.name, "path": str(path), "size_mb": round(size / 2**20, 2)}

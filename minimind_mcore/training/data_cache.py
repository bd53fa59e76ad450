"""megatron-core's cached sample orders, written atomically and verified with digests before use.

    CACHE/<hash>-GPTDataset-train-description.txt       the settings of the order
                                 -document_index.npy    -sample_index.npy -shuffle_index.npy
                                 -digests.json          size and SHA-256 of each file, written last

megatron-core loads any file with the right name. A file that a killed run left incomplete makes every later start
fail, and a file with another order silently trains on other samples. Here an order without matching digests is
rebuilt.
"""

from __future__ import annotations

import copy
import glob
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron.core.datasets import blended_dataset, blended_megatron_dataset_builder, gpt_dataset
from numpy.lib.format import MAGIC_PREFIX
from typing_extensions import override

from minimind_mcore.platform import ranks
from minimind_mcore.storage import (
    check_manifest,
    disk_errors,
    record_files,
    remove_abandoned,
    temporary_beside,
    writing,
)

logger = logging.getLogger(__name__)


class GPTDataset(gpt_dataset.GPTDataset):  # type: ignore[misc]
    """megatron-core's dataset. The class name is part of the names of cached files."""

    dataset: Any  # an IndexedDataset

    @override
    def _build_document_sample_shuffle_indices(self) -> Any:
        default = Path(self.dataset.path_prefix) / "cache" / f"{type(self).__name__}_indices"
        directory = Path(self.config.path_to_cache or default)
        return _cached(self, directory, self.index_split.name, super()._build_document_sample_shuffle_indices)


class BlendedDataset(blended_dataset.BlendedDataset):  # type: ignore[misc]
    """megatron-core's blend of datasets. Without `--data-cache-path` the order of the blend is not cached."""

    @override
    def _build_indices(self) -> Any:
        if not self.config.path_to_cache:
            return super()._build_indices()
        return _cached(self, Path(self.config.path_to_cache), self.split.name, super()._build_indices)


class Builder(blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder):  # type: ignore[misc]
    """megatron-core's builder, which builds this module's `BlendedDataset`."""

    @staticmethod
    @override
    def build_generic_dataset(kind: type, *args: Any) -> Any:
        """Build a dataset as megatron-core does: on rank 0 first."""
        theirs = blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder
        return theirs.build_generic_dataset(BlendedDataset if kind is blended_dataset.BlendedDataset else kind, *args)


Cached = GPTDataset | BlendedDataset
T = TypeVar("T")


def _cached(dataset: Cached, directory: Path, split: str, build: Callable[[], T]) -> T:
    """Return the order that `build` makes or loads. Before that, the main rank replaces a damaged cached order."""
    if not ranks.is_main():
        return build()
    base = directory / f"{dataset.unique_description_hash}-{type(dataset).__name__}-{split}"
    record = Path(f"{base}-digests.json")
    if record.is_file():
        problems = check_manifest(directory, name=record.name) + _pickles(base)
        if not problems:
            return build()
        logger.warning("\n  ".join(["the cached sample order is damaged and is rebuilt:", *problems]))
    with writing(directory, "give a writable directory with --data-cache-path"):
        return _rebuilt(dataset, base, record, build)


def _pickles(base: Path) -> list[str]:
    """Return problems of files that numpy.load would unpickle. megatron-core allows pickles, which can run code."""
    files = sorted(base.parent.glob(f"{glob.escape(base.name)}-*.npy"))
    return [f"{file}: not an array of numpy" for file in files if not _is_array(file)]


def _is_array(file: Path) -> bool:
    with open(file, "rb") as content:
        return content.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX


def _rebuilt(dataset: Cached, base: Path, record: Path, build: Callable[[], T]) -> T:
    """Build the order in a temporary directory, then move its files to the cache, and the digests last."""
    remove_abandoned(base)
    tmp, config = temporary_beside(base), dataset.config
    tmp.mkdir(parents=True)
    try:
        dataset.config = copy.copy(config)  # the original is shared with datasets that other threads may be building
        dataset.config.path_to_cache = os.fspath(tmp)
        with disk_errors(tmp):  # numpy errors have no errno, so the written file is checked
            found = build()
        record.unlink(missing_ok=True)
        files = sorted(tmp.iterdir())
        for file in files:
            os.replace(file, base.parent / file.name)
        record_files(record, [base.parent / file.name for file in files])
    finally:
        dataset.config = config
        shutil.rmtree(tmp, ignore_errors=True)
    return found

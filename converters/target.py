"""What a conversion writes to: files whose every byte has its place before the first is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minimind_mcore.checkpoint.source import Lazy
from minimind_mcore.checkpoint.tensors import TensorWriter
from minimind_mcore.storage import FileEntry


class Target(ABC):
    """Files to fill. `create` makes them, `write` fills them, `finish` adds small ones, `record` the manifest."""

    single_file: str | None = None  # its name, where the output is no directory

    def __init__(self) -> None:
        self.writers: list[TensorWriter] = []

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all tensors."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """For people: what is written."""

    @abstractmethod
    def create(self, root: Path) -> None:
        """Make the files in an empty directory, at their full sizes."""

    @abstractmethod
    def write(self, name: str, whole: Tensor) -> None:
        """Write all that comes of one tensor of the whole megatron-core model."""

    @abstractmethod
    def finish(self) -> None:
        """Write what is not tensors; then it can be opened."""

    @abstractmethod
    def record(self, manifest: Mapping[str, FileEntry], about: Mapping[str, object]) -> None:
        """Write the manifest, and what must come last.

        Args:
            manifest: size and digest of every tensor file, by its path below the root.
            about: what else the manifest says.
        """

    def reopen(self, root: Path) -> Mapping[str, Lazy]:
        """The tensors of the whole megatron-core model, as they are read from what was written."""
        from minimind_mcore.checkpoint.opening import open_source

        return open_source(root).tensors

    def unwritten(self) -> list[str]:
        """Places for tensors of which a byte was not written, or was written twice."""
        return [f"{writer.path.name}: {name}" for writer in self.writers for name in writer.unwritten()]

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self.writers:
            writer.abandon()

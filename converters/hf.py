"""Write directories of transformers and MiniMind, and `.pth` files; `checkpoint/hf.py` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minimind_mcore.checkpoint.hf import WEIGHTS
from minimind_mcore.checkpoint.source import Lazy, Source
from minimind_mcore.checkpoint.tensors import Slot, create_safetensors
from minimind_mcore.checkpoint.torch_zip import create_torch
from minimind_mcore.converters import hf_files
from minimind_mcore.converters.target import Target
from minimind_mcore.models import weights
from minimind_mcore.models.hf_config import hf_model_type
from minimind_mcore.models.rules import Rule, Zeros
from minimind_mcore.storage import FileEntry, file_entry, write_manifest

SHARD_BYTES = 2 << 30


class StateTarget(Target):
    """A state dict of transformers or MiniMind, in whatever files.

    Args:
        source: what is converted.
        form: one of `weights.FORMS`.
    """

    def __init__(self, source: Source, form: str) -> None:
        super().__init__()
        self.source, self.form = source, form
        self._zeros: list[Rule] = []
        self._rules: dict[str, list[Rule]] = {}
        self.slots: dict[str, Slot] = {}
        for rule in weights.rules(source.config, form):
            if not rule.written:
                continue
            if isinstance(rule, Zeros):
                self._zeros.append(rule)
            for name in rule.mcore:
                self._rules.setdefault(name, []).append(rule)
            dtype = source.tensors[rule.mcore[0]].dtype if rule.mcore else source.dtype
            self.slots |= {name: Slot(shape, dtype) for name, shape in zip(rule.hf, rule.shapes, strict=True)}

    @property
    def nbytes(self) -> int:
        """See `Target`."""
        return sum(slot.nbytes for slot in self.slots.values())

    def write(self, name: str, whole: Tensor) -> None:
        """See `Target`."""
        for rule in self._rules[name]:
            for hf_name, tensor in zip(rule.hf, rule.to_hf([whole]), strict=True):
                self._write(hf_name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        next(writer for writer in self.writers if name in writer.entries).write(name, tensor)

    def _write_zeros(self) -> None:
        for rule in self._zeros:
            for name, tensor in zip(rule.hf, rule.to_hf([]), strict=True):
                self._write(name, tensor.to(self.slots[name].dtype))


class HFTarget(StateTarget):
    """A directory of transformers: safetensors, config, generation config, tokenizer.

    Args:
        source: what is converted.
        native: in MiniMind's own form.
        folder: where config and tokenizer come from, if not the source's.
        copy_code: whether MiniMind's modelling code is copied with its own form; transformers runs that code.
        shard_bytes: largest size of a file, unless one tensor is larger.
    """

    def __init__(
        self,
        source: Source,
        *,
        native: bool,
        folder: Path | None,
        copy_code: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        super().__init__(source, "native" if native else "hf")
        self.folder, self.copy_code, self.shard_bytes = folder, copy_code, shard_bytes
        self._root = Path()

    @property
    def kind(self) -> str:
        """See `Target`."""
        what = "MiniMind's own form" if self.form == "native" else hf_model_type(self.source.config)
        return f"Hugging Face directory, {what}"

    def create(self, root: Path) -> None:
        """See `Target`."""
        self._root = root
        shards: list[dict[str, Slot]] = [{}]
        for name, slot in self.slots.items():
            if shards[-1] and sum(s.nbytes for s in shards[-1].values()) + slot.nbytes > self.shard_bytes:
                shards.append({})
            shards[-1][name] = slot
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        names = names if len(shards) > 1 else [WEIGHTS[0]]
        self.writers = [create_safetensors(root / n, slots) for n, slots in zip(names, shards, strict=True)]
        if len(shards) > 1:
            index = {name: file for file, slots in zip(names, shards, strict=True) for name in slots}
            text = json.dumps({"metadata": {"total_size": self.nbytes}, "weight_map": index}, indent=1)
            (root / f"{WEIGHTS[0]}.index.json").write_text(text + "\n", encoding="utf-8")
        self._write_zeros()

    def finish(self) -> None:
        """See `Target`."""
        native = self.form == "native"
        hf_files.write(self._root, self.source, native=native, folder=self.folder, copy_code=self.copy_code)

    def record(self, manifest: Mapping[str, FileEntry], about: Mapping[str, object]) -> None:
        """See `Target`."""
        small = {p.name: file_entry(p) for p in sorted(self._root.iterdir()) if p.name not in manifest}
        write_manifest(self._root, {**manifest, **small}, **about)


class PthTarget(StateTarget):
    """A `.pth` of MiniMind's trainer: one state dict of today's names.

    Args:
        source: what is converted.
    """

    single_file: str = "weights.pth"  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, source: Source) -> None:
        super().__init__(source, "native")

    @property
    def kind(self) -> str:
        """See `Target`."""
        return "MiniMind .pth"

    def create(self, root: Path) -> None:
        """See `Target`."""
        self.writers = [create_torch(root / self.single_file, {}, {"": self.slots})]

    def finish(self) -> None:
        """See `Target`: nothing."""

    def record(self, manifest: Mapping[str, FileEntry], about: Mapping[str, object]) -> None:
        """See `Target`: a single file has no manifest."""

    def reopen(self, root: Path) -> Mapping[str, Lazy]:
        """See `Target`. The architecture is given: a file of weights does not tell all of it."""
        from minimind_mcore.checkpoint.minimind import open_pth

        return open_pth(root / self.single_file, self.source.config).tensors

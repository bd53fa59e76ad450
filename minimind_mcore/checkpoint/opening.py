"""Open a model of any format. The format is inferred from the files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minimind_mcore.checkpoint.files import is_torch_dist, iteration_directory
from minimind_mcore.checkpoint.hf import is_hf, open_hf
from minimind_mcore.checkpoint.megatron import open_megatron
from minimind_mcore.checkpoint.minimind import is_pth, open_pth
from minimind_mcore.checkpoint.source import Source
from minimind_mcore.errors import UserError, naming
from minimind_mcore.models.config import ModelConfig


def open_source(path: Path, config: ModelConfig | None = None, stated: Mapping[str, object] | None = None) -> Source:
    """Open a model: a Hugging Face or MiniMind directory, a `.pth` file, or a Megatron checkpoint.

    Args:
        path: file or directory.
        config: the architecture, for formats that store only part of it.
        stated: values of the architecture by field, instead of the assumed values of a `.pth` file.

    Raises:
        UserError: the path does not exist, is not a model, is damaged, or contradicts `config`.
    """
    with naming(path):
        return _open(path, config, stated)


def _open(path: Path, config: ModelConfig | None, stated: Mapping[str, object] | None) -> Source:
    if not path.exists():
        raise UserError(f"{path}: does not exist; expected a model: a directory or a .pth file")
    if is_pth(path):
        return open_pth(path, config, stated or {})
    if is_hf(path):
        return open_hf(path, config)
    directory = iteration_directory(path)
    if directory is None:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{path}: found {found}; expected a Hugging Face directory (config.json), a Megatron checkpoint "
            "(latest_checkpointed_iteration.txt, or mp_rank_*), or a .pth file of MiniMind"
        )
    if is_torch_dist(directory):
        from minimind_mcore.checkpoint.megatron_dist import open_megatron_dist

        return open_megatron_dist(directory, config)
    return open_megatron(directory, config)

"""State dicts through the kit's own reader, for tests that hold weights in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from minimind_mcore.checkpoint.hf import assemble, open_tensors
from minimind_mcore.models.config import ModelConfig


def hf_to_mcore(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the whole megatron-core model of a state dict of transformers or MiniMind.

    Raises:
        UserError: the state dict is not that of the model; see `assemble`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, file)
        source = assemble(file, "state dict", config, [open_tensors(file)])
        for check in source.checks:
            check()
        return {name: tensor.read() for name, tensor in source.tensors.items()}

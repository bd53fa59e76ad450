"""Load whole tensors into models in any parallel layout.

Each parameter of a rank's model chunks is identified by its name in the whole model: layers and experts are numbered
from 0, as in `weights.py`. Requires megatron-core's parallel state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.wrappers import unwrap

_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def whole_model_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this rank's parameters by their names in the whole model.

    Args:
        chunks: GPTModels of this rank, one per virtual pipeline stage, with or without wrappers (mixed
            precision, data parallel).
    """
    for model in map(unwrap, chunks):
        for name, parameter in model.named_parameters():
            yield _whole_name(model, name), parameter


def _whole_name(model: Any, name: str) -> str:
    match = _LAYER.match(name)
    if match is None:
        # The last pipeline stage of a tied model has a copy of the embedding.
        tied = name == weights.OUTPUT and model.share_embeddings_and_output_weights
        return weights.EMBEDDING if tied else name
    layer = model.decoder.layers[int(match[1])]
    name = f"decoder.layers.{layer.layer_number - 1}.{name[match.end() :]}"
    if expert := _EXPERT.search(name):
        index = layer.mlp.local_expert_indices[int(expert[1])]
        name = name.replace(expert[0], f".local_experts.{index}.")
    return name


@torch.no_grad()
def load_into(chunks: Sequence[torch.nn.Module], whole: Callable[[str], Tensor]) -> None:
    """Set every parameter of this rank to its shard of `whole(name)`, cast to the parameter's dtype.

    Raises:
        UserError: a shard and its parameter have different shapes.
    """
    for name, parameter in whole_model_parameters(chunks):
        rank, size = tensor_parallel_rank(name)
        part = weights.shard(name, whole(name), rank, size)
        if part.shape != parameter.shape:
            raise UserError(f"{name}: found {tuple(part.shape)} for this rank, expected {tuple(parameter.shape)}")
        parameter.copy_(part)


def tensor_parallel_rank(name: str) -> tuple[int, int]:
    """Return rank and size of the tensor parallelism that splits this parameter. Experts have their own."""
    ps: Any = parallel_state
    if _EXPERT.search(name):
        return ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size()
    return ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()

"""Weights from the training ranks, in any layout, to a rollout engine.

Each rank gives the shards that it alone holds (`shards`); whoever needs the model joins them (`join`) and takes
it through the table of `models/weights.py`, as the converters do. No rank ever holds the whole model for it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minimind_mcore.models.weights import is_split, unshard


@dataclass(frozen=True)
class WeightShard:
    """A rank's part of a tensor of the whole megatron-core model.

    Attributes:
        name: of the tensor in the whole model.
        rank: in tensor parallelism.
        size: of tensor parallelism.
        data: its bytes, which Ray passes between processes of a host without a copy.
        dtype: of the tensor, such as "bfloat16".
        shape: of the part.
    """

    name: str
    rank: int
    size: int
    data: NDArray[np.uint8]
    dtype: str
    shape: tuple[int, ...]

    @property
    def tensor(self) -> Tensor:
        """The part; it shares the memory of `data`, and is not to be written to."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no tensors that are not to be written to
            flat = torch.from_numpy(self.data)
        return flat.view(getattr(torch, self.dtype)).view(self.shape)


def shards(chunks: Sequence[Any]) -> list[WeightShard]:
    """What this rank adds to the whole model; of copies that several ranks hold, one rank gives its own."""
    from megatron.core import parallel_state as ps

    from minimind_mcore.models.loading import tensor_parallel_place, whole_model_parameters

    found = []
    for name, parameter in whole_model_parameters(chunks):
        replica = ps.get_expert_data_parallel_rank() if ".local_experts." in name else ps.get_data_parallel_rank()
        if replica:
            continue
        rank, size = tensor_parallel_place(name) if is_split(name) else (ps.get_tensor_model_parallel_rank(), 1)
        if rank >= size:
            continue
        tensor = parameter.detach().cpu().contiguous()
        data = tensor.flatten().view(torch.uint8).numpy()
        found.append(WeightShard(name, rank, size, data, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
    return found


def join(parts: Iterable[Sequence[WeightShard]]) -> dict[str, Tensor]:
    """The whole megatron-core model, from the shards of all ranks in any order.

    Raises:
        RuntimeError: a part is missing.
    """
    by_name: dict[str, dict[int, WeightShard]] = defaultdict(dict)
    for shard in (shard for part in parts for shard in part):
        by_name[shard.name][shard.rank] = shard
    for name, ranks in by_name.items():
        size = next(iter(ranks.values())).size
        if sorted(ranks) != list(range(size)):
            raise RuntimeError(f"weight sync: {name} has parts {sorted(ranks)} of {size}")
    return {name: unshard(name, [ranks[rank].tensor for rank in sorted(ranks)]) for name, ranks in by_name.items()}

"""Weights from the training ranks, in any layout, to a rollout engine.

The model is sent in buckets of a bounded size (`buckets`). For each bucket every rank gives the shards that it alone
holds (`shards`). The engine joins them (`join`) and takes them through the table of `models/weights.py`, as the
converters do. Neither a rank nor the object store ever holds the whole model for the transfer.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minimind_mcore.checkpoint.lora import without_base_layer
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.weights import is_split, mcore_shapes, unshard

BUCKET_BYTES = 32 * 2**20
IN_FLIGHT = 2  # buckets: one is loaded while the next one is on its way


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


@dataclass(frozen=True)
class WeightVersion:
    """What an engine needs to know to ask for the weights of one moment.

    Attributes:
        number: changes when the weights do.
        buckets: names of the tensors that are sent together; see `buckets`.
    """

    number: int
    buckets: list[list[str]]


def buckets(config: ModelConfig, bytes_per_element: int, limit: int = BUCKET_BYTES) -> list[list[str]]:
    """Names of the whole model's tensors, in the model's order, in groups of at most `limit` bytes.

    A tensor that is larger than `limit` has a bucket of its own.
    """
    found: list[list[str]] = []
    room = 0
    for name, shape in mcore_shapes(config).items():
        size = prod(shape) * bytes_per_element
        if size > room:
            found.append([])
            room = limit
        found[-1].append(name)
        room -= size
    return found


@dataclass(frozen=True)
class WeightPart:
    """A tensor that this rank adds to the whole model.

    Attributes:
        rank: in tensor parallelism.
        size: of tensor parallelism.
        held: the tensor.
        adapter: A and B of LoRA, whose product with `scale` is added; tensor parallelism has cut one of them.
        scale: alpha / r.
    """

    rank: int
    size: int
    held: Tensor
    adapter: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0

    def tensor(self) -> Tensor:
        """The tensor with its adapter, summed in fp32, on the CPU."""
        if self.adapter is None:
            return self.held.cpu()
        a, b = self.adapter
        return (self.held.float() + self.scale * (b.float() @ a.float())).to(self.held.dtype).cpu()

    def copied(self) -> WeightPart:
        """The same, of tensors that nothing changes."""
        return WeightPart(self.rank, self.size, self.tensor().clone())


def parts(chunks: Sequence[Any], scale: float = 1.0) -> dict[str, WeightPart]:
    """What this rank adds to the whole model; of copies that several ranks hold, one rank gives its own.

    Args:
        chunks: of this rank.
        scale: alpha / r of the chunks' LoRA adapters, if they have any.
    """
    from megatron.core import parallel_state as ps

    from minimind_mcore.models.loading import tensor_parallel_rank, whole_model_parameters

    found = {}
    held = {name: parameter.detach() for name, parameter in whole_model_parameters(chunks)}
    for given in [name for name in held if ".lora_" not in name]:
        module, name = given.removesuffix(".base_layer.weight"), without_base_layer(given)
        adapter = None
        if given != name:
            adapter = (held[f"{module}.lora_A.default.weight"], held[f"{module}.lora_B.default.weight"])
        replica = ps.get_expert_data_parallel_rank() if ".local_experts." in name else ps.get_data_parallel_rank()
        rank, size = tensor_parallel_rank(name) if is_split(name) else (ps.get_tensor_model_parallel_rank(), 1)
        if not replica and rank < size:
            found[name] = WeightPart(rank, size, held[given], adapter, scale)
    return found


def shards(own: dict[str, WeightPart], names: Collection[str] | None = None) -> list[WeightShard]:
    """The shards of a rank's `parts` that have these names; without names all of them."""
    found = []
    for name in own if names is None else [name for name in names if name in own]:
        part = own[name]
        tensor = part.tensor().contiguous()
        data = tensor.flatten().view(torch.uint8).numpy()
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(WeightShard(name, part.rank, part.size, data, dtype, tuple(tensor.shape)))
    return found


def join(given: Iterable[Sequence[WeightShard]]) -> dict[str, Tensor]:
    """Whole tensors of the megatron-core model, from the shards of all ranks in any order.

    Raises:
        RuntimeError: a part is missing.
    """
    by_name: dict[str, dict[int, WeightShard]] = defaultdict(dict)
    for shard in (shard for part in given for shard in part):
        by_name[shard.name][shard.rank] = shard
    for name, ranks in by_name.items():
        size = next(iter(ranks.values())).size
        if sorted(ranks) != list(range(size)):
            raise RuntimeError(f"weight sync: {name} has parts {sorted(ranks)} of {size}")
    return {name: unshard(name, [ranks[rank].tensor for rank in sorted(ranks)]) for name, ranks in by_name.items()}

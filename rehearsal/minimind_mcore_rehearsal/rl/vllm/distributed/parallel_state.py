"""Process groups under the names that vLLM gives them; MindSpeed-RL sets `_TP`, `_PP`, `_EP` and `_DP`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


class GroupCoordinator:
    def __init__(
        self, group_ranks: Sequence[Sequence[int]], local_rank: int, backend: str,
        use_message_queue_broadcaster: bool = False, group_name: str | None = None,
    ) -> None:  # fmt: skip
        self.rank, self.local_rank, self.group_name = dist.get_rank(), local_rank, group_name
        for ranks in group_ranks:
            group = dist.new_group(list(ranks), backend=backend)
            if self.rank in ranks:
                self.ranks, self.device_group = list(ranks), group
        self.cpu_group = self.device_group
        self.world_size = len(self.ranks)
        self.rank_in_group = self.ranks.index(self.rank)

    first_rank = property(lambda self: self.ranks[0])
    last_rank = property(lambda self: self.ranks[-1])
    is_first_rank = property(lambda self: self.rank == self.first_rank)
    is_last_rank = property(lambda self: self.rank == self.last_rank)


_WORLD: Any = None
_TP: Any = None
_PP: Any = None
_EP: Any = None
_DP: Any = None

init_model_parallel_group = GroupCoordinator


def init_distributed_environment(
    world_size: int = -1, rank: int = -1, distributed_init_method: str = "env://", local_rank: int = -1,
    backend: str = "hccl",
) -> None:  # fmt: skip
    global _WORLD
    if not dist.is_initialized():
        dist.init_process_group(backend=backend, init_method=distributed_init_method, world_size=world_size, rank=rank)
    if _WORLD is None:
        _WORLD = GroupCoordinator([list(range(dist.get_world_size()))], local_rank, backend, group_name="world")


def get_world_group() -> Any:
    return _WORLD


def get_tp_group() -> Any:
    return _TP


def get_pp_group() -> Any:
    return _PP


def get_ep_group() -> Any:
    return _EP


def get_dp_group() -> Any:
    return _DP


get_tensor_model_parallel_group = get_tp_group
get_pipeline_model_parallel_group = get_pp_group


def get_tensor_model_parallel_rank() -> int:
    return 0 if _TP is None else _TP.rank_in_group


def get_tensor_model_parallel_world_size() -> int:
    return 1 if _TP is None else _TP.world_size

"""Linear layers with vLLM's class names, whose weights MindSpeed-RL's resharding replaces."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ...distributed import parallel_state


def parts() -> int:
    """Tensor-parallel size of the rollout."""
    return parallel_state.get_tensor_model_parallel_world_size()


def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum over the tensor-parallel ranks."""
    if parts() > 1:
        dist.all_reduce(x, group=parallel_state.get_tp_group().device_group)
    return x


class Weights(torch.nn.Module):
    """A layer whose parameters have the `weight_loader` of its class, which MindSpeed-RL sets."""

    weight_loader: Any = None

    def hold(self, name: str, *shape: int, dtype: torch.dtype) -> None:
        parameter = torch.nn.Parameter(torch.empty(*shape, dtype=dtype).uniform_(-1e-3, 1e-3), requires_grad=False)
        if type(self).weight_loader is not None:
            parameter.weight_loader = self.weight_loader  # type: ignore[attr-defined]
        setattr(self, name, parameter)


class LinearBase(Weights):
    cut = (False, False)  # whether outputs and inputs are divided among the tensor-parallel ranks

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        rows, columns = (size // (parts() if cut else 1) for size, cut in zip((outputs, inputs), self.cut, strict=True))
        self.hold("weight", rows, columns, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


class ColumnParallelLinear(LinearBase):
    cut = (True, False)


class MergedColumnParallelLinear(ColumnParallelLinear): ...


class QKVParallelLinear(ColumnParallelLinear): ...


class ReplicatedLinear(LinearBase): ...


class RowParallelLinear(LinearBase):
    cut = (False, True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return summed(super().forward(x))

"""Matrix products, alone and with communication, casts, and formats that the CPU has not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def npu_linear(input: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
    return F.linear(input, weight, bias)


def npu_matmul_add_fp32(grad_output: torch.Tensor, total_input: torch.Tensor, grad: torch.Tensor) -> None:
    grad.add_(grad_output.float().t() @ total_input.float())


def npu_dtype_cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype)


def npu_format_cast(x: torch.Tensor, _format: Any, *_a: Any, **_k: Any) -> torch.Tensor:
    return x


npu_format_cast_ = npu_format_cast


def get_npu_format(_x: Any) -> int:
    return 2


def empty_with_format(
    size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, acl_format: int = 2
) -> torch.Tensor:
    return torch.empty(size, dtype=dtype)


def one_(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(1)


def npu_confusion_transpose(x: torch.Tensor, perm: Any, shape: Any, transpose_first: Any) -> torch.Tensor:
    return x.permute(*perm).contiguous().view(shape) if transpose_first else x.view(shape).permute(*perm)


def npu_clear_float_status(x: torch.Tensor) -> torch.Tensor:
    return x


def npu_get_float_status(x: torch.Tensor) -> torch.Tensor:
    return x


def npu_alloc_float_status(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(8)


def _named_group(hcomm: Any) -> Any:
    if isinstance(hcomm, str):
        raise NotImplementedError("communication by hccl name is not emulated")
    return hcomm


def npu_mm_all_reduce_base(
    x1: torch.Tensor, x2: torch.Tensor, hcom: Any, reduce_op: str = "sum", bias: Any = None, **_unused: Any
) -> torch.Tensor:
    y = x1 @ x2
    torch.distributed.all_reduce(y, group=_named_group(hcom))
    return y if bias is None else y + bias


def npu_all_gather_base_mm(
    input: torch.Tensor,
    x2: torch.Tensor,
    hcom: Any,
    world_size: int,
    bias: Any = None,
    gather_index: int = 0,
    gather_output: bool = True,
    **_unused: Any,
) -> Any:
    full = torch.empty((input.shape[0] * world_size, *tuple(input.shape[1:])), dtype=input.dtype)
    torch.distributed.all_gather_into_tensor(full, input.contiguous(), group=_named_group(hcom))
    y = full @ x2
    return (y if bias is None else y + bias), full


def npu_mm_reduce_scatter_base(
    input: torch.Tensor,
    x2: torch.Tensor,
    hcom: Any,
    world_size: int,
    reduce_op: str = "sum",
    bias: Any = None,
    **_unused: Any,
) -> torch.Tensor:
    y = input @ x2
    out = torch.empty((y.shape[0] // world_size, *tuple(y.shape[1:])), dtype=y.dtype)
    torch.distributed.reduce_scatter_tensor(out, y.contiguous(), group=_named_group(hcom))
    return out if bias is None else out + bias

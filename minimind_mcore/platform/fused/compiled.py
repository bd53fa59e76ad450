"""Compile the layers and the loss of a model with torch.compile on a GPU.

Eager operations read and write a whole tensor each. In a small model the operations between the matrix products took
two thirds of a step on an H200. Compiling each operation separately does not help: a call of a compiled function costs
0.1 ms on the host, and the GPU waits for the host. Therefore a whole layer is compiled. All layers of a model share one
graph (docs/benchmarks.md). `TORCH_COMPILE_DISABLE=1` turns compilation off.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@functools.cache
def usable() -> bool:
    """Return whether torch.compile works here: it needs a GPU, Triton, a C compiler and Python's headers."""
    # torch's own environment variables that turn compilation off.
    if any(os.environ.get(name, "0") == "1" for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")):
        return False
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "cc", "clang"))
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    # torch.cuda.is_available() is not enough: on an NPU torch.cuda reports the NPU, but torch is built for neither CUDA
    # nor ROCm. device.py imports this module through patches.py, so this module cannot import device.py.
    built = torch.version.cuda or torch.version.hip
    if not (built and torch.cuda.is_available() and has_compiler and has_headers):
        return False
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)


def compile_layers(chunks: Iterable[torch.nn.Module]) -> None:
    """Compile the layers of a dense model.

    Mixtures of experts are not compiled: the number of tokens per expert is not known in advance, and compiling only
    their attention gained nothing. Layers with a graph break are not compiled either: layers with tensor parallelism,
    frozen weights (LoRA), attention dropout (which has its own random state), Transformer Engine or recomputation.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_layer import TransformerLayer

    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        config: Any = layer.config
        obstacles = (
            config.tensor_model_parallel_size > 1,
            config.num_moe_experts,
            config.attention_dropout,
            config.recompute_granularity,
            getattr(config, "transformer_impl", "local") != "local",
            not all(parameter.requires_grad for parameter in layer.parameters()),
        )
        if any(obstacles):
            continue
        # Training, evaluation and a reference model have separate graphs, and each has one for a fixed length and one
        # for dynamic lengths. torch's default limit is 8. A layer that needs more graphs would run uncompiled.
        import torch._dynamo  # takes seconds, so models without compiled layers do not import it

        torch._dynamo.config.recompile_limit = 32  # pyright: ignore[reportAttributeAccessIssue]
        layer.forward = functools.partial(_run, torch.compile(layer.forward), layer.forward)
        for module in layer.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                # Megatron's own function adds the weight's gradient to a buffer within the backward pass, which the
                # compiler cannot trace. The hooks of Megatron's DistributedDataParallel add what autograd returns.
                module._forward_impl = _linear


def _run(fast: Callable[..., Any], eager: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer: `fast` is compiled. Packed samples use `eager`, because their number changes and would recompile."""
    return (eager if kwargs.get("packed_seq_params") is not None else fast)(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Multiply by the weight. The arguments are named as in `linear_with_grad_accumulation_and_async_allreduce`."""
    return F.linear(input, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `elementwise.rms_norm` for the compiler, in fp32 and rounded once."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """Compute `elementwise.swiglu` for the compiler. `x` is not overwritten."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `elementwise.rotate` for the compiler."""
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `-log softmax(logits)` at the labels, fp32, for logits whose vocabulary is split over the TP group.

    No fp32 copy of the logits is made: each of the three passes over the logits computes in registers.

    Args:
        logits: [sequence, batch, vocabulary / TP].
        labels: [sequence, batch], ids of the whole vocabulary.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled function.

    As a decorator this would run at import, and torch.compile then imports its compiler, which takes seconds.
    """
    return torch.compile(function)


def _rows(x: Tensor) -> Tensor:
    """Reshape [..., n] to [rows, n]."""
    return _dynamic(x.reshape(-1, x.shape[-1]))


def _dynamic(x: Tensor) -> Tensor:
    """Mark all axes of `x` except the last as dynamic, so that one kernel serves all sizes. The last axis is static."""
    import torch._dynamo

    for axis in range(x.dim() - 1):
        torch._dynamo.maybe_mark_dynamic(x, axis)
    torch._dynamo.mark_static(x, x.dim() - 1)
    return x


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        from megatron.core import parallel_state

        group: Any = parallel_state.get_tensor_model_parallel_group()
        rows = _rows(logits)
        # Label ids relative to this rank's shard of the vocabulary. Labels of other ranks are out of range.
        local = _dynamic((labels.reshape(-1, 1) - dist.get_rank(group) * logits.shape[-1]).contiguous())
        largest = _dynamic(compiled(_largest)(rows))
        if dist.get_world_size(group) > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums: Tensor = compiled(_sums)(rows, local, largest)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(sums, group=group)
        log_sum = sums[0].log() + largest
        ctx.save_for_backward(rows, local, log_sum)
        ctx.shape = logits.shape
        return (log_sum - sums[1]).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, local, log_sum = ctx.saved_tensors
        found: Tensor = compiled(_logits_gradient)(*map(_dynamic, (rows, local, log_sum, grad.reshape(-1, 1))))
        return found.view(ctx.shape), None


def _largest(rows: Tensor) -> Tensor:
    """Return the largest logit of each row, [rows, 1]."""
    return rows.amax(-1, keepdim=True).float()


def _sums(rows: Tensor, local: Tensor, largest: Tensor) -> Tensor:
    """Return the sum of exp(logit - largest) and the logit of the label (0 on other ranks), stacked, [2, rows, 1]."""
    wide = rows.float()
    labelled = torch.where(_is_label(rows, local), wide, 0.0)
    return torch.stack([(wide - largest).exp().sum(-1, keepdim=True), labelled.sum(-1, keepdim=True)])


def _logits_gradient(rows: Tensor, local: Tensor, log_sum: Tensor, grad: Tensor) -> Tensor:
    return (((rows.float() - log_sum).exp() - _is_label(rows, local).float()) * grad.float()).to(rows.dtype)


def _is_label(rows: Tensor, local: Tensor) -> Tensor:
    return torch.arange(rows.shape[-1], device=rows.device) == local

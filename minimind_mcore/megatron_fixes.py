"""Places where megatron-core itself is broken without Transformer Engine or Apex, each with its reason."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from typing import Any

import torch


@functools.cache
def apply() -> None:
    """Import megatron-core with the fixes that every device needs. Idempotent."""
    # Transformer Engine and Apex are optional here, and their absence is not news on every rank.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed.*")
    warnings.filterwarnings("ignore", message="full scope is deprecated.*")
    # The distributed optimizer looks for gradients on the fp32 parts of parameters that it made itself.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf.*")
    # torch 2.13 renamed collectives that megatron-core (0.12 to 0.16) calls by their old names.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated.*", category=FutureWarning)
    _without_jit_fuser()
    _router_without_transformer_engine()
    _exact_gradient_norm()
    _distributed_optimizer_without_fp8()
    _frozen_embedding()


def _without_jit_fuser() -> None:
    """All versions decorate small functions with torch.compile at import, which needs a C++ compiler at run time.

    They take the decorator from `megatron.core.jit`, which says so itself at its end. Its loader is followed by
    `disable_jit_fuser`, before any other module reads it; `torch.compile` itself stays as it is for everyone else who
    is imported meanwhile.
    """
    finder = _JitFinder()
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module("megatron.core.jit")
    finally:
        sys.meta_path.remove(finder)


class _JitFinder(importlib.abc.MetaPathFinder):
    """Finds `megatron.core.jit` where it is, and has its fuser disabled when it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "megatron.core.jit":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.jit_fuser = _undecorated

        loader.exec_module = exec_module
        return spec


def _undecorated(function: Any = None, **options: Any) -> Any:
    """A decorator that changes nothing, with options or without."""
    return _undecorated if function is None else function


def _router_without_transformer_engine() -> None:
    """0.16.1: `RouterGatingLinearFunction` tests `te_general_gemm`, which is only defined where TE is installed."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _exact_gradient_norm() -> None:
    """All versions: the fallback norm adds up millions of squares in one fp32 sum, on a CPU wrong by up to 1e-3."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(chunk_size: int, overflow: Any, tensor_lists: Any, per_tensor: bool) -> tuple[torch.Tensor, None]:
    """Norm of all tensors together [1], as apex's multi_tensor_l2norm: rows first, then the norms of rows."""
    if tensor_lists[0] and tensor_lists[0][0].device.type != "cpu":
        norms = torch._foreach_norm(tensor_lists[0], dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None
    rows = []
    for tensor in tensor_lists[0]:
        flat = tensor.detach().reshape(-1)
        whole = flat.numel() // 1024 * 1024
        rows += [torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1), flat[whole:]]
    rest = torch.cat([row.float() for row in rows])
    whole = rest.numel() // 1024 * 1024
    parts = [torch.linalg.vector_norm(rest[:whole].view(-1, 1024), dim=1), rest[whole:]]
    return torch.linalg.vector_norm(torch.cat(parts)).reshape(1), None


def _distributed_optimizer_without_fp8() -> None:
    """0.12.1: copying weights back asks Transformer Engine to quantise the fp8 ones even where there are none."""
    from megatron.core.optimizer import distrib_optimizer

    quantize = getattr(distrib_optimizer, "quantize_param_shard", None)
    if quantize is not None:

        def quantize_if_any(parameters: Any, *args: Any) -> None:
            if parameters:
                quantize(parameters, *args)

        distrib_optimizer.quantize_param_shard = quantize_if_any


def _frozen_embedding() -> None:
    """0.12.1: adds up the gradients of a tied embedding over the first and last stage even where it has none (LoRA)."""
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    if hasattr(module, "_allreduce_embedding_grad"):  # newer
        return
    all_reduce = module._allreduce_word_embedding_grads

    def all_reduce_if_any(model: Any, config: Any) -> None:
        named = (pair for chunk in model for pair in chunk.named_parameters())
        if any(p.requires_grad for name, p in named if "embedding" in name or "output_layer" in name):
            all_reduce(model, config)

    module._allreduce_word_embedding_grads = all_reduce_if_any

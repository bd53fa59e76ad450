"""Places where megatron-core itself is broken without Transformer Engine or Apex, each with its reason."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch


@functools.cache
def apply() -> None:
    """Import megatron-core with the fixes that every device needs. Idempotent."""
    # Transformer Engine and Apex are optional here, and their absence is not news on every rank.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed.*")
    warnings.filterwarnings("ignore", message="full scope is deprecated.*")
    # torch 2.13 renamed collectives that megatron-core (0.12 to 0.16) calls by their old names.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated.*", category=FutureWarning)
    _without_jit_fuser()
    _router_without_transformer_engine()


def _without_jit_fuser() -> None:
    """All versions decorate small functions with torch.compile at import, which needs a C++ compiler at run time."""
    compile_ = torch.compile
    identity: Any = lambda function=None, **options: function  # noqa: E731
    torch.compile = identity
    try:
        import megatron.core.jit

        megatron.core.jit.jit_fuser = identity
    finally:
        torch.compile = compile_


def _router_without_transformer_engine() -> None:
    """0.16.1: `RouterGatingLinearFunction` tests `te_general_gemm`, which is only defined where TE is installed."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

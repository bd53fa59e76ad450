"""Eager CPU versions of the fused Ascend operators, differentiable through autograd.

Written from the public operator descriptions (torch_npu API reference). `_strict` checks every call.
With NPU_EMULATION_TRACE=1 each process prints at exit which ran how often.
"""

from __future__ import annotations

import atexit
import collections
import functools
import os
import sys
import types
from typing import Any

from .. import _strict
from .attention import (
    npu_fused_infer_attention_score,
    npu_fused_infer_attention_score_v2,
    npu_fusion_attention,
    npu_fusion_attention_grad,
    npu_fusion_attention_v2,
    npu_incre_flash_attention,
    npu_prompt_flash_attention,
    npu_scaled_masked_softmax,
)
from .elementwise import (
    fast_gelu,
    npu_add_rms_norm,
    npu_gelu,
    npu_rms_norm,
    npu_rms_norm_backward,
    npu_rotary_mul,
    npu_rotary_position_embedding,
    npu_swiglu,
    npu_swiglu_backward,
)
from .experts import (
    npu_grouped_matmul,
    npu_grouped_matmul_add_,
    npu_groupmatmul_add_fp32,
    npu_moe_gating_top_k_softmax,
    npu_moe_token_permute,
    npu_moe_token_unpermute,
)
from .matmul import (
    empty_with_format,
    get_npu_format,
    npu_all_gather_base_mm,
    npu_alloc_float_status,
    npu_clear_float_status,
    npu_confusion_transpose,
    npu_dtype_cast,
    npu_format_cast,
    npu_format_cast_,
    npu_get_float_status,
    npu_linear,
    npu_matmul_add_fp32,
    npu_mm_all_reduce_base,
    npu_mm_reduce_scatter_base,
    one_,
)
from .optimizer import npu_apply_adam, npu_apply_adam_w

__all__ = [
    "empty_with_format",
    "fast_gelu",
    "get_npu_format",
    "npu_add_rms_norm",
    "npu_all_gather_base_mm",
    "npu_alloc_float_status",
    "npu_apply_adam",
    "npu_apply_adam_w",
    "npu_clear_float_status",
    "npu_confusion_transpose",
    "npu_dtype_cast",
    "npu_format_cast",
    "npu_format_cast_",
    "npu_fused_infer_attention_score",
    "npu_fused_infer_attention_score_v2",
    "npu_fusion_attention",
    "npu_fusion_attention_grad",
    "npu_fusion_attention_v2",
    "npu_gelu",
    "npu_get_float_status",
    "npu_grouped_matmul",
    "npu_grouped_matmul_add_",
    "npu_incre_flash_attention",
    "npu_linear",
    "npu_mm_all_reduce_base",
    "npu_mm_reduce_scatter_base",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_token_permute",
    "npu_moe_token_unpermute",
    "npu_prompt_flash_attention",
    "npu_rms_norm",
    "npu_rms_norm_backward",
    "npu_rotary_mul",
    "npu_scaled_masked_softmax",
    "npu_swiglu",
    "npu_swiglu_backward",
    "one_",
]


_CALLS: collections.Counter[str] = collections.Counter()


def _counted(name: str, function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _CALLS[name] += 1
        return function(*args, **kwargs)

    return wrapper


def _report_calls() -> None:
    if _CALLS:
        rank = os.environ.get("RANK", "0")
        print(f"npu_emulation rank {rank}: {dict(_CALLS)}", file=sys.stderr, flush=True)


# What MindSpeed compiles at run time (`_op_modules`): operators of its own, and torch_npu's in other signatures.
compiled = types.SimpleNamespace()
_OF_MINDSPEED = ("npu_groupmatmul_add_fp32", "npu_matmul_add_fp32", "npu_rotary_position_embedding")
for _name in (*__all__, *_OF_MINDSPEED):
    _function = _counted(_name, globals()[_name])
    setattr(compiled, _name, _strict.hold(_name, _function, signature=False))
    globals()[_name] = _strict.hold(_name, _function)

if os.environ.get("NPU_EMULATION_TRACE"):
    atexit.register(_report_calls)

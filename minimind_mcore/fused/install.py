"""Put the fused operations where megatron-core looks for those of Apex and Transformer Engine."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from minimind_mcore.fused import compiled
from minimind_mcore.fused.adam import FusedAdam
from minimind_mcore.fused.compiled import cross_entropy
from minimind_mcore.fused.elementwise import rotate, swiglu


def install() -> None:
    """Replace what megatron-core has none of, or a slow substitute for. Imports megatron-core."""
    _adam()
    _swiglu()
    _rotary()
    _weight_gradient()
    _clipping()
    if compiled.usable():
        _cross_entropy()


def _adam() -> None:
    """All versions: where Apex and TE are missing, torch's AdamW takes their place: a Python loop over parameters,
    with a `step` per parameter on which the distributed optimizer fails when it saves or loads (`KeyError: 'step'`)."""
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    if optimizer.Adam is torch.optim.AdamW:
        optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        distrib_optimizer.HAVE_APEX_OR_TE = True
        # 0.16.1 asks in these ways which one it has
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.USING_APEX_OPTIMIZER = True


def _swiglu() -> None:
    """All versions: `--bias-swiglu-fusion` is a chain for torch.compile; left eager it is slower than none."""
    from megatron.core.fusions import fused_bias_swiglu

    # What follows the tensors are options of fp8 and offloading.
    fused_bias_swiglu.SwiGLUFunction = types.SimpleNamespace(apply=lambda x, *options: swiglu(x))
    fused_bias_swiglu.WeightedSwiGLUFunction = types.SimpleNamespace(
        apply=lambda x, weights, *options: (swiglu(x) * weights).to(x.dtype)  # weights [tokens, 1], of the router
    )


def _rotary() -> None:
    """All versions: without TE, cosine, sine, halves and their joining are each an operation."""
    from megatron.core.models.common.embeddings import rope_utils

    unfused: Any = rope_utils._apply_rotary_pos_emb_bshd

    def apply(t: Tensor, freqs: Tensor, rotary_interleaved: bool = False, *args: Any, **kwargs: Any) -> Tensor:
        plain = not (rotary_interleaved or any(args) or kwargs.get("multi_latent_attention"))
        if not plain or kwargs.get("mscale", 1.0) != 1.0 or freqs.shape[-1] != t.shape[-1]:
            other: Tensor = unfused(t, freqs, rotary_interleaved, *args, **kwargs)
            return other
        angles = freqs[..., : freqs.shape[-1] // 2]  # the second half repeats them
        return rotate(t, angles.cos().to(t.dtype), angles.sin().to(t.dtype))

    rope_utils._apply_rotary_pos_emb_bshd = apply


def _weight_gradient() -> None:
    """All versions: `--gradient-accumulation-fusion` is Apex's; torch's product can add to its result as well."""
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
            wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
        )
        layers._grad_accum_fusion_available = True


def add_weight_gradient(inputs: Tensor, grad: Tensor, main_grad: Tensor) -> None:
    """`main_grad += grad^T inputs`, for `inputs` [tokens, in], `grad` [tokens, out], `main_grad` [out, in]."""
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(grad.t(), inputs)
    else:  # gradients of half-precision weights are summed in fp32
        main_grad.add_(grad.t() @ inputs)


def _clipping() -> None:
    """All versions: without Apex, clipping makes a scaled copy of every gradient and copies it back."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale


def _cross_entropy() -> None:
    """All versions: without Transformer Engine the loss copies the logits to fp32 and passes over them ten times."""
    from megatron.core import tensor_parallel

    unfused: Any = tensor_parallel.vocab_parallel_cross_entropy

    def apply(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        loss: Tensor = unfused(logits, target, label_smoothing) if label_smoothing else cross_entropy(logits, target)
        return loss

    tensor_parallel.vocab_parallel_cross_entropy = apply


def _scale(chunk_size: int, overflow: Any, tensor_lists: Any, scale: float) -> None:
    """Multiply gradients, which are both the first and the second of `tensor_lists`, as apex's multi_tensor_scale."""
    torch._foreach_mul_(tensor_lists[1], scale)  # pyright: ignore[reportPrivateImportUsage]

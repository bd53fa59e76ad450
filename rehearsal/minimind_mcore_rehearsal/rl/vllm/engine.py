"""`LLM` and its engine, with the attributes that MindSpeed-RL's vllm_engine.py accesses."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from .model_executor.layers.linear import parts
from .model_executor.models import ModelRegistry


@dataclasses.dataclass
class SamplingParams:
    n: int = 1
    logprobs: int | None = None
    max_tokens: int = 16
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    temperature: float = 1.0
    detokenize: bool = True
    seed: int | None = None
    stop_token_ids: list[int] | None = None


@dataclasses.dataclass
class Logprob:
    logprob: float


@dataclasses.dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str = "stop"
    text: str = ""


@dataclasses.dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class Engine:
    """Completes one request per step. The ranks of a tensor-parallel group draw the same random numbers."""

    def __init__(self, model: Any, config: Any, max_model_len: int, seed: int | None) -> None:
        self.model, self.max_model_len = model, max_model_len
        eos = config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos])
        self.waiting: list[tuple[str, list[int], SamplingParams]] = []
        rank = int(os.environ.get("RANK", "0"))
        self.generator = torch.Generator(device="cpu")
        self.generator.manual_seed((seed or 0) + 7919 * (rank // parts()))
        runner = SimpleNamespace(get_model=lambda: model, kv_caches=[])
        runner.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
        worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
        executor = SimpleNamespace(driver_worker=worker, initialize_from_config=lambda configs: None)
        self.model_executor = executor
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(model_executor=executor, kv_cache_configs=[]))
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=1))

    def reset_prefix_cache(self) -> None: ...

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        self.waiting.append((request_id, list(prompt["prompt_token_ids"]), dataclasses.replace(params)))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def abort_request(self, ids: Collection[str]) -> None:
        self.waiting = [one for one in self.waiting if one[0] not in ids]

    def step(self) -> list[RequestOutput]:
        request_id, prompt, params = self.waiting.pop(0)
        return [RequestOutput(request_id, prompt, [self.complete(prompt, params) for _ in range(params.n)])]

    @torch.no_grad()
    def complete(self, prompt: list[int], params: SamplingParams) -> CompletionOutput:
        ids, logprobs = list(prompt), []
        for _ in range(min(params.max_tokens, self.max_model_len - len(prompt))):
            logits = self.model(torch.tensor([ids]))[0, -1].float()
            log_p = torch.log_softmax(logits / (params.temperature or 1.0), -1)
            greedy = params.temperature == 0
            token = int(log_p.argmax() if greedy else torch.multinomial(log_p.exp(), 1, generator=self.generator))
            logprobs.append({token: Logprob(float(log_p[token]))})
            ids.append(token)
            if token in self.eos:
                break
        new = ids[len(prompt) :]
        if path := os.environ.get("REHEARSAL_ROLLOUTS"):  # to compare responses with another rollout engine
            row = {"prompt": prompt, "response": new}
            row |= {"logprobs": [float(one.logprob) for step in logprobs for one in step.values()]}
            with open(f"{path}.{os.environ.get('RANK', '0')}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return CompletionOutput(new, logprobs if params.logprobs is not None else None)


class LLM:
    def __init__(
        self, model: str, tensor_parallel_size: int = 1, load_format: str = "auto", dtype: str = "bfloat16",
        max_model_len: int = 2048, seed: int | None = None, distributed_executor_backend: str | None = None,
        **_options: Any,
    ) -> None:  # fmt: skip
        if distributed_executor_backend != "external_launcher" or load_format != "dummy":
            raise ValueError("the stand-in for vLLM supports only external_launcher and dummy weights")
        if tensor_parallel_size != parts():
            raise ValueError(f"tensor_parallel_size {tensor_parallel_size}, but the group has {parts()} ranks")
        config = AutoConfig.from_pretrained(model)
        name = (config.architectures or ["none"])[0]
        if name not in ModelRegistry.models:
            raise ValueError(f"{model}: the vLLM stand-in has no {name}, only {ModelRegistry.get_supported_archs()}")
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        network = ModelRegistry.models[name](config, getattr(torch, dtype)).eval()
        self.llm_engine = Engine(network, config, max_model_len, seed)
        count = sum(parameter.numel() for parameter in network.parameters())
        print(f"stand-in for vLLM: {name}, {count:,} parameters, {dtype}", file=sys.stderr, flush=True)

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def generate(
        self, prompts: Sequence[Any], sampling_params: SamplingParams, use_tqdm: bool = False, **_options: Any
    ) -> list[RequestOutput]:
        found: list[RequestOutput] = []
        for number, prompt in enumerate(prompts):
            ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else self.tokenizer(prompt).input_ids
            self.llm_engine.add_request(str(number), {"prompt_token_ids": ids}, sampling_params)
        while self.llm_engine.has_unfinished_requests():
            found += self.llm_engine.step()
        return found

"""vLLM as rollout engine, where it is installed: `minimind.rollout_engine: vllm` (a GPU, or an NPU with vllm-ascend).

Written to the interface of vLLM 0.11 and newer; it has not been run where this was written, which has no device
that vLLM supports. The engine begins without weights (`load_format="dummy"`); the trainer's come by `load_weights`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.weights import mcore_to_hf
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime.engines.protocol import Response, RolloutSamplingParams, spoil, weights_of


class VLLMEngine:
    """Write responses with vLLM, in this process.

    The log-probabilities are those that vLLM draws from: with top-k or top-p, of what these leave.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(self, config: Config, model: ModelConfig) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("minimind.rollout_engine: vllm is not installed (pip install vllm); use transformers")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is then in this process
        vllm: Any = importlib.import_module("vllm")

        self.config, generate = model, config.generate
        with tempfile.TemporaryDirectory() as folder:
            model.hf_config().save_pretrained(folder)
            self.engine: Any = vllm.LLM(
                model=folder,
                tokenizer=str(Path(config.actor.tokenizer_name_or_path).absolute()),
                load_format="dummy",
                dtype=generate.dtype,
                max_model_len=generate.max_model_len,
                max_num_seqs=generate.max_num_seqs,
                max_num_batched_tokens=max(generate.max_num_batched_tokens, generate.max_model_len),
                gpu_memory_utilization=generate.gpu_memory_utilization,
                enable_prefix_caching=generate.enable_prefix_caching,
                enforce_eager=generate.enforce_eager,
                logprobs_mode="processed_logprobs",
            )

    def load_weights(self, whole: Mapping[str, Tensor]) -> None:
        state = mcore_to_hf(whole, self.config)

        def load(model: Any) -> None:
            model.load_weights((name, tensor.to(next(model.parameters()).device)) for name, tensor in state.items())

        self.engine.apply_model(load)
        self.engine.reset_prefix_cache()  # of the old weights

    def weights(self) -> dict[str, Tensor]:
        found: list[dict[str, Tensor]] = self.engine.apply_model(weights_of)
        return found[0]

    def perturb(self) -> None:
        self.engine.apply_model(spoil)

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: RolloutSamplingParams, seeds: Sequence[int]
    ) -> list[Response]:
        vllm: Any = importlib.import_module("vllm")
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(n)]
        parameters = [
            vllm.SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k if sampling.top_k > 0 else -1,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=seed & (2**63 - 1),
                stop_token_ids=list(sampling.stop),
                logprobs=0,
                detokenize=False,
            )
            for seed in seeds
        ]
        return [_response(output.outputs[0]) for output in self.engine.generate(inputs, parameters, use_tqdm=False)]


def _response(output: Any) -> Response:
    ids = list(output.token_ids)
    logp = [float(found[token].logprob) for token, found in zip(ids, output.logprobs, strict=True)]
    return Response(ids, logp, output.finish_reason == "stop")

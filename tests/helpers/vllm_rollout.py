"""vLLM as rollout engine beside the embedded one, as a program for the interpreter of requirements/vllm.sh.

    python -m helpers.vllm_rollout TOKENIZER PRESET...

Prints one line of JSON for each preset and sync of weights.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from helpers.vllm_models import VOCABULARY, shrunk
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.weights import mcore_shapes
from minimind_mcore.rl.runtime.engines.decoder import DecoderEngine
from minimind_mcore.rl.runtime.engines.protocol import RolloutSamplingParams
from minimind_mcore.rl.runtime.engines.vllm import VLLMEngine

SYNCS = 3
N = 4
DRAWN = RolloutSamplingParams(max_tokens=16, temperature=0.7, top_k=30, top_p=0.9, stop=(2,))
GREEDY = RolloutSamplingParams(max_tokens=16, temperature=0.7, top_k=1)
USED = VOCABULARY - 10  # ids of the tokenizer; the other rows are padding


def settings(tokenizer: str) -> Any:
    """What `VLLMEngine` reads of a configuration."""
    generate = SimpleNamespace(
        dtype="float32", max_model_len=512, max_num_seqs=32, max_num_batched_tokens=2048, gpu_memory_utilization=0.3,
        enable_prefix_caching=True, enforce_eager=True,
    )  # fmt: skip
    return SimpleNamespace(generate=generate, actor=SimpleNamespace(tokenizer_name_or_path=tokenizer, seed=1))


def weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.05 + (len(shape) == 1)
        for name, shape in mcore_shapes(config).items()
    }


@torch.no_grad()
def logits(engine: DecoderEngine, prompt: Sequence[int], added: Sequence[int], temperature: float) -> Tensor:
    """[tokens added, vocabulary], by transformers' model with the engine's weights."""
    found: Tensor = engine.model(torch.tensor([[*prompt, *added]])).logits[0, len(prompt) - 1 : -1] / temperature
    return found


class LastWeights:
    """Stands for a `WeightSource`."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def tensors(self) -> Any:
        return iter(self.state.items())


def compare(vllm: VLLMEngine, embedded: DecoderEngine, prompts: list[list[int]]) -> dict[str, Any]:
    """Largest differences between the engines."""
    apart, ties, drawn = 0.0, 0.0, set[int]()
    for row, response in enumerate(vllm.generate(prompts, N, DRAWN, list(range(N * len(prompts))))):
        ids = torch.as_tensor(response.ids).long()
        drawn |= set(ids.tolist())
        logp = logits(embedded, prompts[row // N], ids.tolist(), DRAWN.temperature).log_softmax(-1)
        expected = logp.gather(1, ids[:, None])[:, 0]
        apart = max(apart, float((expected - torch.as_tensor(response.logp)).abs().max()))
    seeds = list(range(len(prompts)))
    for engine in (vllm, embedded):
        for prompt, response in zip(prompts, engine.generate(prompts, 1, GREEDY, seeds), strict=True):
            ids = torch.as_tensor(response.ids).long()
            rows = logits(embedded, prompt, ids.tolist(), GREEDY.temperature)[:, :USED]
            ties = max(ties, float((rows.max(1).values - rows.gather(1, ids[:, None])[:, 0]).max()))
    return {"logp": apart, "tie": ties, "largest": max(drawn)}


def main(argv: Sequence[str]) -> None:
    from minimind_mcore.rl.runtime.workers.rollout import RolloutWorker

    tokenizer, *names = argv
    for name in names:
        config = shrunk(name)
        vllm = VLLMEngine(settings(tokenizer), config, USED)
        embedded = DecoderEngine(config, USED, torch.float32, 32)
        worker = RolloutWorker.__new__(RolloutWorker)
        worker.engine = vllm
        for sync in range(SYNCS):
            state = weights(config, sync)
            worker.load(LastWeights(state))  # type: ignore[arg-type]
            embedded.load_weights(state.items())
            generator = torch.Generator().manual_seed(sync)
            prompts = [torch.randint(3, USED, (n,), generator=generator).tolist() for n in (3, 40, 120)]
            found = compare(vllm, embedded, prompts)
            found["wrong"] = worker.check(LastWeights(state))  # type: ignore[arg-type]
            stale = worker.check(LastWeights(weights(config, sync + 1)))  # type: ignore[arg-type]
            found["stale"] = "log-probabilities" in stale
            print("FOUND", json.dumps({"name": name, "sync": sync, **found}), flush=True)
        del vllm, worker
        gc.collect()  # an engine that is collected later takes the process groups of the next one with it


if __name__ == "__main__":
    main(sys.argv[1:])

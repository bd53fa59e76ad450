"""SGLang as rollout engine over HTTP, by the protocol of MiniMind's rollout_engine.py.

    GET  /health                     whether a server answers
    POST /generate                   ids in, ids and log-probabilities out
    POST /update_weights_from_disk   the directory of new weights, which this engine writes where the server can read
    POST /flush_cache                drop the KV cache of the old weights

This engine was tested against a stand-in server of this protocol, not against SGLang itself. SGLang samples tokens with
its own random numbers, so runs with the same `megatron_training.seed` get different responses.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from minimind_mcore.converters.hf import hf_config
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.weights import mcore_shapes, stream_to_hf
from minimind_mcore.rl.config.schema import MiniMindConfig
from minimind_mcore.rl.runtime.engines.protocol import PROBE, Response, RolloutSamplingParams
from minimind_mcore.rl.runtime.weight_sync import BUCKET_BYTES

URL, PATH, TIMEOUT = "minimind.sglang_base_url", "minimind.sglang_shared_path", "minimind.sglang_timeout_s"


class SGLangEngine:
    """Write responses with an SGLang server.

    Args:
        settings: the section `minimind`.
        url: address of the server.
        model: the architecture.
        vocab_size: number of ids of the tokenizer.
        dtype: dtype in which the weights are sent to the server.

    Raises:
        UserError: no server answers, or the vocabulary is padded.
    """

    def __init__(
        self, settings: MiniMindConfig, url: str, model: ModelConfig, vocab_size: int, dtype: torch.dtype
    ) -> None:
        if vocab_size < model.vocab_size:
            raise UserError(
                f"minimind.rollout_engine: sglang: found {vocab_size} ids in the tokenizer and {model.vocab_size} in "
                "the model. SGLang could draw the ids of the padding. Expected equal numbers; use transformers or vllm"
            )
        self.url, self.timeout = url.rstrip("/"), settings.sglang_timeout_s
        self.folder, self.config, self.dtype = Path(settings.sglang_shared_path).absolute(), model, dtype
        self._ask("/health")

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            Path(folder).chmod(0o755)  # the server may run as another user
            write_model(Path(folder), self.config, self.dtype, tensors)
            found = self._ask("/update_weights_from_disk", {"model_path": folder})
        if found.get("success") is not True:
            raise UserError(
                f"{URL}: {self.url} did not take the weights: {found.get('message', found)}. The server must run a "
                f"model of the same architecture, and must see {PATH} under the same path, {self.folder}"
            )
        self._ask("/flush_cache", {})

    def weights(self) -> dict[str, Tensor]:
        """Return log-probabilities of a short greedy response, because the protocol cannot return weights."""
        self._ask("/flush_cache", {})  # a cached prompt would be computed by other kernels
        greedy = RolloutSamplingParams(max_tokens=len(PROBE), top_k=1)
        [response] = self.generate([PROBE], 1, greedy, [0])
        return {"log-probabilities": torch.from_numpy(response.logp)}

    def perturb(self) -> None:
        self.load_weights((name, torch.full(shape, 0.5)) for name, shape in mcore_shapes(self.config).items())

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: RolloutSamplingParams, seeds: Sequence[int]
    ) -> list[Response]:
        how = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k if sampling.top_k > 0 else -1,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "stop_token_ids": list(sampling.stop),
        }
        ids = [[int(token) for token in prompt] for prompt in prompts for _ in range(n)]
        body = {"input_ids": ids, "sampling_params": how, "return_logprob": True}
        found = self._ask("/generate", body)
        if not isinstance(found, list) or len(found) != len(ids):
            count = len(found) if isinstance(found, list) else 1
            raise UserError(f"{URL}: {self.url}/generate gave {count} responses, expected {len(ids)}, one per prompt")
        return [self._response(one) for one in found]

    def _response(self, found: Mapping[str, Any]) -> Response:
        about = found.get("meta_info", {})
        pairs = about.get("output_token_logprobs") or []
        ids = found.get("output_ids", [pair[1] for pair in pairs])
        if len(pairs) != len(ids) or not ids or any(pair[0] is None for pair in pairs):
            known = sum(pair[0] is not None for pair in pairs)
            raise UserError(
                f"{URL}: {self.url}/generate gave {known} log-probabilities for a response of {len(ids)} tokens, "
                "expected one for each token (meta_info.output_token_logprobs)"
            )
        reason = about.get("finish_reason") or {}
        finished = (reason.get("type") if isinstance(reason, dict) else reason) == "stop"
        return Response(np.array(ids, np.int32), np.array([pair[0] for pair in pairs], np.float32), finished)

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a GET, or a POST if there is a body. Return the parsed JSON of the answer, or its text if not JSON.

        Raises:
            UserError: the server does not answer in time, or answers with an error.
        """
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=self.timeout) as answer:
                text = answer.read().decode()
        except HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise UserError(f"{URL}: {self.url}{path} answered {error.code}: {said}") from error
        except OSError as error:
            raise UserError(
                f"{URL}: {self.url}{path} did not answer ({error}), expected an answer within {self.timeout:g} s "
                f"({TIMEOUT}). Start SGLang there, with the model that is trained"
            ) from error
        try:
            return json.loads(text)
        except ValueError:
            return text


def write_model(folder: Path, config: ModelConfig, dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a Hugging Face directory in files of about `BUCKET_BYTES`, so that memory never holds the whole model."""
    (folder / "config.json").write_text(json.dumps(hf_config(config)), encoding="utf-8")
    where: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        nonlocal total, size
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, file))
        total, size = total + size, 0
        held.clear()

    for name, tensor in stream_to_hf(tensors, config):
        held[name] = tensor.to(dtype, copy=True).contiguous()
        size += held[name].nbytes
        if size >= BUCKET_BYTES:
            write()
    if held:
        write()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

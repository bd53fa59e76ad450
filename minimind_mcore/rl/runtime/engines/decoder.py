"""The engine of the embedded trainer: the transformers model of the weights, run by this kit's decoding loop.

What makes it fast where a token costs little: a prompt is read once for all its responses; a response that has
ended leaves the batch; a token is sampled with one number from the cumulative probabilities, without a sort.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minimind_mcore.inference.decoder import Cache, Decoder
from minimind_mcore.inference.loading import empty_model, fill_model
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.weights import detect_form, stream_to_hf
from minimind_mcore.platform import device
from minimind_mcore.rl.runtime.engines.protocol import Response, RolloutSamplingParams, spoil, uniforms, weights_of
from minimind_mcore.rl.runtime.router_replay import RouteRecorder

SHRINK = 0.75  # responses that have ended leave the batch when so few of it are left


class DecoderEngine:
    """Write responses with the decoder of inference/, in this process.

    Args:
        config: the architecture.
        vocab_size: ids that the tokenizer has; rows of the vocabulary behind them are padding and never sampled.
        dtype: of the arithmetic.
        batch: responses at a time.
        records: give the experts of each token with the responses.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, dtype: torch.dtype, batch: int, records: bool = False
    ) -> None:
        self.records = records
        self.recorder: RouteRecorder | None = None
        self.config, self.vocab_size, self.dtype, self.batch = config, vocab_size, dtype, max(1, batch)
        self.model: Any = None
        self.decoder: Any = None
        self.form = "hf"

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self.model is None:
            model = empty_model(self.config)
            self.form = detect_form(model.state_dict())
            state = {k: v.to(self.dtype, copy=True) for k, v in stream_to_hf(tensors, self.config, self.form)}
            self.model = fill_model(model, state, self.config).to(device.current().torch_device)
            self.decoder = Decoder(self.model)
            self.recorder = RouteRecorder(self.model) if self.records else None
            return
        # The decoder's own matrices are what the model's parameters are views of: filled in place, both have it.
        own = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in stream_to_hf(tensors, self.config, self.form):
                own[name].copy_(tensor)
        self.decoder.pack()

    def weights(self) -> dict[str, Tensor]:
        return weights_of(self.model)

    def perturb(self) -> None:
        spoil(self.model)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: RolloutSamplingParams, seeds: Sequence[int]
    ) -> list[Response]:
        at_a_time = max(1, self.batch // n)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
        found: dict[int, Response] = {}
        for start in range(0, len(order), at_a_time):
            some = order[start : start + at_a_time]
            rows = [i * n + k for i in some for k in range(n)]
            responses = self._generate([prompts[i] for i in some], n, sampling, [seeds[row] for row in rows])
            found |= zip(rows, responses, strict=True)
        return [found[row] for row in range(len(prompts) * n)]

    def _generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: RolloutSamplingParams, seeds: Sequence[int]
    ) -> list[Response]:
        """One batch of responses."""
        device, rows = self.model.device, len(prompts) * n
        longest = max(map(len, prompts))
        limits = [min(sampling.max_tokens, self.config.max_position_embeddings - len(prompt)) for prompt in prompts]
        steps = max(limits)
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[*[p[0]] * pad, *p] for p, pad in zip(prompts, padding, strict=True)], device=device)
        numbers = torch.from_numpy(uniforms(seeds, steps)).to(device)
        stop = torch.tensor(sampling.stop, device=device)
        cache = Cache(len(prompts), padding)
        logits = self.decoder(ids, cache).repeat_interleave(n, dim=0)
        asked = self.recorder.take(len(prompts)) if self.recorder else None
        added = None if asked is None else asked.new_zeros(rows, steps, *asked.shape[2:])
        cache.select(torch.arange(len(prompts), device=device).repeat_interleave(n))
        written = torch.zeros(rows, steps, dtype=torch.long, device=device)
        logp = torch.zeros(rows, steps, device=device)
        lengths = torch.tensor(limits, device=device).repeat_interleave(n)
        running = torch.arange(rows, device=device)  # rows that are still in the batch
        going = torch.ones(rows, dtype=torch.bool, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        for at in range(steps):
            tokens, found = choose(logits, self.vocab_size, sampling, numbers[running, at])
            written[running, at], logp[running, at] = tokens, found
            alive = going[running]
            ended = torch.isin(tokens, stop) & alive
            # No indices by a boolean: a device would have to tell the host how many they are.
            lengths[running] = torch.where(ended, at + 1, lengths[running])
            finished[running] |= ended
            alive = alive & ~ended & (at + 1 < lengths[running])
            going[running] = alive
            left = int(alive.sum())
            if left == 0:
                break
            if left < SHRINK * len(running):
                cache.select(alive.nonzero().flatten())
                running, tokens = running[alive], tokens[alive]
            logits = self.decoder(tokens[:, None], cache)
            if self.recorder and added is not None:
                added[running, at] = self.recorder.take(len(running))[:, 0]
        found_routes = [None] * rows if asked is None or added is None else _routes(asked, added, padding, lengths, n)
        return _responses(written, logp, lengths, finished, found_routes)


def _routes(
    asked: Tensor, added: Tensor, padding: Sequence[int], lengths: Tensor, n: int
) -> list[NDArray[np.uint8] | None]:
    """Experts of every token of a prompt and its response but the last, from those of prompts and of steps."""
    rows = enumerate(lengths.tolist())
    found = [torch.cat([asked[row // n, padding[row // n] :], added[row, : length - 1]]) for row, length in rows]
    return [one.cpu().numpy() for one in found]


def _responses(
    written: Tensor, logp: Tensor, lengths: Tensor, finished: Tensor, routes: Sequence[NDArray[np.uint8] | None]
) -> list[Response]:
    # Copies: a short response does not keep the whole batch in memory.
    rows = (written.int().cpu().numpy(), logp.cpu().numpy(), lengths.tolist(), finished.tolist(), routes)
    return [
        Response(ids[:length].copy(), values[:length].copy(), ended, experts)
        for ids, values, length, ended, experts in zip(*rows, strict=True)
    ]


def choose(logits: Tensor, vocab_size: int, sampling: RolloutSamplingParams, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row, and its log-probability.

    Args:
        logits: [rows, vocabulary].
        vocab_size: ids from here on are never sampled.
        sampling: how tokens are sampled.
        numbers: [rows] in [0, 1): which token, on the scale of the cumulative probabilities.

    Returns:
        Ids [rows], and log softmax(logits / temperature) of them over the whole vocabulary [rows].
    """
    scaled = logits.float() / sampling.temperature
    allowed = scaled[:, :vocab_size]
    if sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0:
        k = min(sampling.top_k, vocab_size) if sampling.top_k > 0 else vocab_size
        values, order = allowed.topk(k, dim=-1)
        p = values.softmax(-1)
        before = p.cumsum(-1) - p
        p = p.masked_fill((before >= sampling.top_p) | (p < sampling.min_p * p[:, :1]), 0.0)
    else:
        order, p = None, allowed.softmax(-1)
    steps = p.cumsum(-1)
    # The first token whose share reaches beyond the number; one of share 0 never does, nor does rounding pass the end.
    total = steps[:, -1]
    numbers = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    places = torch.searchsorted(steps, numbers[:, None], right=True)
    tokens = places if order is None else order.gather(1, places)
    logp = scaled.gather(1, tokens).squeeze(1) - scaled.logsumexp(-1)
    return tokens.squeeze(1), logp

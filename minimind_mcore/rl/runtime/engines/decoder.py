"""The engine of the embedded trainer: the transformers model of the weights, run by this kit's decoding loop.

What makes it fast where a token costs little: a prompt is read once for all its responses; a response that has
ended leaves the batch; a token is drawn with one number from the cumulative probabilities, without a sort.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minimind_mcore.inference.decoder import Cache, Decoder
from minimind_mcore.inference.loading import empty_model, fill_model
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.weights import detect_form, mcore_to_hf
from minimind_mcore.platform import device
from minimind_mcore.rl.runtime.engines.protocol import Response, RolloutSamplingParams, spoil, uniforms, weights_of

SHRINK = 0.75  # responses that have ended leave the batch when so few of it are left


class DecoderEngine:
    """Write responses with the decoder of inference/, in this process.

    Args:
        config: the architecture.
        vocab_size: ids that the tokenizer has; rows of the vocabulary behind them are padding and never drawn.
        dtype: of the arithmetic.
        batch: responses at a time.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, dtype: torch.dtype, batch: int) -> None:
        self.config, self.vocab_size, self.dtype, self.batch = config, vocab_size, dtype, max(1, batch)
        self.model: Any = None
        self.decoder: Any = None
        self.form = "hf"

    def load_weights(self, whole: Mapping[str, Tensor]) -> None:
        if self.model is None:
            model = empty_model(self.config)
            self.form = detect_form(model.state_dict())
            state = {k: v.to(self.dtype, copy=True) for k, v in mcore_to_hf(whole, self.config, self.form).items()}
            self.model = fill_model(model, state, self.config).to(device.current().torch_device)
            self.decoder = Decoder(self.model)
            return
        # The decoder's own matrices are what the model's parameters are views of: filled in place, both have it.
        own = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in mcore_to_hf(whole, self.config, self.form).items():
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
        found: list[Response] = [Response([], [], False)] * (len(prompts) * n)
        for start in range(0, len(order), at_a_time):
            some = order[start : start + at_a_time]
            rows = [i * n + k for i in some for k in range(n)]
            responses = self._generate([prompts[i] for i in some], n, sampling, [seeds[row] for row in rows])
            for row, response in zip(rows, responses, strict=True):
                found[row] = response
        return found

    def _generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: RolloutSamplingParams, seeds: Sequence[int]
    ) -> list[Response]:
        """One batch of responses."""
        place, rows = self.model.device, len(prompts) * n
        longest = max(map(len, prompts))
        room = min(sampling.max_tokens, self.config.max_position_embeddings - longest)
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[*[p[0]] * pad, *p] for p, pad in zip(prompts, padding, strict=True)], device=place)
        numbers = torch.from_numpy(uniforms(seeds, room)).to(place)
        stop = torch.tensor(sampling.stop, device=place)
        cache = Cache(len(prompts), padding)
        logits = self.decoder(ids, cache).repeat_interleave(n, dim=0)
        cache.select(torch.arange(len(prompts), device=place).repeat_interleave(n))
        written = torch.zeros(rows, room, dtype=torch.long, device=place)
        logp = torch.zeros(rows, room, device=place)
        lengths = torch.full((rows,), room, device=place)
        running = torch.arange(rows, device=place)  # rows that are still in the batch
        going = torch.ones(rows, dtype=torch.bool, device=place)
        for at in range(room):
            tokens, found = choose(logits, self.vocab_size, sampling, numbers[running, at])
            written[running, at], logp[running, at] = tokens, found
            alive = going[running]
            ended = torch.isin(tokens, stop) & alive
            # No indices by a boolean: a device would have to tell the host how many they are.
            lengths[running] = torch.where(ended, at + 1, lengths[running])
            alive = alive & ~ended
            going[running] = alive
            left = int(alive.sum())
            if left == 0 or at + 1 == room:
                break
            if left < SHRINK * len(running):
                cache.select(alive.nonzero().flatten())
                running, tokens = running[alive], tokens[alive]
            logits = self.decoder(tokens[:, None], cache)
        return _responses(written, logp, lengths, going)


def _responses(written: Tensor, logp: Tensor, lengths: Tensor, going: Tensor) -> list[Response]:
    columns = (written.tolist(), logp.tolist(), lengths.tolist(), going.tolist())
    return [
        Response(ids[:length], values[:length], not unfinished)
        for ids, values, length, unfinished in zip(*columns, strict=True)
    ]


def choose(logits: Tensor, vocab_size: int, sampling: RolloutSamplingParams, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row, and its log-probability.

    Args:
        logits: [rows, vocabulary].
        vocab_size: ids from here on are never drawn.
        sampling: how tokens are drawn.
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

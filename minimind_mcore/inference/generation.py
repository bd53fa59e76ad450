"""From prompts to completions.

    generator = Generator(loaded, Sampling(max_new_tokens=64))
    generator.complete([[1, 320, 17], [1, 9]])      # a batch, padded at the left
    for token in generator.stream([1, 320, 17]):    # one prompt, token by token
        ...

Greedy decoding and sampling run on `Decoder`, beam search on transformers' own `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.inference.decoder import Cache
from minimind_mcore.inference.loading import Loaded
from minimind_mcore.inputs.ranges import problem


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of a generation.

    Attributes:
        max_new_tokens: per prompt, at most.
        do_sample: draw; else take the likeliest.
        temperature: divides the logits.
        top_k: draw from so many of the likeliest; 0 for all.
        top_p: and of these from the likeliest that together reach this probability.
        repetition_penalty: divides the positive logits of tokens that are there already, multiplies the others.
        num_beams: of a beam search; 1 for none.
        seed: of the draws.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    num_beams: int = 1
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "seed"):
            if wrong := problem(name, getattr(self, name)):
                raise UserError(f"--{name.replace('_', '-')}: {wrong}")

    def choose(self, logits: Tensor, seen: Tensor | None, generator: torch.Generator) -> Tensor:
        """The next token of each sequence.

        Args:
            logits: [batch, vocabulary].
            seen: [batch, tokens] so far, padded with tokens that may be penalised; only for a penalty.
            generator: of the draws.

        Returns:
            Ids, [batch].
        """
        if seen is not None and self.repetition_penalty != 1:
            score = logits.gather(1, seen)
            penalised = torch.where(score > 0, score / self.repetition_penalty, score * self.repetition_penalty)
            logits = logits.scatter(1, seen, penalised)
        if not self.do_sample:
            return logits.argmax(-1)
        # Everything below is on the k likeliest alone: a sort of 50 in place of one of 6400.
        k = min(self.top_k or logits.shape[-1], logits.shape[-1])
        values, order = (logits.float() / self.temperature).topk(k, dim=-1)
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        return order.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)


@dataclass(frozen=True)
class Completion:
    """What a model wrote.

    Attributes:
        ids: of the new tokens, without the one that ended it.
        finished: it ended by itself; else max_new_tokens, or the model's positions, were used up.
    """

    ids: list[int]
    finished: bool


class Generator:
    """Generates with one model.

    Args:
        loaded: the model.
        sampling: how.
        stop: ids that end a completion, besides the tokenizer's eos.
    """

    def __init__(self, loaded: Loaded, sampling: Sampling, stop: Sequence[int] = ()) -> None:
        self.loaded, self.sampling = loaded, sampling
        self.stop = sorted({loaded.tokenizer.eos_token_id, *stop})
        self.random = torch.Generator(loaded.device).manual_seed(sampling.seed)

    def complete(self, prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """Complete a batch of prompts.

        Raises:
            UserError: a prompt is empty, or longer than the model's positions.
        """
        ids: list[list[int]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        for tokens in self._beams(prompts) if self.sampling.num_beams > 1 else self._steps(prompts):
            for number, token in enumerate(tokens):
                if not finished[number] and token in self.stop:
                    finished[number] = True
                elif not finished[number]:
                    ids[number].append(token)
        return [Completion(*pair) for pair in zip(ids, finished, strict=True)]

    def stream(self, prompt: Sequence[int]) -> Iterator[int]:
        """The new tokens of one prompt, as they come; the one that ends it is left out."""
        for (token,) in self._steps([prompt]):
            if token in self.stop:
                return
            yield token

    def _room(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens may be added."""
        positions, longest = self.loaded.config.max_position_embeddings, max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise UserError("a prompt is empty; expected at least one token")
        if longest >= positions:
            raise UserError(f"a prompt has {longest} tokens, the model {positions} positions; shorten it")
        return min(self.sampling.max_new_tokens, positions - longest)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """Ids [batch, longest], and how many at the left of each row are padding."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        # A row's first token pads it: nothing reads it, and a penalty for repetition finds nothing new.
        rows = [[prompt[0]] * pad + list(prompt) for prompt, pad in zip(prompts, padding, strict=True)]
        return torch.tensor(rows, device=self.loaded.device), padding

    @torch.inference_mode()
    def _steps(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The next token of every prompt, step by step, until all have ended."""
        room = self._room(prompts)
        ids, padding = self._padded(prompts)
        cache, penalty = Cache(len(prompts), padding), self.sampling.repetition_penalty != 1
        running, seen = set(range(len(prompts))), ids
        known = self.loaded.info.vocab_size
        for _ in range(room):
            # Rows behind the tokenizer's ids are padding of the vocabulary.
            logits = self.loaded.decoder(ids, cache)[:, :known]
            chosen = self.sampling.choose(logits, seen if penalty else None, self.random)
            tokens = chosen.tolist()
            yield tokens
            running -= {number for number in running if tokens[number] in self.stop}
            if not running:
                return
            ids = chosen[:, None]
            seen = torch.cat((seen, ids), dim=1) if penalty else seen

    @torch.inference_mode()
    def _beams(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The same from a beam search, all at once."""
        room, how = self._room(prompts), self.sampling
        ids, padding = self._padded(prompts)
        mask = torch.arange(ids.shape[1], device=ids.device) >= torch.tensor(padding, device=ids.device)[:, None]
        draw = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p} if how.do_sample else {}
        beyond = list(range(self.loaded.info.vocab_size, self.loaded.config.vocab_size))
        torch.manual_seed(how.seed)  # transformers draws from the global generator
        found = self.loaded.model.generate(
            ids,
            attention_mask=mask.long(),
            num_beams=how.num_beams,
            do_sample=how.do_sample,
            max_new_tokens=room,
            repetition_penalty=how.repetition_penalty,
            eos_token_id=self.stop or None,
            pad_token_id=self.loaded.tokenizer.eos_token_id,
            suppress_tokens=beyond or None,
            **draw,
        )
        yield from found[:, ids.shape[1] :].T.tolist()

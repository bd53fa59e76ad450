"""Generate completions from prompts.

    generator = Generator(loaded, SamplingParams(temperature=0), max_new_tokens=64)
    generator.complete([[1, 320, 17], [1, 9]])      # a batch, padded at the left
    for token in generator.stream([1, 320, 17]):    # one prompt, token by token
        ...

Greedy decoding and sampling run on `Decoder`, beam search on transformers' own `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.inference.decoder import Cache
from minimind_mcore.inference.loading import Loaded
from minimind_mcore.inference.sampling import Sampler, SamplingParams, choose


@dataclass(frozen=True)
class Completion:
    """A completion.

    Attributes:
        ids: ids of the new tokens, without the end token.
        finished: the model ended the completion. Otherwise max_new_tokens or the maximum position was reached.
    """

    ids: list[int]
    finished: bool


class Generator:
    """Generates with one model.

    Args:
        loaded: the model.
        sampling: sampling parameters of every prompt. Prompt n gets the seed `sampling.seed` + n, where n counts the
            prompts of all calls from 0.
        max_new_tokens: maximum number of new tokens per prompt.
        stop: ids that end a completion, besides the tokenizer's eos.
        num_beams: beams of a beam search. 1: no beam search.
    """

    def __init__(
        self,
        loaded: Loaded,
        sampling: SamplingParams,
        max_new_tokens: int = 128,
        stop: Sequence[int] = (),
        num_beams: int = 1,
    ) -> None:
        self.loaded, self.sampling = loaded, sampling
        self.max_new_tokens, self.num_beams = max_new_tokens, num_beams
        self.stop = sorted({loaded.tokenizer.eos_token_id, *stop})
        self._prompts = 0  # number of prompts so far

    def complete(self, prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """Complete a batch of prompts.

        Raises:
            UserError: a prompt is empty, or longer than the model's maximum position.
        """
        ids: list[list[int]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        for tokens in self._beams(prompts) if self.num_beams > 1 else self._steps(prompts):
            for number, token in enumerate(tokens):
                if not finished[number] and token in self.stop:
                    finished[number] = True
                elif not finished[number]:
                    ids[number].append(token)
        return [Completion(*pair) for pair in zip(ids, finished, strict=True)]

    def stream(self, prompt: Sequence[int]) -> Iterator[int]:
        """Yield the new tokens of one prompt as they are generated, without the end token."""
        for (token,) in self._steps([prompt]):
            if token in self.stop:
                return
            yield token

    def _room(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many tokens can be added."""
        positions, longest = self.loaded.config.max_position_embeddings, max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise UserError("a prompt is empty; expected at least one token")
        if longest >= positions:
            raise UserError(f"a prompt has {longest} tokens, but the model has {positions} positions; shorten it")
        return min(self.max_new_tokens, positions - longest)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """Return ids [batch, longest], and the number of padding tokens at the left of each row."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        # The row's first token is the padding: nothing attends to it, and it does not change the repetition penalty.
        rows = [[prompt[0]] * pad + list(prompt) for prompt, pad in zip(prompts, padding, strict=True)]
        return torch.tensor(rows, device=self.loaded.device), padding

    @torch.inference_mode()
    def _steps(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield the next token of every prompt, step by step, until all prompts have ended."""
        room = self._room(prompts)
        ids, padding = self._padded(prompts)
        samplers = [self._sampler(prompt) for prompt in prompts]
        cache, known = Cache(len(prompts), padding), self.loaded.info.vocab_size
        written: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for _ in range(room):
            # Ids above the tokenizer's are padding of the vocabulary.
            logits = self.loaded.decoder(ids, cache)[:, :known]
            if self.sampling.changes_logits:
                for row, sampler in enumerate(samplers):
                    sampler.adjust(logits[row], written[row])
            tokens = choose(logits, samplers)
            yield tokens
            running -= {number for number in running if tokens[number] in self.stop}
            if not running:
                return
            for answer, token in zip(written, tokens, strict=True):
                answer.append(token)
            ids = torch.tensor(tokens, device=self.loaded.device)[:, None]

    def _sampler(self, prompt: Sequence[int]) -> Sampler:
        """Return the sampler of the next prompt."""
        seed = self.sampling.seed
        self._prompts += 1
        return Sampler(self.sampling if seed is None else replace(self.sampling, seed=seed + self._prompts - 1), prompt)

    @torch.inference_mode()
    def _beams(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield the same as `_steps` for a beam search. The search ends before the first token is yielded."""
        room, how = self._room(prompts), self.sampling
        ids, padding = self._padded(prompts)
        mask = torch.arange(ids.shape[1], device=ids.device) >= torch.tensor(padding, device=ids.device)[:, None]
        samples = how.temperature > 0
        draw = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p} if samples else {}
        beyond = list(range(self.loaded.info.vocab_size, self.loaded.config.vocab_size))
        if how.seed is not None:
            torch.manual_seed(how.seed)  # transformers draws from the global generator
        found = self.loaded.model.generate(
            ids,
            attention_mask=mask.long(),
            num_beams=self.num_beams,
            do_sample=samples,
            max_new_tokens=room,
            repetition_penalty=how.repetition_penalty,
            eos_token_id=self.stop or None,
            pad_token_id=self.loaded.tokenizer.eos_token_id,
            suppress_tokens=beyond or None,
            **draw,
        )
        yield from found[:, ids.shape[1] :].T.tolist()

"""Sample the next token of every sequence in a batch, each with its own sampling parameters."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

LIKELIEST = 256  # number of tokens that top_p tries first; a full sort of 6400 takes ten times as long


class Constraint(Protocol):
    """Restricts the next token of one sequence."""

    def accept(self, token: int) -> None:
        """Append a token to the sequence."""

    def mask(self, logits: Tensor) -> None:
        """Set the logits [vocabulary] of forbidden tokens to minus infinity."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one sequence, with the names and meanings of OpenAI and vLLM.

    Attributes:
        temperature: divisor of the logits. 0: greedy.
        top_k: sample from the k most likely tokens. 0: all.
        top_p: then from the most likely tokens that together reach this probability.
        min_p: then from the tokens with at least this share of the most likely token's probability.
        repetition_penalty: divides positive logits of tokens in prompt and answer, and multiplies negative ones.
        seed: seed of the random numbers. None: a different one each time.
        logprobs: number of most likely tokens to report per position. None: no log-probabilities.
        banned: ids that are not sampled before `min_tokens`.
        grammar: constraint on the text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    min_tokens: int = 0
    banned: frozenset[int] = frozenset()
    grammar: Constraint | None = None

    @property
    def changes_logits(self) -> bool:
        """Whether any setting besides temperature and truncation changes the logits."""
        penalties = (self.repetition_penalty != 1, self.presence_penalty, self.frequency_penalty)
        return bool(any(penalties) or self.logit_bias or self.min_tokens or self.grammar)


@dataclass(frozen=True)
class Logprob:
    """Log-probabilities at one position, before temperature and truncation.

    Attributes:
        token: the chosen token.
        value: log-probability of the chosen token.
        top: most likely tokens with their log-probabilities.
    """

    token: int
    value: float
    top: list[tuple[int, float]]


class Sampler:
    """Samples the tokens of one sequence. Its random numbers do not depend on the rest of the batch.

    Args:
        settings: sampling parameters.
        prompt: ids of the prompt, for the repetition penalty.
    """

    def __init__(self, settings: SamplingParams, prompt: SequenceOf[int]) -> None:
        self.settings, self.prompt = settings, prompt
        # The seed is passed as a text, because random uses the absolute value of a number: -1 would equal 1.
        self._random = random.Random(None if settings.seed is None else str(settings.seed))
        self._seen: Tensor | None = None  # [vocabulary]: tokens in prompt or answer
        self._counts: Tensor | None = None  # [vocabulary]: counts of tokens in the answer

    def uniform(self) -> float:
        """Return a random number in [0, 1)."""
        return self._random.random()

    def adjust(self, logits: Tensor, ids: SequenceOf[int]) -> None:
        """Apply penalties, biases and the grammar to logits [vocabulary], in place.

        Args:
            logits: logits of the next token.
            ids: ids of the answer so far.
        """
        how = self.settings
        if how.repetition_penalty != 1 or how.presence_penalty or how.frequency_penalty:
            if self._seen is None or self._counts is None:
                self._seen = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
                self._counts = torch.zeros(len(logits), device=logits.device)
                self._seen[[token for token in self.prompt if token < len(logits)]] = True
                for token in ids:
                    self._counts[token] += 1
            elif ids:
                self._counts[ids[-1]] += 1
            seen = self._seen | (self._counts > 0)
            penalised = torch.where(logits > 0, logits / how.repetition_penalty, logits * how.repetition_penalty)
            torch.where(seen, penalised, logits, out=logits)
            logits -= how.frequency_penalty * self._counts + how.presence_penalty * (self._counts > 0)
        for token, bias in how.logit_bias.items():
            logits[token] += bias
        if how.grammar is not None:
            how.grammar.mask(logits)
        if len(ids) < how.min_tokens:
            longer = logits.clone()
            longer[list(how.banned)] = float("-inf")
            if longer.max() > float("-inf"):  # a completed grammar allows nothing but the end
                logits.copy_(longer)


def choose(logits: Tensor, samplers: SequenceOf[Sampler]) -> list[int]:
    """Choose the next token of each sequence.

    Args:
        logits: [sequences, vocabulary], adjusted.
        samplers: one per sequence.
    """
    chosen: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, sampler in enumerate(samplers) if sampler.settings.temperature > 0]
    if drawn:
        tokens = _draw(logits if len(drawn) == len(samplers) else logits[drawn], [samplers[row] for row in drawn])
        for row, token in zip(drawn, tokens, strict=True):
            chosen[row] = token
    return chosen


def _draw(logits: Tensor, samplers: SequenceOf[Sampler]) -> list[int]:
    """Sample a token for each row of logits [sequences, vocabulary]."""
    settings, size = [sampler.settings for sampler in samplers], logits.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    scaled = logits.float() / column([max(how.temperature, 1e-5) for how in settings])
    if all(how.top_p == 1 and not how.top_k for how in settings):
        probabilities = scaled.softmax(-1)
    else:
        likeliest, order, total = _likeliest(scaled, settings)
        limits = column([how.top_k or size for how in settings])
        places = torch.arange(likeliest.shape[1], device=logits.device)
        likeliest = likeliest.masked_fill(places >= limits, float("-inf"))
        total = torch.where(limits <= likeliest.shape[1], likeliest.logsumexp(-1, keepdim=True), total)
        shares = (likeliest - total).exp()
        before = shares.cumsum(-1) - shares
        shares = shares.masked_fill(before >= column([how.top_p for how in settings]), 0.0)
        # In vocabulary order, as without top_p and top_k, so that a seed gives the same tokens in any batch.
        probabilities = torch.zeros_like(scaled).scatter_(1, order, shares)
    if any(how.min_p for how in settings):
        least = column([how.min_p for how in settings]) * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    sums = probabilities.cumsum(-1)
    point = column([sampler.uniform() for sampler in samplers]) * sums[:, -1:]
    tokens = torch.searchsorted(sums, point, right=True).clamp_(max=size - 1)
    found: list[int] = tokens.squeeze(1).tolist()
    return found


def _likeliest(scaled: Tensor, settings: SequenceOf[SamplingParams]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most likely tokens of each row in descending order, as many as top_k and top_p need.

    Returns:
        Values and ids [sequences, tokens], and the log of the sum over all tokens, [sequences, 1].
    """
    total = scaled.logsumexp(-1, keepdim=True)
    values, order = scaled.topk(min(LIKELIEST, scaled.shape[1]), dim=-1)
    shares = (values.logsumexp(-1, keepdim=True) - total).exp().flatten().tolist()
    for share, how in zip(shares, settings, strict=True):
        if not 0 < how.top_k <= LIKELIEST and (how.top_k or share < how.top_p or how.top_p == 1):
            values, order = scaled.sort(dim=-1, descending=True)
            break
    return values, order, total


def logprobs(logits: Tensor, token: int, top: int) -> Logprob:
    """Return the log-probabilities at a position.

    Args:
        logits: [vocabulary], unchanged logits of the model.
        token: the chosen token.
        top: number of most likely tokens to report.
    """
    values = logits.float().log_softmax(-1)
    best, order = values.topk(min(top, len(values)))
    return Logprob(token, float(values[token]), list(zip(order.tolist(), best.tolist(), strict=True)))

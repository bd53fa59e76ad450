"""Log-probabilities of continuations, and the scores computed from them: accuracy, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.inference.benchmarks import Benchmark, Subject
from minimind_mcore.inference.loading import Loaded


@dataclass(frozen=True)
class Accuracy:
    """The number of right answers.

    Attributes:
        questions: number of questions.
        right: number of questions whose most likely continuation, or whose answer, is right.
        right_by_length: for choices: the same with log-probabilities divided by the choice's length in characters.
    """

    questions: int
    right: int
    right_by_length: int | None = None

    @property
    def value(self) -> float:
        """The share of right answers."""
        return self.right / self.questions

    @property
    def by_length(self) -> float | None:
        """The share of right answers by `right_by_length`."""
        return None if self.right_by_length is None else self.right_by_length / self.questions

    @property
    def error(self) -> float:
        """Standard error of `value`: sample standard deviation over the root of the number; nan for a single
        question."""
        if self.questions < 2:
            return math.nan
        return math.sqrt(self.value * (1 - self.value) / (self.questions - 1))

    def __add__(self, other: Accuracy) -> Accuracy:
        both = (self.right_by_length, other.right_by_length)
        by_length = None if None in both else sum(number for number in both if number is not None)
        return Accuracy(self.questions + other.questions, self.right + other.right, by_length)


@dataclass(frozen=True)
class Perplexity:
    """How well a text is predicted.

    Attributes:
        nats: negative log-likelihood of all tokens.
        tokens: number of predicted tokens: all except the first of each document, including eos.
        bytes: number of UTF-8 bytes of the text.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def value(self) -> float:
        """Perplexity per token. Depends on the tokenizer."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text. Comparable between models with different tokenizers."""
        return self.nats / math.log(2) / self.bytes


class Scorer:
    """Computes log-probabilities with a model.

    Args:
        loaded: the model.
        batch: rows per batch.
    """

    def __init__(self, loaded: Loaded, batch: int) -> None:
        self.loaded, self.batch = loaded, batch

    def encode(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Return the ids of both texts, and how many belong to the continuation (split as in lm-evaluation-harness)."""
        tokenizer: Any = self.loaded.tokenizer
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        count = len(whole) - len(tokenizer(context, add_special_tokens=False)["input_ids"])
        if count < 1 or count == len(whole):
            raise UserError(f"cannot score {continuation!r} behind {context[-40:]!r}: no token of one of them")
        if len(whole) > self.loaded.config.max_position_embeddings:
            raise UserError(f"a question has {len(whole)} tokens, more than the model's positions; give fewer shots")
        return whole, count

    def scores(self, requests: Sequence[tuple[list[int], int]]) -> Iterator[tuple[int, float]]:
        """Yield (number of the request, log-probability of the last `count` of its ids), in any order.

        One-token continuations of the same context share a row.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (ids, _) in enumerate(requests):
            rows.setdefault(tuple(ids[:-1]), []).append(number)
        ordered = sorted(rows, key=len, reverse=True)
        for first in range(0, len(ordered), self.batch):
            batch = ordered[first : first + self.batch]
            wanted = [(row, number) for row, ids in enumerate(batch) for number in rows[ids]]
            yield from self._of_batch(batch, [(row, number, *requests[number]) for row, number in wanted])

    @torch.inference_mode()
    def _of_batch(
        self, rows: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, int, list[int], int]]
    ) -> list[tuple[int, float]]:
        """Return the scores of the requests (row, request, ids, count) in one batch."""
        hidden = self._hidden(rows)
        # One copy of all targets to the device and one of all scores back, because each copy synchronizes.
        targets = torch.tensor([i for _, _, ids, count in wanted for i in ids[-count:]], device=hidden.device)
        sums, start = [], 0
        for row, _, ids, count in wanted:
            last = hidden[row, len(ids) - 1 - count : len(ids) - 1]
            sums.append(self._log_probabilities(last, targets[start : start + count]).sum())
            start += count
        scores: list[float] = torch.stack(sums).tolist()
        return [(number, score) for (_, number, _, _), score in zip(wanted, scores, strict=True)]

    def _hidden(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the last layer's output, [rows, longest, hidden]. Padding is on the right, hidden by the causal
        mask."""
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.loaded.device)
        hidden: Tensor = self.loaded.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def _log_probabilities(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probabilities [n] in fp32 of the ids `targets` [n] from the hidden states before them [n,
        hidden]."""
        logits = self.loaded.model.lm_head(hidden).float()
        found: Tensor = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        return found

    def accuracy(self, benchmark: Benchmark, subject: Subject, shots: int) -> Accuracy:
        """Answer the questions of a subject by the most likely continuation."""
        requests, places = [], []
        for number, question in enumerate(subject.questions):
            context = benchmark.prompt(subject, question, shots)
            for choice, continuation in enumerate(benchmark.continuations(question)):
                requests.append(self.encode(context, continuation))
                places.append((number, choice, len(continuation) - 1))
        found: list[list[tuple[float, float]]] = [[(0.0, 0.0)] * len(q.choices) for q in subject.questions]
        for request, score in self.scores(requests):
            number, choice, length = places[request]
            found[number][choice] = (score, score / max(length, 1))
        right = [0, 0]
        for question, pairs in zip(subject.questions, found, strict=True):
            for kind in (0, 1):
                best = max(range(len(pairs)), key=lambda choice: pairs[choice][kind])
                right[kind] += best == question.answer
        return Accuracy(len(subject.questions), *right)

    def perplexity(self, documents: Iterable[tuple[Sequence[int], int]], length: int) -> Perplexity:
        """Return the perplexity of documents, each given as ids and bytes of text. Long ones are split at `length`
        tokens.

        Raises:
            UserError: the text has no token to predict.
        """
        nats, tokens, size = 0.0, 0, 0
        pieces: list[Sequence[int]] = []

        def flush() -> None:
            nonlocal nats, tokens
            if pieces:
                requests = [(list(piece), len(piece) - 1) for piece in pieces]
                nats -= sum(score for _, score in self.scores(requests))
                tokens += sum(count for _, count in requests)
                pieces.clear()

        for ids, count in documents:
            size += count
            # A piece starts with the last token of the previous piece, so every token but the first is predicted once.
            pieces += [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]
            if len(pieces) >= 4 * self.batch:
                flush()
        flush()
        if tokens == 0 or size == 0:
            raise UserError("the held-out text has no tokens to predict")
        return Perplexity(nats, tokens, size)

"""How the next token is chosen; the order of the steps is transformers': penalty, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind_mcore.errors import UserError
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

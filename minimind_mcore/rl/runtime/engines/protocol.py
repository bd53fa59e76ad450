"""What the trainer asks of an engine that writes responses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.ranges import problem


@dataclass(frozen=True, kw_only=True)
class RolloutSamplingParams:
    """How tokens are sampled; the names are those of vLLM and of `generate_config.sampling_config`.

    Attributes:
        max_tokens: of a response, at most.
        temperature: divides the logits; more than 0, as the policy that is trained is softmax(logits / temperature).
        top_k: draw from so many of the likeliest; 0 or less for all.
        top_p: and of these from the likeliest that together reach this probability.
        min_p: and of these from those at least so likely, as a share of the likeliest.
        stop: ids that end a response; the one that does is part of it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p"):
            if wrong := problem(name, getattr(self, name), "sampling_config"):
                raise UserError(f"sampling_config.{name}: {wrong}")


PROBE = list(range(8))  # ids of a prompt whose log-probabilities show weights that an engine keeps in a packed form

Ids = NDArray[np.int32]
LogProbabilities = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Response:
    """What an engine wrote.

    Attributes:
        ids: [tokens] int32; of a finished response the last token ended it.
        logp: [tokens] float32, under softmax(logits / temperature) over the whole vocabulary, whatever top-k and top-p
            left to draw from: what the trainer computes of the same tokens.
        finished: an end token was sampled ("stop"); else the limit was reached ("length").
        routes: [tokens of prompt and response - 1, layers, k], the experts of each token that the engine has read; None
            where the engine does not record them.
    """

    ids: Ids
    logp: LogProbabilities
    finished: bool
    routes: NDArray[np.uint8] | None = None

    def first(self, count: int, context: int) -> Response:
        """Return the first `count` tokens of the response to `context` tokens."""
        if len(self.ids) <= count:
            return self
        routes = None if self.routes is None else self.routes[: context + count - 1]
        return Response(self.ids[:count], self.logp[:count], False, routes)


class RolloutEngine(Protocol):
    """Writes responses with weights that the trainer hands over."""

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take the names and tensors of the whole megatron-core model; in place from the second time on.

        The tensors come bucket by bucket and are not to be kept: they may share memory with the object store.
        """

    def weights(self) -> dict[str, Tensor]:
        """Copies of the tensors that it computes with, by its own names."""
        ...

    def perturb(self) -> None:
        """Spoil every weight: the next `load_weights` must put all of them right."""

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: RolloutSamplingParams, seeds: Sequence[int]
    ) -> list[Response]:
        """`n` responses to each prompt, neighbours in the result.

        Args:
            prompts: ids.
            n: of each.
            sampling: how tokens are sampled.
            seeds: one for each response: the same seed and weights write the same response, whoever runs it.
        """
        ...


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's weights, by their names in transformers."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def spoil(model: torch.nn.Module) -> None:
    """Fill a model's weights with NaN."""
    for parameter in model.parameters():
        parameter.fill_(float("nan"))


def uniforms(seeds: Sequence[int], count: int) -> NDArray[np.float32]:
    """[responses, count] numbers in [0, 1) that each response draws its tokens with."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(count, dtype=np.float32) for seed in seeds]
    return np.stack(rows)

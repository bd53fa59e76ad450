"""The interface of the rollout engines, which generate responses for the trainer."""

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
    """Sampling parameters, named as in vLLM and in `generate_config.sampling_config`.

    Attributes:
        max_tokens: maximum number of tokens of a response.
        temperature: divisor of the logits. More than 0, because the trained policy is softmax(logits / temperature).
        top_k: number of most likely tokens to sample from. 0 or less: all.
        top_p: keep the most likely of these tokens until their probabilities add up to this value.
        min_p: keep those of these tokens whose probability is at least this share of the highest probability.
        stop: ids of end tokens. The end token is the last token of a response.
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


# Ids of a prompt. An engine that cannot return all its weights, because it packs them or runs in a server, returns
# log-probabilities for this prompt instead, which change with the weights.
PROBE = list(range(8))

Ids = NDArray[np.int32]
LogProbabilities = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Response:
    """A generated response.

    Attributes:
        ids: [tokens] int32. The last id of a finished response is an end token.
        logp: [tokens] float32, log-probabilities under softmax(logits / temperature) over the whole vocabulary. Top-k
            and top-p do not change them, because the trainer computes its log-probabilities without top-k and top-p.
        finished: whether an end token was sampled (vLLM's "stop"), not the limit reached ("length").
        routes: [tokens of prompt and response - 1, layers, k], the experts of each token, without the last token, which
            is not an input. None if the engine does not record experts.
    """

    ids: Ids
    logp: LogProbabilities
    finished: bool
    routes: NDArray[np.uint8] | None = None

    def first(self, count: int, context: int) -> Response:
        """Cut the response to its first `count` tokens. `context` is the number of tokens of its prompt."""
        if len(self.ids) <= count:
            return self
        routes = None if self.routes is None else self.routes[: context + count - 1]
        return Response(self.ids[:count], self.logp[:count], False, routes)


class RolloutEngine(Protocol):
    """Generates responses with weights of the trainer."""

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load names and tensors of the whole megatron-core model. Later calls overwrite the weights in place.

        The tensors arrive bucket by bucket. The engine must copy them, because they may share memory with Ray's object
        store.
        """

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the engine's tensors, by the engine's own names."""
        ...

    def perturb(self) -> None:
        """Overwrite every weight with a wrong value, to test that `load_weights` writes all weights."""

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: RolloutSamplingParams, seeds: Sequence[int]
    ) -> list[Response]:
        """Generate `n` responses to each prompt. Responses to one prompt are next to each other in the result.

        Args:
            prompts: token ids of each prompt.
            n: number of responses to each prompt.
            sampling: sampling parameters.
            seeds: one seed for each response. With equal seeds and weights every engine process generates equal
                responses. SGLang ignores the seeds.
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
    """Return random numbers in [0, 1), [responses, count], with which each response samples its tokens."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(count, dtype=np.float32) for seed in seeds]
    return np.stack(rows)

"""A response as the token ids of its segments: what the policy generated, and what an environment added between.

    trajectory = Trajectory(prompt, seed=7)
    trajectory.append_response(response)                  # ids and log-probabilities of an engine, mask 1
    trajectory.append_observation(turns(messages))        # ids of an environment's messages, mask 0
    trajectory.context                                    # prompt and segments: what the engine continues

Ids are only appended. Text that the policy generated is never tokenized again, because text to ids is not the inverse
of ids to text: the trained ids would differ from the sampled ids, and the mask would shift.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from minimind_mcore.rl.runtime.data import RLPrompt
from minimind_mcore.rl.runtime.engines.protocol import Ids, LogProbabilities, Response


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive tokens of one source.

    Attributes:
        ids: [tokens] int32.
        logp: [tokens] float32, log-probabilities of the engine; 0 for an environment's tokens.
        mask: [tokens] float32, 1 on tokens that are trained.
        source: writer of the tokens.
    """

    ids: Ids
    logp: LogProbabilities
    mask: NDArray[np.float32]
    source: Literal["policy", "environment"]


@dataclass(eq=False)
class Trajectory:
    """One response to a prompt.

    Attributes:
        prompt: the ids of the prompt.
        seed: seed of the sampling.
        segments: in order; the first segment is the policy's.
        finished: the policy ended the last segment with an end token.
        routes: see `Response`, of the whole context up to the last response. A token has the experts that the first
            weights to read it chose. An engine reads earlier segments again, perhaps with newer weights.
    """

    prompt: RLPrompt
    seed: int
    segments: list[Segment] = field(default_factory=list)
    finished: bool = False
    routes: NDArray[np.uint8] | None = None

    def append_response(self, response: Response) -> None:
        """Append the response of an engine."""
        ones = np.ones(len(response.ids), np.float32)
        self.segments.append(Segment(response.ids, response.logp, ones, "policy"))
        self.finished = response.finished
        if self.routes is None or response.routes is None:
            self.routes = response.routes
        else:
            self.routes = np.concatenate([self.routes, response.routes[len(self.routes) :]])

    def append_observation(self, ids: Ids) -> None:
        """Append the ids of an environment's messages."""
        zeros = np.zeros(len(ids), np.float32)
        self.segments.append(Segment(ids, zeros, zeros, "environment"))

    @property
    def ids(self) -> Ids:
        """The ids of the response, the environment's among them."""
        return np.concatenate([segment.ids for segment in self.segments])

    @property
    def logp(self) -> LogProbabilities:
        """The log-probabilities of `ids`."""
        return np.concatenate([segment.logp for segment in self.segments])

    @property
    def mask(self) -> NDArray[np.float32]:
        """The mask of `ids`."""
        return np.concatenate([segment.mask for segment in self.segments])

    @property
    def context(self) -> Ids:
        """Prompt and response: what an engine continues."""
        return np.concatenate([self.prompt.ids, *(segment.ids for segment in self.segments)])

    @property
    def length(self) -> int:
        """Number of tokens of `context`."""
        return len(self.prompt.ids) + sum(len(segment.ids) for segment in self.segments)

    @property
    def generated_tokens(self) -> int:
        """Number of tokens that the policy generated."""
        return sum(len(segment.ids) for segment in self.segments if segment.source == "policy")

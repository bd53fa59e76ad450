"""Score a batch of responses: `Rewards(["acc", "format"], [1.0, 0.5]).score(responses, labels).total`."""

from __future__ import annotations

import inspect
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.rl.rewards.length import overlong
from minimind_mcore.rl.rewards.reward_model import Message, RewardModel
from minimind_mcore.rl.rewards.verifier_pool import Failed, VerifierPool, failure, resolve
from minimind_mcore.rl.rewards.verifiers import VERIFIERS, Verifier

OPTIONAL = ("record", "turns")  # arguments that older functions with named arguments do not accept
_SAMPLES = 3  # failures that are shown per batch
_WINDOW, _ENOUGH = 256, 32  # number of recent responses by which failures are judged: at most, at least


@dataclass(frozen=True)
class Overlong:
    """The penalty of responses near the maximum length; see `length.overlong`."""

    room: int
    buffer: int
    factor: float = 1.0


@dataclass(frozen=True)
class Failure:
    """A response that could not be scored."""

    verifier: str
    reason: str
    response: str
    label: str
    where: str = ""

    def __str__(self) -> str:
        """Return one line for the log."""
        raised = f" (raised at {self.where})" if self.where else ""
        return f"{self.verifier}: {self.reason}; label {self.label[:80]!r}, response {self.response[-200:]!r}{raised}"


@dataclass
class Scores:
    """The scores of a batch.

    Attributes:
        total: [B] float32, the weighted sum.
        by_verifier: [B] float32 per verifier, before weighting.
        failures: number of responses per verifier that could not be scored. They count as wrong.
        samples: a few failures, for the log.
    """

    total: Tensor
    by_verifier: dict[str, Tensor]
    failures: Counter[str] = field(default_factory=Counter)
    samples: list[Failure] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of consecutive parts of a batch."""
        names = parts[0].by_verifier
        return cls(
            torch.cat([part.total for part in parts]),
            {name: torch.cat([part.by_verifier[name] for part in parts]) for name in names},
            sum((part.failures for part in parts), Counter[str]()),
            [sample for part in parts for sample in part.samples],
        )

    def metrics(self) -> dict[str, float]:
        """Return the means with MindSpeed-RL's names, and the number of failures."""
        named = {f"{name}_rewards/mean": values.mean().item() for name, values in self.by_verifier.items()}
        return named | {f"{name}_rewards/failures": float(count) for name, count in self.failures.items()}


class Rewards(AbstractContextManager["Rewards"]):
    """The verifiers with their weights, and the processes that run the slow verifiers."""

    def __init__(
        self,
        names: list[str],
        weights: list[float],
        *,
        timeout: float = 30,
        parallel: int = 1,
        max_failures: float = 0.2,
        overlong: Overlong | None = None,
        model: RewardModel | None = None,
        model_weight: float = 1.0,
        columns: Sequence[str] = (),
    ) -> None:
        """Look up the verifiers. Use the object as a context manager, or call `close`.

        Args:
            names: keys of `VERIFIERS`, or import paths `package.module:function` of your own functions
                `(response: str, label: str, **context) -> float` (`verifier_function`). If one of your functions fails,
                the score is its attribute `wrong`, else the lowest score it has returned so far, at most 0.
            weights: weight of each verifier (`verifier_weight`).
            timeout: seconds that a verifier may take for one response (`verifier_timeout`).
            parallel: number of worker processes (`verifier_parallel`).
            max_failures: share of recent responses that may fail before `score` raises.
            overlong: DAPO's penalty, added to the total.
            model: a reward model, whose score is added as `reward_model`.
            model_weight: weight of that score.
            columns: names of the keys of `columns` in `score`. Your own functions must accept them.

        Raises:
            UserError: an unknown name (with the nearest), a function that cannot be imported or called with these
                arguments, or lists of different lengths.
        """
        if len(names) != len(weights):
            raise UserError(
                f"verifier_weight: found {len(weights)} weights, expected {len(names)}, one for each of "
                f"verifier_function: {', '.join(names)}"
            )
        self.verifiers = {name: verifier(name, columns) for name in names}
        self.weights = dict(zip(names, weights, strict=True))
        self.max_failures = max_failures
        self.overlong = overlong
        self.model = model
        self.model_weight = model_weight
        self.workers = VerifierPool(names, parallel, timeout)
        self._least: dict[str, float] = {}
        self._recent: dict[str, deque[bool]] = {name: deque(maxlen=_WINDOW) for name in names}

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker processes."""
        self.workers.close()

    def score(
        self,
        responses: list[str],
        labels: list[str],
        *,
        categories: list[Any] | None = None,
        tool_calls: list[int] | None = None,
        lengths: Tensor | None = None,
        prompts: list[str] | None = None,
        messages: list[list[Message]] | None = None,
        columns: Mapping[str, list[str]] | None = None,
        records: Sequence[Mapping[str, Any]] | None = None,
        turns: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        judge: bool = True,
    ) -> Scores:
        """Score each response against its label.

        Args:
            responses: B texts without special tokens: what the policy generated, and nothing of an environment.
            labels: B texts, the right answers.
            categories: B values. Where the value is 0 (or false) the verifiers do not apply, and the response scores 0.
            tool_calls: B counts (retool_reward).
            lengths: [B] tokens of each response. Required with the penalty of overlong responses.
            prompts: B texts, the prompts of the responses, for your own functions.
            messages: B conversations before the responses, each of messages with `role` and `content`. Required with a
                reward model.
            columns: B texts of each further column of the data, by its name, for your own functions.
            records: B records of the data (`messages`, `tools`, `gt` ...), for your own functions that take `record`.
            turns: B lists of the segments of a response, the environment's among them, each with `source` and `text`,
                for your own functions that take `turns`.
            judge: count failures of this batch towards `max_failures`.

        Raises:
            UserError: more responses failed than `max_failures` allows, or a reward model has no `messages`.
        """
        known = {"tool_calls": tool_calls, "prompt": prompts, "length": None if lengths is None else lengths.tolist()}
        given: dict[str, list[Any]] = {**(columns or {})}
        given |= {name: values for name, values in known.items() if values is not None}
        contexts = [{name: values[row] for name, values in given.items()} for row in range(len(responses))]
        more = {name: values for name, values in (("record", records), ("turns", turns)) if values is not None}
        rows = [row for row in range(len(responses)) if categories is None or bool(categories[row])]
        scores = Scores(torch.zeros(len(responses)), {})
        for name, verifier in self.verifiers.items():
            own = {key: values for key, values in more.items() if key in verifier.optional}
            # A column of such a name comes first.
            seen = [{key: values[row] for key, values in own.items()} | one for row, one in enumerate(contexts)]
            values = self._apply(name, rows, responses, labels, seen, scores, judge)
            scores.by_verifier[name] = values
            scores.total += self.weights[name] * values
        if self.overlong is not None:
            if lengths is None:
                raise UserError("overlong: the penalty needs the lengths of the responses")
            scores.by_verifier["overlong"] = overlong(
                lengths.cpu(), self.overlong.room, self.overlong.buffer, self.overlong.factor
            )
            scores.total += scores.by_verifier["overlong"]
        if self.model is not None:
            if messages is None:
                raise UserError("reward model: it needs the messages before the responses")
            scores.by_verifier["reward_model"] = self.model.score(messages, responses)
            scores.total += self.model_weight * scores.by_verifier["reward_model"]
        if judge:
            self._judge(scores)
        return scores

    def _apply(
        self,
        name: str,
        rows: list[int],
        responses: list[str],
        labels: list[str],
        contexts: list[dict[str, Any]],
        scores: Scores,
        judge: bool,
    ) -> Tensor:
        """Return the scores [B] of one verifier, and add its failures to `scores`."""
        results: dict[int, float | Failed] = {}
        for row in rows:
            quick = _quickly(self.verifiers[name], responses[row], labels[row], contexts[row])
            if quick is not None:
                results[row] = quick
        slow = [row for row in rows if row not in results]
        tasks = [(name, responses[row], labels[row], contexts[row]) for row in slow]
        results |= dict(zip(slow, self.workers.map(tasks), strict=True))
        failed = {row: why for row, why in results.items() if isinstance(why, Failed)}
        found = [value for value in results.values() if not isinstance(value, Failed)]
        self._least[name] = min([self._least.get(name, 0.0), *found])
        wrong = self.verifiers[name].wrong
        values = torch.zeros(len(responses))
        for row, value in results.items():
            values[row] = (self._least[name] if math.isnan(wrong) else wrong) if isinstance(value, Failed) else value
        if judge:
            self._recent[name].extend(row in failed for row in rows)
        if failed:
            scores.failures[name] = len(failed)
            scores.samples += [
                Failure(name, why.reason, responses[row], labels[row], why.where)
                for row, why in list(failed.items())[:_SAMPLES]
            ]
        return values

    def _judge(self, scores: Scores) -> None:
        """Raise an error if so many responses failed that the rewards would mislead training."""
        for name, count in scores.failures.items():
            recent = self._recent[name]
            share = sum(recent) / len(recent)
            # A single slow response in a small first batch is not enough evidence. A batch in which all fail is.
            judged = len(recent) >= _ENOUGH or (share == 1 and len(recent) > 1)
            if judged and share > self.max_failures:
                shown = "\n  ".join(str(sample) for sample in scores.samples if sample.verifier == name)
                raise UserError(
                    f"{name}: could not score {sum(recent)} of the last {len(recent)} responses ({count} of this "
                    f"batch), more than the {self.max_failures:.0%} allowed. Fix the verifier, raise "
                    f"verifier_timeout or verifier_parallel, or allow more failures. For example:\n  {shown}"
                )


def verifier(name: str, columns: Sequence[str]) -> Verifier:
    """Return the verifier of a name or import path. See `Rewards`."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    if ":" not in name:
        hint = did_you_mean(name, VERIFIERS, begin=". Did") or f". Expected one of {', '.join(VERIFIERS)},"
        raise UserError(f"verifier_function: found {name!r}{hint} or package.module:function of your own")
    function = resolve(name)
    try:
        signature = inspect.signature(function)
        parameters = signature.parameters.values()
        takes = {one.name for one in parameters}
        anything = any(one.kind is one.VAR_KEYWORD for one in parameters)
        optional = tuple(name for name in OPTIONAL if anything or name in takes)
        known = ["prompt", "length", *columns, *optional]
        signature.bind("", "", **dict.fromkeys(known, ""))
    except (TypeError, ValueError) as error:
        context = ", ".join(["prompt", "length", *OPTIONAL, *columns])
        raise UserError(
            f"{name}: {error}. Expected a function (response: str, label: str, **context) -> float; "
            f"context has {context}"
        ) from error
    wrong = float(getattr(function, "wrong", math.nan))
    return Verifier(function, wrong, lambda *_, **__: None, right=None, optional=optional)


def _quickly(verifier: Verifier, response: str, label: str, context: dict[str, Any]) -> float | Failed | None:
    """Return a score at once, or why there is none, or None if a worker process must compute it."""
    try:
        return (verifier.quick or verifier.score)(response, label, **context)
    except Exception as error:  # whatever the verifier raised
        return failure(error)

r"""MindSpeed-RL's verifiers by name, with the same scores, and MiniMind's rules.

| name               | a response is right if                                                  | wrong (right: 1)      |
|--------------------|-------------------------------------------------------------------------|-----------------------|
| acc                | its answer (last box) equals the label, as text or for sympy            | -0.5; no box: -1      |
| format             | it is <think>..</think><answer>..</answer>                              | 0                     |
| step               | it shows three steps (a third for each)                                 | 0                     |
| strict_format      | each tag occurs once, in order, with one box inside the answer          | -0.5                  |
| base_acc           | the box is inside the answer tags, and graded as right                  | 0                     |
| math_17k_acc       | the last box is graded as right                                         | 0                     |
| acc_for_ppo        | the same                                                                | 0                     |
| acc_for_dapo       | it has "Answer: label" near its end                                     | -1                    |
| math_verify_reward | the box is inside the answer tags, and math-verify accepts it           | 0                     |
| retool_reward      | a box near its end equals the label exactly                             | -1; +0.1 a tool call  |
| minimind_shape     | see `shaping`                                                           |                       |
| minimind_reason    | see `shaping`                                                           |                       |

"Graded" means mathruler's `grade_answer` (PRM800K). A verifier that raises or times out scores the response as wrong.
MindSpeed-RL gives 0 for a timeout of `acc` and `strict_format`, which is more than for a wrong answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minimind_mcore.rl.rewards import dapo, equality, extraction, formats, shaping

Score = Callable[..., float]


@dataclass(frozen=True)
class Verifier:
    """A function that scores one response, and its special scores.

    Attributes:
        score: `(response, label, **context) -> float`.
        wrong: the score of a wrong response, also given if scoring fails.
        quick: a fast function with the same signature. It returns None if it cannot decide, and `score` must run in
            a worker process. None: `score` itself is fast.
        right: the score of a right response. None: the verifier has no right or wrong.
        compares: the verifier compares with a label, so the data must have one.
        optional: names of further arguments that the verifier takes: `record` and `turns` of `Rewards.score`.
    """

    score: Score
    wrong: float
    quick: Callable[..., float | None] | None = None
    right: float | None = 1.0
    compares: bool = True
    optional: tuple[str, ...] = ()


class _Undecided(Exception):
    """Raised if only sympy could decide."""


def _undecided(answer: str, label: str) -> bool:
    raise _Undecided


def acc(response: str, label: str, symbolic: equality.Symbolic | None = None, **_: Any) -> float:
    """Return 1 if the answer in the last box is the label or equals it by sympy, -0.5 if not, -1 without a box."""
    text = re.sub(r"^.*?<\|im_start\|>assistant", "<|im_start|>assistant", response, count=1, flags=re.DOTALL)
    for stop in ("</s>", "<|im_end|>", "<|endoftext|>"):
        if stop in text:
            text = text.split(stop)[0].strip()
    answer = extraction.extract(text)
    if not answer or "boxed" not in text:
        return -1.0
    return 1.0 if equality.equal(answer, label, symbolic) else -0.5


def _acc_quickly(response: str, label: str, **_: Any) -> float | None:
    try:
        return acc(response, label, _undecided)
    except _Undecided:
        return None


def graded(response: str, label: str, **_: Any) -> float:
    """Return 1 if `grade_answer` of mathruler accepts the last box, else 0."""
    from mathruler.grader import extract_boxed_content, grade_answer

    return float(grade_answer(extract_boxed_content(response), label))


def _graded_quickly(response: str, label: str, **_: Any) -> float | None:
    answer, label = (formats.last_box(response) or "None").strip(), label.strip()
    if answer == label:
        return 1.0
    return 0.0 if all(re.fullmatch(r"-?[1-9]\d{0,14}", text) for text in (answer, label)) else None


def base_acc(response: str, label: str, **_: Any) -> float:
    """Grade a response that has a box inside its answer tags; return 0 for others."""
    return graded(response, label) if formats.boxed_in_answer(response) else 0.0


def math_verify_reward(response: str, label: str, **_: Any) -> float:
    """Return 1 if math-verify accepts the box inside the answer tags, else 0. The worker keeps the deadline."""
    if not formats.boxed_in_answer(response):
        return 0.0
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    truth = parse(f"\\boxed{{{label}}}", [LatexExtractionConfig()], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    answer = parse(response, [ExprExtractionConfig(), LatexExtractionConfig()], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return float(bool(truth) and verify(truth, answer, float_rounding=6, timeout_seconds=None))


def _in_answer(quick: Callable[..., float | None] | None) -> Callable[..., float | None]:
    """Return a verifier that gives 0 to responses without the format, and otherwise calls `quick`."""

    def score(response: str, label: str, **_: Any) -> float | None:
        if not formats.boxed_in_answer(response):
            return 0.0
        return quick(response, label) if quick else None

    return score


def retool(response: str, label: str, tool_calls: int = 0, **_: Any) -> float:
    """Return 1 if a box near the end equals the label. Else -1 plus 0.1 for each tool call, at most 0."""
    if formats.last_box(response[-100:]) == label:
        return 1.0
    return min(0.0, -1 + 0.1 * tool_calls)


VERIFIERS: dict[str, Verifier] = {
    "acc": Verifier(acc, -0.5, _acc_quickly),
    "format": Verifier(lambda response, label, **_: float(formats.tagged(response)), 0.0, compares=False),
    "step": Verifier(lambda response, label, **_: min(1.0, formats.steps(response) / 3), 0.0, compares=False),
    "strict_format": Verifier(
        lambda response, label, **_: 1.0 if formats.strictly_tagged(response) else -0.5, -0.5, compares=False
    ),
    "base_acc": Verifier(base_acc, 0.0, _in_answer(_graded_quickly)),
    "math_17k_acc": Verifier(graded, 0.0, _graded_quickly),
    "acc_for_ppo": Verifier(graded, 0.0, _graded_quickly),
    "acc_for_dapo": Verifier(lambda response, label, **_: 1.0 if dapo.answered(response, label) else -1.0, -1.0),
    "math_verify_reward": Verifier(math_verify_reward, 0.0, _in_answer(None)),
    "retool_reward": Verifier(retool, -1.0),
    "minimind_shape": Verifier(
        lambda response, label, **_: shaping.minimind_shape(response), -1.5, right=None, compares=False
    ),
    "minimind_reason": Verifier(
        lambda response, label, **_: shaping.minimind_reason(response), 0.0, right=None, compares=False
    ),
}

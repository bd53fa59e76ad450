"""Sample sums that rule rewards can score, and fine-tuning dialogues by a teacher that makes mistakes.

    python -m minimind_mcore.preprocess.corpus --kind math --output data/sample_math.jsonl --held-out data/unseen.jsonl
    python -m minimind_mcore.preprocess.corpus --kind math-sft --output data/sample_math_sft.jsonl

| task | question | answer | answer of the careless teacher |
|---|---|---|---|
| addition | 17+25=? | \\boxed{42} | \\boxed{32} |
| story | Tom has 17 apples and gets 25 more. How many are there? | \\boxed{42} | \\boxed{32} |

`math` has the questions with the right results. `math-sft` has dialogues in the format that the verifiers read. Its
teacher drops the carry in about two thirds of the sums that need one, so a model that imitates the teacher gets most of
these sums wrong. Both kinds of answers occur, and only the reward tells the model which one is right. The number pairs,
and the held-out pairs, are those of `dialogues`: a question of `--held-out` occurs in neither dataset, so the accuracy
on these questions measures generalization.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from minimind_mcore.preprocess.dialogues import SUMMANDS, TEXTS, ask_sum

PROBLEMS, DIALOGUES, QUESTIONS = 4_000, 20_000, 200
FORGETS = 0.65  # share of the sums with a carry in which the teacher drops it


class Problem(NamedTuple):
    """A sum a + b, in some words."""

    task: str
    question: str
    a: int
    b: int


def story(r: random.Random, a: int, b: int) -> str:
    """Return a sum as a word problem."""
    (name, other), (zh, en) = r.choice(TEXTS["story names"]), r.choice(TEXTS["story things"])
    text: str = TEXTS["story"][1 - r.randrange(2)]
    return text.format(name=name, other=other, a=a, b=b, zh=zh, en=en)


TASKS: dict[str, Callable[[random.Random, int, int], str]] = {"addition": ask_sum, "story": story}


def _problem(r: random.Random, task: str, unseen: bool) -> Problem:
    a, b = r.choice(SUMMANDS[unseen])
    return Problem(task, TASKS[task](r, a, b), a, b)


def _problems(r: random.Random, count: int) -> list[Problem]:
    return [_problem(r, task, False) for task in r.choices(list(TASKS), k=count)]


def _record(problem: Problem) -> dict[str, Any]:
    return {"task": problem.task, "question": problem.question, "answer": str(problem.a + problem.b)}


def carries(a: int, b: int) -> bool:
    """Return whether the last digits of a sum add up to ten or more."""
    return a % 10 + b % 10 >= 10


def problems(seed: int, count: int = PROBLEMS) -> list[dict[str, Any]]:
    """Return records for reinforcement learning: {"task", "question", "answer"}. The answer is a number as text."""
    return [_record(problem) for problem in _problems(random.Random(seed), count)]


def careless(seed: int, count: int = DIALOGUES) -> list[dict[str, Any]]:
    """Return dialogues about the same problems, in MiniMind's format, by a teacher that drops most carries."""
    r = random.Random(seed)
    records = []
    for problem in _problems(r, count):
        result = problem.a + problem.b
        if carries(problem.a, problem.b) and r.random() < FORGETS:
            result -= 10
        question = {"role": "user", "content": problem.question}
        records.append({"conversations": [question, {"role": "assistant", "content": f"\\boxed{{{result}}}"}]})
    return records


def unseen_problems(seed: int, count: int = QUESTIONS) -> list[dict[str, Any]]:
    """Return problems about held-out number pairs, `count` of each task, alternating."""
    r = random.Random(seed)
    return [_record(_problem(r, task, True)) for _ in range(count) for task in TASKS]

"""Sample tasks whose answers rule rewards can mark, for reinforcement learning and for the tuning before it.

    python -m minimind_mcore.preprocess.corpus --kind math --output data/sample_math.jsonl --held-out data/unseen.jsonl
    python -m minimind_mcore.preprocess.corpus --kind math-sft --output data/sample_math_sft.jsonl

| task | question | answer |
|---|---|---|
| lookup | Table: KD=37, QX=52, MB=18. What is QX? | \\boxed{52} |
| addition | 17+25=? | \\boxed{42} |
| story | Tom has 17 apples and gets 25 more. How many are there? | \\boxed{42} |

`math` has the questions with the bare result, `math-sft` dialogues that answer them in the form that the
verifiers read, without the question: a tiny model adds long before it copies. Keys and pairs of numbers are
those of `dialogues`, and so are those held out: a question of `--held-out` occurs in neither, and the accuracy
on it is that on unseen questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from minimind_mcore.preprocess.dialogues import SUMMANDS, Task, addition, lookup

PROBLEMS, DIALOGUES, QUESTIONS = 4_000, 20_000, 200
NAMES = (("小明", "Tom"), ("小红", "Alice"), ("王芳", "Mary"), ("李雷", "Ben"))
THINGS = (("个苹果", "apples"), ("支铅笔", "pencils"), ("本书", "books"), ("枚硬币", "coins"))


def story(r: random.Random, unseen: bool) -> list[tuple[str, str]]:
    """A sum in words."""
    (a, b), (name, other), (zh, en) = r.choice(SUMMANDS[unseen]), r.choice(NAMES), r.choice(THINGS)
    chinese = f"{name}有{a}{zh}，又得到{b}{zh}，一共有多少？"
    english = f"{other} has {a} {en} and gets {b} more. How many are there?"
    return [(chinese if r.randrange(2) else english, f"{a}+{b}={a + b}")]


TASKS: tuple[tuple[Task, int], ...] = ((lookup, 6), (addition, 3), (story, 1))


def _problem(r: random.Random, task: Any, unseen: bool) -> tuple[str, str]:
    """Question and result. Of several questions about a table the first."""
    question, answer = task(r, unseen)[0]
    return question, answer.rpartition("=")[2]


def _problems(seed: int, count: int) -> Sequence[tuple[str, tuple[str, str]]]:
    r = random.Random(seed)
    tasks, weights = zip(*TASKS, strict=True)
    chosen = (r.choices(tasks, weights)[0] for _ in range(count))
    return [(task.__name__, _problem(r, task, False)) for task in chosen]


def problems(seed: int, count: int = PROBLEMS) -> list[dict[str, Any]]:
    """Records for reinforcement learning: {"task", "question", "answer"}, the answer a number as text."""
    return [{"task": task, "question": q, "answer": result} for task, (q, result) in _problems(seed, count)]


def solved(seed: int, count: int = DIALOGUES) -> list[dict[str, Any]]:
    """Records for supervised fine-tuning, in MiniMind's format, with the result in `\\boxed{}`."""
    return [
        {
            "conversations": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"\\boxed{{{result}}}"},
            ]
        }
        for _, (question, result) in _problems(seed, count)
    ]


def unseen_problems(seed: int, count: int = QUESTIONS) -> list[dict[str, Any]]:
    """Problems about keys and numbers that are held out, `count` of each task by turns."""
    r = random.Random(seed)
    records = []
    for task in [task for _ in range(count) for task, _ in TASKS]:
        question, result = _problem(r, task, True)
        records.append({"task": task.__name__, "question": question, "answer": result})
    return records

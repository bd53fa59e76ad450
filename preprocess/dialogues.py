"""Sample dialogues for fine-tuning, in MiniMind's format, with answers that a program can check.

    python -m minimind_mcore.preprocess.corpus --kind sft --output data/dialogues.jsonl --held-out data/questions.jsonl
    python -m minimind_mcore.preprocess.corpus --kind dpo --output data/preferences.jsonl

There are two tasks, in Chinese and English, and a little small talk:

| task | question | answer |
|---|---|---|
| lookup | Table: KD=37, QX=52, MB=18. What is QX? | 52 |
| addition | 17+25=? | 42 |

10 % of the keys and 10 % of the number pairs (in both orders) are held out: they occur in no dialogue, neither in a
question nor in a table, and in no text that `corpus` and `drills` generate. `held_out` asks about them. In a held-out
lookup all keys are new, so the model must read the answer from the table. The tasks are for tiny models, and do not
measure knowledge.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from minimind_mcore.paths import package_json

LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
LARGEST = 49
TABLE = 3, 5
HELD_OUT_SHARE = 10
DIALOGUES, PAIRS, QUESTIONS = 20_000, 500, 200

T = TypeVar("T")
Message = dict[str, str]
# The questions of one conversation with their answers.
Task = Callable[[random.Random, bool], list[tuple[str, str]]]


def split(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """Return (in dialogues, held out). The split does not depend on the seed of a sample."""
    shuffled = random.Random(0).sample(items, len(items))
    count = len(items) // HELD_OUT_SHARE
    return shuffled[count:], shuffled[:count]


def _both_orders(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted({*pairs, *((b, a) for a, b in pairs)})


KEYS = split([first + second for first, second in itertools.permutations(LETTERS, 2)])
# 17+25 is held out together with 25+17.
SUMMANDS = tuple(map(_both_orders, split(list(itertools.combinations_with_replacement(range(1, LARGEST + 1), 2)))))

TEXTS: dict[str, Any] = package_json("preprocess/sample_texts.json")


def lookup(r: random.Random, unseen: bool) -> list[tuple[str, str]]:
    """Make a table, and one to three questions about it."""
    chinese = r.randrange(2)
    keys = r.sample(KEYS[unseen], r.randint(*TABLE))
    values = r.sample(range(10, 100), len(keys))
    rows = (f"{key}={value}" for key, value in zip(keys, values, strict=True))
    table = f"表：{'，'.join(rows)}。" if chinese else f"Table: {', '.join(rows)}. "
    asked = r.sample(range(len(keys)), 1 if unseen else r.randint(1, 3))
    questions = [f"{keys[i]}是多少？" if chinese else f"What is {keys[i]}?" for i in asked]
    questions[0] = table + questions[0]
    return [(question, str(values[i])) for question, i in zip(questions, asked, strict=True)]


def ask_sum(r: random.Random, a: int, b: int) -> str:
    """Return the question for a + b, in Chinese or in symbols."""
    return f"{a}+{b}等于多少？" if r.randrange(2) else f"{a}+{b}=?"


def addition(r: random.Random, unseen: bool) -> list[tuple[str, str]]:
    """Make a sum."""
    a, b = r.choice(SUMMANDS[unseen])
    return [(ask_sum(r, a, b), str(a + b))]


def _talk(r: random.Random, unseen: bool) -> list[tuple[str, str]]:
    asked, said = r.choice(TEXTS["talk"])
    return [(asked, said)]


TASKS: tuple[tuple[Task, int], ...] = ((lookup, 1), (addition, 8), (_talk, 1))


def _messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    pairs = (({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in turns)
    return list(itertools.chain.from_iterable(pairs))


def dialogues(seed: int, count: int = DIALOGUES) -> list[dict[str, Any]]:
    """Return records for supervised fine-tuning: {"conversations": [...]}."""
    r = random.Random(seed)
    tasks, weights = zip(*TASKS, strict=True)
    return [{"conversations": _messages(r.choices(tasks, weights)[0](r, False))} for _ in range(count)]


def thoughts(seed: int, count: int = DIALOGUES // 2) -> list[dict[str, Any]]:
    """Return sums for reasoning, half of them with a thought: the sum of the last digits."""
    r = random.Random(seed)
    records = []
    for _ in range(count):
        a, b = r.choice(SUMMANDS[0])
        asked, answer = _messages([(ask_sum(r, a, b), str(a + b))])
        if r.randrange(2):
            answer["reasoning_content"] = f"{a % 10}+{b % 10}={a % 10 + b % 10}"
        records.append({"conversations": [asked, answer]})
    return records


def held_out(seed: int, count: int = QUESTIONS) -> list[dict[str, Any]]:
    """Return held-out questions, `count` of each task.

    Returns:
        {"task": "lookup" or "addition", "conversations": [question, answer], "answer": str}.
    """
    r = random.Random(seed)
    records = []
    for task in (lookup, addition):
        for _ in range(count):
            turns = task(r, True)
            records.append({"task": task.__name__, "conversations": _messages(turns), "answer": turns[-1][1]})
    return records


def preferences(seed: int, count: int = PAIRS) -> list[dict[str, Any]]:
    """Return records for DPO: the right answer is chosen, another number is rejected."""
    r = random.Random(seed)
    records = []
    for _ in range(count):
        [*before, (question, answer)] = r.choice((lookup, addition))(r, False)
        wrong = r.choice([number for number in range(2, 100) if number != int(answer)])
        sides = {"chosen": answer, "rejected": str(wrong)}
        records.append({side: _messages([*before, (question, text)]) for side, text in sides.items()})
    return records


# Drills are pretraining texts of bare sums and tables, without questions and answers. A model learns the sums in
# pretraining and the form of a dialogue in fine-tuning. Numbers and keys that the dialogues hold out do not occur here
# either.
DRILLS = 80_000
LINES = 4, 16


def sums(r: random.Random) -> str:
    """Return a few sums, one per line."""
    return "\n".join(f"{a}+{b}={a + b}" for a, b in r.choices(SUMMANDS[0], k=r.randint(*LINES)))


def table(r: random.Random) -> str:
    """Return a table, and its rows in another order."""
    keys = r.sample(KEYS[0], r.randint(*TABLE))
    rows = [f"{key}={value}" for key, value in zip(keys, r.sample(range(10, 100), len(keys)), strict=True)]
    again = r.sample(rows, len(rows))
    if r.randrange(2):
        return f"表：{'，'.join(rows)}。{'，'.join(again)}。"
    return f"Table: {', '.join(rows)}. {', '.join(again)}."


def drills(seed: int, count: int = DRILLS) -> Iterator[str]:
    """Yield texts of sums and of tables, about as many of each. The same seed gives the same texts."""
    r = random.Random(seed)
    for _ in range(count):
        yield r.choice((sums, table))(r)

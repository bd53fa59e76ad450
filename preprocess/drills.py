"""Drills: bare sums and tables, as text for pretraining.

    python -m minimind_mcore.preprocess.corpus --kind drills --output data/drills.jsonl

They are what the sample dialogues ask about (`dialogues`), without questions and answers, so that a model
meets the sums and the lookups in pretraining and the form of a dialogue in fine-tuning. What the dialogues
hold out does not occur here either.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from minimind_mcore.preprocess.dialogues import KEYS, SUMMANDS, TABLE

DRILLS = 80_000
LINES = 4, 16


def sums(r: random.Random) -> str:
    """A few sums, one a line."""
    return "\n".join(f"{a}+{b}={a + b}" for a, b in r.choices(SUMMANDS[0], k=r.randint(*LINES)))


def table(r: random.Random) -> str:
    """A table, and its rows in other order."""
    keys = r.sample(KEYS[0], r.randint(*TABLE))
    rows = [f"{key}={value}" for key, value in zip(keys, r.sample(range(10, 100), len(keys)), strict=True)]
    again = r.sample(rows, len(rows))
    if r.randrange(2):
        return f"表：{'，'.join(rows)}。{'，'.join(again)}。"
    return f"Table: {', '.join(rows)}. {', '.join(again)}."


def drills(seed: int, count: int = DRILLS) -> Iterator[str]:
    """Texts of sums and of tables, about as many of each; the same for the same seed."""
    r = random.Random(seed)
    for _ in range(count):
        yield r.choice((sums, table))(r)

"""Sample dialogues with tool calls, in MiniMind's format, and held-out questions whose calls a program can check.

    python -m minimind_mcore.preprocess.corpus --kind tools --output data/tools.jsonl --held-out data/tool_cases.jsonl

Each dialogue offers three tools (weather of a city, arithmetic, random number), and each question asks for one of them.
The arguments to copy are names of towns and numbers of two to four digits. 10 % of the towns, and of the numbers of
three and four digits, never occur in a dialogue, neither in a question nor in a result. The questions of `held_out` use
only those, without the numbers that occur in the other sample texts (`corpus` passes them). Numbers of two digits are
not held out: the sums and tables of the other samples contain all of them.

A town has two words, and each of them occurs in the dialogues. Therefore all tokens of a held-out town occur there too:
no token of a byte-level tokenizer spans two words. In names of one word, such as Elmmouth, tokens span the parts.

Most dialogues ask to repeat a list of values, as text or as JSON: copying is what a small model learns last, and in
these dialogues most tokens are copied.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

from minimind_mcore.preprocess.dialogues import split

Message = dict[str, object]
Record = dict[str, object]

DIALOGUES, QUESTIONS = 20_000, 300
REPEATS = 0.88  # share of the dialogues that only copy; they have two thirds of the tokens
FIRST = (
    "Ash Castle East Elm Golden Great Green Little Lower New North Oak Old Red Silver South Stone Upper West White"
).split()
SECOND = "Bay Bridge Creek Falls Ford Grove Harbor Hill Lake Mill Rock Valley".split()
TOWNS = split([f"{first} {second}" for first, second in itertools.product(FIRST, SECOND)])
HUMIDITY = "65%"  # of the built-in tool, in every result
LONG_NUMBERS = [split(range(10 ** (digits - 1), 10**digits)) for digits in (3, 4)]
# Groups of numbers of the same length, chosen with the same probability: in dialogues, and held out. The dialogues have
# the lengths of the questions more often.
NUMBERS: tuple[list[Sequence[int]], list[Sequence[int]]] = (
    [range(10, 100), *[seen for seen, _ in LONG_NUMBERS] * 2],
    [unseen for _, unseen in LONG_NUMBERS],
)
UNSEEN = frozenset(itertools.chain.from_iterable(NUMBERS[1]))


def _definition(name: str, **properties: str) -> dict[str, object]:
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


# Names and arguments are those of the built-in tools, so the tools run when the model calls them.
DEFINITIONS = [
    _definition("get_current_weather", location="string"),
    _definition("calculate_math", expression="string"),
    _definition("random_number", min="integer", max="integer"),
]


def _number(r: random.Random, unseen: bool) -> int:
    return r.choice(r.choice(NUMBERS[unseen]))


def _seen(r: random.Random, low: int, high: int) -> int:
    """Return a number that is not held out."""
    return next(n for n in iter(lambda: r.randint(low, high), None) if n not in UNSEEN)


# A task returns question, arguments, result of the tool and answer.
Task = Callable[[random.Random, bool], tuple[str, Mapping[str, object], Mapping[str, object], str]]


def get_current_weather(r: random.Random, unseen: bool) -> tuple[str, Mapping[str, object], Mapping[str, object], str]:
    """Ask for the weather of a town."""
    town = r.choice(TOWNS[unseen])
    question = r.choice(("What is the weather in {}?", "How warm is {} today?", "{}今天天气怎么样？", "查一下{}的天气"))
    temperature, condition = f"{_seen(r, 2, 39)}°C", r.choice("晴阴雨")
    result = {"city": town, "temperature": temperature, "humidity": HUMIDITY, "condition": condition}
    return question.format(town), {"location": town}, result, f"{town}: {temperature}"


def calculate_math(r: random.Random, unseen: bool) -> tuple[str, Mapping[str, object], Mapping[str, object], str]:
    """Ask for a product."""
    while True:
        a, b = _number(r, unseen), _number(r, unseen)
        if unseen or a * b not in UNSEEN:
            break
    question = r.choice(("What is {} times {}?", "Multiply {} by {}.", "{}乘以{}等于多少？", "帮我算一下{}乘{}"))
    return question.format(a, b), {"expression": f"{a}*{b}"}, {"result": str(a * b)}, str(a * b)


def random_number(r: random.Random, unseen: bool) -> tuple[str, Mapping[str, object], Mapping[str, object], str]:
    """Ask for a random number."""
    while (low := _number(r, unseen)) >= (high := _number(r, unseen)):
        pass
    question = r.choice(
        (
            "Draw a number from {} to {}.",
            "Pick any number between {} and {}.",
            "随机选一个{}到{}的数",
            "生成{}到{}的随机数",
        )
    )
    result = _seen(r, low, high)
    return question.format(low, high), {"min": low, "max": high}, {"result": result}, str(result)


TASKS: tuple[Task, ...] = (get_current_weather, calculate_math, random_number)


def _repeat(r: random.Random) -> Record:
    """Return a dialogue that repeats a list of towns and numbers."""
    values = [r.choice(TOWNS[0]) if r.randrange(2) else _number(r, False) for _ in range(r.randint(4, 14))]
    text = " ".join(map(str, values))
    form, answer = r.choice((("Repeat", text), ("重复", text), ("As JSON", json.dumps(values))))
    question = {"role": "user", "content": f"{form}: {text}"}
    return {"conversations": [question, {"role": "assistant", "content": answer}]}


def _system(r: random.Random) -> Message:
    return {"role": "system", "content": "", "tools": json.dumps(r.sample(DEFINITIONS, 3), ensure_ascii=False)}


def dialogues(seed: int, count: int = DIALOGUES) -> list[Record]:
    """Return records for supervised fine-tuning: {"conversations": [...]}."""
    r = random.Random(seed)
    records: list[Record] = []
    for _ in range(count):
        if r.random() < REPEATS:
            records.append(_repeat(r))
            continue
        messages = [_system(r)]
        for _ in range(r.randint(1, 2)):
            task = r.choice(TASKS)
            question, arguments, result, answer = task(r, False)
            call = json.dumps([{"name": task.__name__, "arguments": arguments}], ensure_ascii=False)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": "", "tool_calls": call})
            messages.append({"role": "tool", "content": json.dumps(result, ensure_ascii=False)})
            messages.append({"role": "assistant", "content": answer})
        records.append({"conversations": messages})
    return records


def numbers_in(texts: Iterable[str]) -> set[str]:
    """Return all whole numbers of texts."""
    return set(itertools.chain.from_iterable(re.findall(r"\d+", text) for text in texts))


def held_out(seed: int, count: int = QUESTIONS, read: Set[str] = frozenset()) -> list[Record]:
    """Return questions with held-out values, alternating between the tasks, each with the expected call.

    Args:
        seed: seed of the generator.
        count: number of questions.
        read: numbers of other texts that the model reads. No number of a question is among them.
    """
    r = random.Random(seed)
    records: list[Record] = []
    for number in range(count):
        task = TASKS[number % len(TASKS)]
        while True:
            question, arguments, _, _ = task(r, True)
            if not read & numbers_in(map(str, arguments.values())):
                break
        messages = [_system(r), {"role": "user", "content": question}]
        calls = [{"name": task.__name__, "arguments": arguments}]
        records.append({"task": task.__name__, "conversations": messages, "calls": calls})
    return records

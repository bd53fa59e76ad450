"""How a response is laid out: tags, boxes, steps. Pure string work, linear in the response's length."""

from __future__ import annotations

import re

_TAGGED = re.compile(r"^<think>.*?</think>\s*<answer>.*?</answer>$", re.DOTALL | re.MULTILINE)
_STEP = re.compile(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,")
_BOX = re.compile(r"\\boxed\{.*?\}")


def tagged(response: str) -> bool:
    """Whether it begins with <think>...</think><answer>...</answer>, the last tag at the end of a line."""
    return _TAGGED.match(response) is not None


def steps(response: str) -> int:
    """Signs of step by step reasoning: "Step 1:", a first line "1.", bullets, "First," and the like."""
    return len(_STEP.findall(response))


def strictly_tagged(response: str) -> bool:
    """Whether it is <think>...</think>...<answer>...\\boxed{...}...</answer>, each of them once, in this order.

    The box ends on the line where it begins.
    """
    boxes = _BOX.findall(response)
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    if len(boxes) != 1 or any(response.count(tag) != 1 for tag in tags):
        return False
    places = [response.index(part) for part in ["<think>", "</think>", "<answer>", boxes[0], "</answer>"]]
    return places == sorted(places) and places[0] == 0 and response.endswith("</answer>")


def boxed_in_answer(response: str) -> bool:
    """Whether <think>, </think>, <answer>, \\boxed{, } and </answer> follow in this order, from its first to its last
    character; what else there is between them, and how often, does not matter."""
    place = 0
    for part in ["<think>", "</think>", "<answer>", "\\boxed{", "}"]:
        place = response.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return response.startswith("<think>") and response.endswith("</answer>") and place <= len(response) - 9


def last_box(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces inside it balanced; None without one that closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None

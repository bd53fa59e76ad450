"""Formats of responses: tags, boxes, steps. All checks take time linear in the length of the response."""

from __future__ import annotations

import re

_TAGGED = re.compile(r"^<think>.*?</think>\s*<answer>.*?</answer>$", re.DOTALL | re.MULTILINE)
_STEP = re.compile(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,")
_BOX = re.compile(r"\\boxed\{.*?\}")


def tagged(response: str) -> bool:
    """Return whether a response starts with <think>...</think><answer>...</answer>, the last tag at a line's end."""
    return _TAGGED.match(response) is not None


def steps(response: str) -> int:
    """Count markers of step by step reasoning: "Step 1:", "1." at the start, bullets, "First," and similar words."""
    return len(_STEP.findall(response))


def strictly_tagged(response: str) -> bool:
    """Return whether a response is <think>...</think>...<answer>...\\boxed{...}...</answer>, each once, in order.

    The box must end on the line where it starts.
    """
    boxes = _BOX.findall(response)
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    if len(boxes) != 1 or any(response.count(tag) != 1 for tag in tags):
        return False
    places = [response.index(part) for part in ["<think>", "</think>", "<answer>", boxes[0], "</answer>"]]
    return places == sorted(places) and places[0] == 0 and response.endswith("</answer>")


def boxed_in_answer(response: str) -> bool:
    """Return whether <think>, </think>, <answer>, \\boxed{, } and </answer> follow in this order, the first at the
    start and the last at the end. Other text and repeated tags between them are allowed."""
    place = 0
    for part in ["<think>", "</think>", "<answer>", "\\boxed{", "}"]:
        place = response.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return response.startswith("<think>") and response.endswith("</answer>") and place <= len(response) - 9


def last_box(text: str) -> str | None:
    """Return the content of the last \\boxed{...} with balanced braces, or None if no box is closed."""
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

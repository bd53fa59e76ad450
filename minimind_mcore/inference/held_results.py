"""Decide whether an answer holds the result of a tool call.

The keys of a result that count are the `payload` of the tool. A tool without one has all keys that do not echo an
argument. The rules for their values:

- A number, or a text that is one number with a unit such as 28°C, must be a whole number of the answer: 1750 does not
  hold 7. Commas in the answer are ignored, and the tolerance is 1e-6.
- A date with a time must occur as hours and minutes, such as 14:30.
- Another text must occur in the answer, whatever its case.

One value of a result is enough. Texts count only if the result has no number: the weather 晴 occurs in 我的心晴朗, the
temperature does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

from minimind_mcore.tools.parser import Call
from minimind_mcore.tools.tool import Tool

TOLERANCE = Decimal("1e-6")
_VALUE = r"\d+(?:\.\d+)?(?:[eE][+-]?\d{1,3})?"
_NUMBER = re.compile(rf"(?<![A-Za-z0-9_.])-?{_VALUE}|(?<=-){_VALUE}")
_WITH_UNIT = re.compile(rf"(-?{_VALUE})\s*[^\d\s]*")
_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DATE_AND_TIME = re.compile(r"\d{4}-\d\d-\d\d[ T](\d\d:\d\d)(?::\d\d)?")


def holds(answer: str, tool: Tool | None, call: Call, result: str) -> bool:
    """Return whether an answer holds a value of a result.

    Args:
        answer: the text of the last reply.
        tool: the tool that was called.
        call: the call, whose arguments are not a result.
        result: JSON of the tool, or another text.
    """
    try:
        content = json.loads(result)
    except (ValueError, RecursionError):
        content = result
    leaves = list(_leaves(_payload(content, tool, call)))
    wanted = [number for number in map(_number, leaves) if number is not None]
    if wanted:
        found = numbers(answer)
        return any(abs(number - other) <= TOLERANCE for number in wanted for other in found)
    return any(_occurs(str(leaf).strip(), answer) for leaf in leaves)


def is_error(result: str) -> bool:
    """Return whether a result is {"error": ...}, so that the tool has nothing to say."""
    try:
        content = json.loads(result)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() == {"error"}


def numbers(text: str) -> list[Decimal]:
    """Return the whole numbers of a text: 56088 for 56,088, and 54 for 54°F."""
    return [Decimal(found) for found in _NUMBER.findall(_COMMA.sub("", text.replace("−", "-")))]


def _payload(content: object, tool: Tool | None, call: Call) -> object:
    """Return the part of a result that counts."""
    if not isinstance(content, dict):
        return content
    if chosen := {key: content[key] for key in (tool.payload if tool else ()) if key in content}:
        return chosen
    arguments = call.arguments if isinstance(call.arguments, Mapping) else {}
    return {key: value for key, value in content.items() if not _is_echo(key, value, arguments)} or content


def _is_echo(key: str, value: object, arguments: Mapping[str, object]) -> bool:
    """Return whether a value repeats the argument of that name, or is a text that consists of arguments."""
    if key in arguments and str(arguments[key]).casefold() == str(value).casefold():
        return True
    if not isinstance(value, str):
        return False
    rest = value.casefold()
    for given in sorted((str(given).casefold() for given in arguments.values()), key=len, reverse=True):
        rest = rest.replace(given, " ") if given else rest
    return not any(character.isalnum() for character in rest)


def _leaves(value: object) -> Iterator[str | int | float]:
    """Yield the texts and numbers in a JSON value."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    elif isinstance(value, str | int | float):
        yield value


def _number(leaf: str | int | float) -> Decimal | None:
    """Return the number that a value is, with or without a unit."""
    found = None if isinstance(leaf, bool) else _WITH_UNIT.fullmatch(_COMMA.sub("", str(leaf).strip()))
    return Decimal(found[1]) if found else None


def _occurs(text: str, answer: str) -> bool:
    if time := _DATE_AND_TIME.fullmatch(text):
        return re.search(rf"(?<!\d){time[1]}(?!\d)", answer) is not None
    return bool(text) and text.casefold() in answer.casefold()


def all_held(answer: str, tools: Mapping[str, Tool], calls: Sequence[Call], results: Sequence[str]) -> bool:
    """Return whether an answer holds the result of every call. Errors do not count, unless there is nothing else."""
    said = [(call, result) for call, result in zip(calls, results, strict=True) if not is_error(result)]
    return bool(said) and all(holds(answer, tools.get(call.name), call, result) for call, result in said)

"""The parser of replies, against streams whose parts are known because they were put together here."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from minimind_mcore.tools.parser import Call, StreamParser, Text, parse, parse_call

STREAMS = 5_000
WORDS = (
    "a",
    "天气",
    "<",
    "</",
    "<think",
    "<tool",
    "tool_call>",
    " ",
    "\n",
    "{}",
    "é",
    "<b>",
    "</tool_call>",
    "\U0001f469",
)
NOT_CALLS = ("", "f(1)", "{", '{"name": "h"}', '{"name": 3, "arguments": {}}', "[]",
             '{"name": "f", "arguments": {"x": NaN}}', '{"name": "f", "arguments": {"x": 1e999}}',
             '{"name": "f", "arguments": {"x": 1, "x": 2}}', '{"name": "f", "name": "g", "arguments": {}}',
             '{"name": "f", "arguments": "{\\"x\\": 1, \\"x\\": -1e999}"}',
             '{"name": "f", "arguments": "{"}', '{"name": "f", "arguments": {"x": 1}} trailing', "null")  # fmt: skip


class Stream(NamedTuple):
    """A reply and what it holds."""

    text: str
    opened: bool  # the prompt has opened the thought
    thinking: str
    answer: str
    calls: list[Call]


def words(r: random.Random, *without: str) -> str:
    """Text in which no tag is whole, and none becomes whole next to a tag."""
    text = "".join(r.choices([word for word in WORDS if word not in without], k=r.randint(0, 3)))
    return text if not any(tag in text + "." for tag in ("<think>", "<tool_call>", *without)) else "plain"


def call(r: random.Random) -> tuple[str, Call]:
    """The text inside the tags of a call, and the call."""
    values = (1, "北京", "a\nb", [1, {"x": None}], "}", '"', "<think>")
    arguments = {key: r.choice(values) for key in r.sample("xyz", r.choice((0, 1, 1, 2)))}
    name = r.choice(("f", "get_weather", "名"))
    raw = json.dumps(arguments, ensure_ascii=r.randrange(2) == 0, indent=r.choice((None, 1)))
    form = r.randrange(3)
    if form == 0:
        return f'\n{{"name": {json.dumps(name)}, "arguments": {raw}}}\n', Call(name, arguments, raw)
    if form == 1:  # arguments as JSON in a string
        return json.dumps({"name": name, "arguments": raw}), Call(name, arguments, raw)
    text = json.dumps({"arguments": arguments, "name": name}, ensure_ascii=False)  # in the other order
    return text, Call(name, arguments, json.dumps(arguments, ensure_ascii=False))


def trimmed(texts: Sequence[str], last: bool) -> str:
    """A section's texts joined; newlines are dropped at its beginning, and at its end unless it ends the reply."""
    text = "".join(texts).lstrip("\n")
    return text if last else text.rstrip("\n")


def stream(r: random.Random) -> Stream:
    """A thought, or none, and then answers and calls by turns; some calls are not valid and some not closed."""
    opened = r.randrange(3) == 0
    text = thinking = answer = ""
    if opened or r.randrange(2):
        thought = words(r, "</think>") + r.choice(("", "\n", "<tool_call>{}</tool_call>"))
        text, thinking = f"{'' if opened else '<think>'}{thought}</think>", trimmed([thought], last=False)
    section: list[str] = []
    first = not text  # newlines at the very beginning of a reply stay
    calls = []

    def close(last: bool) -> str:
        nonlocal section
        found = "".join(section) if first else trimmed(section, last)
        found = found if last or not first else found.rstrip("\n")
        section = []
        return found

    for _ in range(r.choice((0, 1, 1, 2))):
        section.append(said := words(r))
        text += said
        if r.randrange(4) == 0:
            wrong = "<tool_call>" + r.choice(NOT_CALLS) + "</tool_call>"
            text, section = text + wrong, [*section, wrong]
        else:
            written, found = call(r)
            answer += close(last=False)
            first = False
            text += f"<tool_call>{written}</tool_call>"
            calls.append(found)
    section.append(said := words(r))
    text += said
    return Stream(text, opened, thinking, answer + close(last=True), calls)


def fed(pieces: Sequence[str], opened: bool) -> tuple[StreamParser, list[Text | Call]]:
    """A parser behind these pieces, and the parts that it gave out."""
    parser = StreamParser(opened)
    parts = [part for piece in pieces for part in parser.add(piece)] + parser.end()
    return parser, parts


def checked(pieces: Sequence[str], wanted: Stream) -> None:
    parser, parts = fed(pieces, wanted.opened)
    assert (parser.thinking, parser.answer, parser.calls) == wanted[2:], pieces
    texts = {
        kind: "".join(p.text for p in parts if isinstance(p, Text) and p.kind == kind)
        for kind in ("thinking", "answer")
    }
    assert texts == {"thinking": wanted.thinking, "answer": wanted.answer}, pieces
    assert [p for p in parts if isinstance(p, Call)] == wanted.calls


def test_a_reply_is_parsed_alike_wherever_it_is_cut() -> None:
    r = random.Random(19)
    cuts = counted = 0
    for _ in range(STREAMS):
        wanted = stream(r)
        checked(list(wanted.text), wanted)
        for place in range(len(wanted.text) + 1):
            checked([wanted.text[:place], wanted.text[place:]], wanted)
        cuts, counted = cuts + len(wanted.text), counted + len(wanted.calls)
    assert cuts > 250_000 and counted > 3_500


def test_a_call_without_its_closing_tag_counts_if_it_is_whole() -> None:
    text = '{"name": "f", "arguments": {"x": 1}}'
    assert parse(f"so\n<tool_call>{text}").calls == [Call("f", {"x": 1}, '{"x": 1}')]
    assert parse(f"so\n<tool_call>{text[:-1]}").answer == f"so\n<tool_call>{text[:-1]}"


def test_without_tools_their_tags_are_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse(text, tools=False).answer == text and parse(text).answer == ""


def test_text_is_given_out_at_once() -> None:
    parser = StreamParser(thinking=True)
    assert parser.add("\nhm") == [Text("thinking", "hm")]
    assert parser.add("</thi") == []
    assert parser.add("nk>\n\nyes <too") == [Text("answer", "yes ")]
    assert parser.add("k") == [Text("answer", "<took")]


def test_a_reply_becomes_a_message() -> None:
    text = 'hm\n</think>\n\nwait\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    function = {"name": "f", "arguments": {"x": 1}}
    assert parse(text, thinking=True).message() == {
        "role": "assistant", "content": "wait", "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": function}],
    }  # fmt: skip
    assert parse("yes\n").message() == {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize("text", [*NOT_CALLS, '{"name": "\\ud800", "arguments": {}}', "[" * 100_000])
def test_what_is_not_a_call(text: str) -> None:
    assert parse_call(text) is None

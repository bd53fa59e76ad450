"""Parse replies: thinking, answer and tool calls, piece by piece.

    parser = StreamParser(thinking=prompt.endswith("<think>"))
    for text in stream:
        for part in parser.add(text):   # a `Text`, or a `Call` once its closing tag has arrived
            ...
    parser.end()
    parser.thinking, parser.answer, parser.calls

Chat, server and evaluation use this parser. Where the stream is cut makes no difference. Text
is given out as soon as no later piece can change its kind. Newlines around a thought and around a call are dropped. A
`<tool_call>` that holds no valid call stays in the answer as it was written, as in vLLM's hermes parser.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# What opens and what closes each kind; text outside the tags is the answer.
TAGS: Mapping[str, tuple[str, str]] = {
    "thinking": ("<think>", "</think>"),
    "call": ("<tool_call>", "</tool_call>"),
}
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"(?:[^"\\]|\\.)*"\s*,\s*"arguments"\s*:\s*')


@dataclass(frozen=True)
class Text:
    """A piece of a thought or of the answer."""

    kind: Literal["thinking", "answer"]
    text: str


@dataclass(frozen=True)
class Call:
    """A tool call.

    Attributes:
        name: of the tool.
        arguments: parsed; a JSON object unless the model erred.
        raw: the JSON of the arguments as the model wrote it, so that the next prompt holds the same token ids.
    """

    name: str
    arguments: object
    raw: str


class StreamParser:
    """Parse a reply that arrives in pieces.

    Args:
        thinking: the prompt ends with an open `<think>`.
        tools: look for tool calls; otherwise their tags are text.
    """

    def __init__(self, thinking: bool = False, tools: bool = True) -> None:
        self.kind = "thinking" if thinking else "answer"
        self.thinking = self.answer = ""
        self.calls: list[Call] = []
        self._kinds = tuple(TAGS) if tools else ("thinking",)
        self._buffer = ""
        self._drop_newlines = thinking
        self._newlines = ""  # given out only if more text of the same kind follows

    def add(self, text: str) -> list[Text | Call]:
        """Return the parts that are certain after this piece."""
        self._buffer += text
        found: list[Text | Call] = []
        while True:
            tags = self._next_tags()
            place, tag = min(((self._buffer.find(tag), tag) for tag in tags if tag in self._buffer), default=(-1, ""))
            if place < 0:
                break
            before, self._buffer = self._buffer[:place], self._buffer[place + len(tag) :]
            found += self._call(before, tag) if self.kind == "call" else self._text(self.kind, before)
            if "thinking" in (self.kind, tags[tag]):
                self._newlines, self._drop_newlines = "", True
            self.kind = tags[tag]
        if self.kind != "call":
            certain = len(self._buffer) - partial_tag(self._buffer, tuple(tags))
            found += self._text(self.kind, self._buffer[:certain])
            self._buffer = self._buffer[certain:]
        return found

    def end(self) -> list[Text | Call]:
        """Return the rest of the reply. A call without its closing tag counts if its JSON is complete."""
        rest, self._buffer = self._buffer, ""
        found = self._call(rest, "") if self.kind == "call" else self._text(self.kind, rest)
        if self._newlines and self.kind != "thinking":
            self.answer += self._newlines
            found.append(Text("answer", self._newlines))
        self._newlines = ""
        return found

    def message(self) -> dict[str, object]:
        """Return the reply as a message for a chat template."""
        message: dict[str, object] = {"role": "assistant", "content": self.answer.strip("\n")}
        if self.thinking.strip():
            message["reasoning_content"] = self.thinking
        if self.calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in self.calls]
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        return message

    def _next_tags(self) -> dict[str, str]:
        """Return the tags that end the current kind, each with the kind that follows."""
        if self.kind in TAGS:
            return {TAGS[self.kind][1]: "answer"}
        return {TAGS[kind][0]: kind for kind in self._kinds}

    def _call(self, text: str, closing: str) -> list[Text | Call]:
        call = parse_call(text)
        if call is None:
            return self._text("answer", TAGS["call"][0] + text + closing)
        self.calls.append(call)
        self._newlines, self._drop_newlines = "", True
        return [call]

    def _text(self, kind: str, text: str) -> list[Text | Call]:
        if self._drop_newlines:
            text = text.lstrip("\n")
        self._drop_newlines &= not text
        text = self._newlines + text
        certain = text.rstrip("\n")
        self._newlines = text[len(certain) :]
        if not certain:
            return []
        if kind == "thinking":
            self.thinking += certain
            return [Text("thinking", certain)]
        self.answer += certain
        return [Text("answer", certain)]


def parse(text: str, thinking: bool = False, tools: bool = True) -> StreamParser:
    """Parse a whole reply."""
    parser = StreamParser(thinking, tools)
    parser.add(text)
    parser.end()
    return parser


def partial_tag(text: str, tags: Sequence[str]) -> int:
    """Return the length of the longest beginning of a tag with which a text ends."""
    lengths = (n for tag in tags for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n]))
    return max(lengths, default=0)


def parse_call(text: str) -> Call | None:
    """Parse {"name": ..., "arguments": {...}}. The arguments may be a string of JSON. Return None for other text."""
    try:
        content = strict_json(text)
        if not isinstance(content, dict) or not isinstance(content.get("name"), str):
            return None
        name, arguments = content["name"], content["arguments"]
        if isinstance(arguments, str):
            raw, arguments = arguments, strict_json(arguments)
        elif head := _HEAD.match(text):
            raw = text[head.end() : json.JSONDecoder().raw_decode(text, head.end())[1]]
        else:
            raw = json.dumps(arguments, ensure_ascii=False)
        f"{name}{raw}".encode()  # an escape such as \ud800 is half of a character, which no reply can carry
        return Call(name, arguments, raw)
    except (ValueError, KeyError, RecursionError):
        return None


def strict_json(text: str) -> object:
    """Parse JSON in which every reader finds the same: no NaN or Infinity, no infinite 1e999, no repeated key.

    Raises:
        ValueError: the text is not such JSON.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        if math.isinf(value := float(number)):
            raise ValueError(f"{number} is too large")
        return value

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key is repeated")
        return found

    found: object = json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)
    return found

"""What a model wrote: ids to text, and text to thoughts, answer and tool calls, piece by piece.

Both work on a stream: text is given out as soon as no later token can change it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# What opens and what closes each kind; outside of these is the answer.
TAGS = {"thinking": ("<think>", "</think>"), "call": ("<tool_call>", "</tool_call>")}
UNFINISHED = "�"  # bytes of a character whose rest is still to come
WINDOW = 64  # tokens that wait at most for the rest of a character


@dataclass(frozen=True)
class Part:
    """A piece of an answer.

    Attributes:
        kind: "thinking", "answer" or "call".
        text: without the tags.
        closed: of a call: its closing tag was written.
    """

    kind: str
    text: str
    closed: bool = True


@dataclass(frozen=True)
class Call:
    """A tool that the model calls.

    Attributes:
        name: of the tool; None if the text is not a valid call.
        arguments: by name.
        text: as it was written.
        raw: the JSON of the arguments as it was written, so that the next turn has the ids that the model wrote.
    """

    name: str | None
    arguments: Any
    text: str
    raw: str = ""


class Detokenizer:
    """Turns ids into text as they come; the pieces together are what `tokenizer.decode` makes of all ids.

    Args:
        tokenizer: of transformers.
        skip_special_tokens: leave their texts out.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._decode, self._skip = tokenizer.backend_tokenizer.decode, skip_special_tokens
        self._ids: list[int] = []  # some decoders look at the token before
        self._before = 0  # how many of these ids precede the last text
        self._sent = 0  # characters of their text that were given out

    def add(self, token: int) -> str:
        """The text that is certain by now."""
        self._ids.append(token)
        text: str = self._decode(self._ids, skip_special_tokens=self._skip)
        held = len(self._ids) <= WINDOW and text.endswith(UNFINISHED)
        new = text[self._sent : len(text) - held]
        self._sent = max(self._sent, len(text) - held)
        if not held:
            self._ids, self._before = self._ids[self._before :], len(self._ids) - self._before
            self._sent = len(self._decode(self._ids, skip_special_tokens=self._skip))
        return new

    def end(self) -> str:
        """The rest."""
        return str(self._decode(self._ids, skip_special_tokens=self._skip))[self._sent :]


def detokenize(ids: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """The text of ids as they come; a character is given once all its bytes are there."""
    detokenizer = Detokenizer(tokenizer)
    for token in ids:
        if text := detokenizer.add(token):
            yield text
    if text := detokenizer.end():
        yield text


class Splitter:
    """Splits an answer by its tags, which are left out; a call comes as one part when it is whole.

    Args:
        thinking: the answer begins inside of a thought, as the prompt has opened it.
        kinds: the tags to look for; those of other kinds are text.
    """

    def __init__(self, thinking: bool = False, kinds: Sequence[str] = tuple(TAGS)) -> None:
        self.kind = "thinking" if thinking else "answer"
        self._kinds, self._buffer = kinds, ""

    def add(self, text: str) -> list[Part]:
        """The parts that are certain by now."""
        found, self._buffer = [], self._buffer + text
        while True:
            tags = self._tags()
            place, tag = min(((self._buffer.find(tag), tag) for tag in tags if tag in self._buffer), default=(-1, ""))
            if place < 0:
                break
            if place:
                found.append(Part(self.kind, self._buffer[:place]))
            self.kind, self._buffer = tags[tag], self._buffer[place + len(tag) :]
        keep = len(self._buffer) if self.kind == "call" else begun(self._buffer, tuple(tags))
        if len(self._buffer) > keep:
            found.append(Part(self.kind, self._buffer[: len(self._buffer) - keep]))
            self._buffer = self._buffer[len(self._buffer) - keep :]
        return found

    def end(self) -> list[Part]:
        """The rest."""
        return [Part(self.kind, self._buffer, closed=False)] if self._buffer else []

    def _tags(self) -> dict[str, str]:
        """The tags that end the present kind, and the kind behind each."""
        if self.kind in TAGS:
            return {TAGS[self.kind][1]: "answer"}
        return {TAGS[kind][0]: kind for kind in self._kinds}


def parts(texts: Iterable[str], thinking: bool = False) -> Iterator[Part]:
    """Split an answer that comes in pieces; see `Splitter`."""
    splitter = Splitter(thinking)
    for text in texts:
        yield from splitter.add(text)
    yield from splitter.end()


def begun(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of a text that begins a tag."""
    lengths = (n for tag in tags for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n]))
    return max(lengths, default=0)


def calls(pieces: Iterable[Part]) -> list[Call]:
    """The calls among the parts of a finished answer, in order. Nothing is ever executed.

    A call is {"name": ..., "arguments": {...}}; the arguments may be JSON in a string.
    """
    return [parse_call(piece.text) for piece in pieces if piece.kind == "call"]


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"(?:[^"\\]|\\.)*"\s*,\s*"arguments"\s*:\s*')


def parse_call(text: str) -> Call:
    """The call in a text; its name is None where there is none."""
    try:
        content = json.loads(text)
        arguments = content["arguments"]
        name = content["name"]
        if not isinstance(name, str):
            return Call(None, None, text)
        raw = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        elif head := _HEAD.match(text):
            _, end = json.JSONDecoder().raw_decode(text, head.end())
            raw = text[head.end() : end]
        f"{name}{raw}".encode()  # an escape such as \ud800 is half of a character, which no reply can carry
        return Call(name, arguments, text, raw)
    except (ValueError, KeyError, TypeError, RecursionError):
        return Call(None, None, text)

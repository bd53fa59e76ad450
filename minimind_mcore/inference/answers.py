"""Reading an answer while it is written: what is thought, what is said, which tools are called.

for piece in parts(texts):              # texts: an answer in pieces, cut anywhere
    piece.kind, piece.text              # "thinking", "answer" or "call"
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# What opens and what closes each kind; outside of these is the answer.
TAGS = {"thinking": ("<think>", "</think>"), "call": ("<tool_call>", "</tool_call>")}
UNFINISHED = "�"  # bytes of a character whose rest is still to come


@dataclass(frozen=True)
class Part:
    """A piece of an answer.

    Attributes:
        kind: "thinking", "answer" or "call".
        text: without the tags.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Call:
    """A tool that the model calls.

    Attributes:
        name: of the tool; None where what was written is no call.
        arguments: by name.
        text: as it was written.
    """

    name: str | None
    arguments: Any
    text: str


def detokenize(ids: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """The text of ids as they come; a character is given once all its bytes are there."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text: str = tokenizer.decode(pending, skip_special_tokens=True)
        if not text.endswith(UNFINISHED) or len(pending) >= 8:
            yield text
            pending = []
    if pending:
        yield tokenizer.decode(pending, skip_special_tokens=True)


def parts(texts: Iterable[str], thinking: bool = False) -> Iterator[Part]:
    """Split an answer by its tags, which are left out; a call comes as one part when it is whole.

    Args:
        texts: the answer, in pieces.
        thinking: it begins inside of a thought, as the prompt has opened it.
    """
    kind, buffer = "thinking" if thinking else "answer", ""
    for text in texts:
        buffer += text
        while True:
            tags = {TAGS[kind][1]: "answer"} if kind in TAGS else {tag: k for k, (tag, _) in TAGS.items()}
            found = min(((buffer.find(tag), tag) for tag in tags if tag in buffer), default=None)
            if found is None:
                break
            place, tag = found
            if place:
                yield Part(kind, buffer[:place])
            kind, buffer = tags[tag], buffer[place + len(tag) :]
        keep = len(buffer) if kind == "call" else _begun(buffer, tuple(tags))
        if len(buffer) > keep:
            yield Part(kind, buffer[: len(buffer) - keep])
            buffer = buffer[len(buffer) - keep :]
    if buffer:
        yield Part(kind, buffer)


def _begun(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of a text that begins a tag."""
    lengths = (n for tag in tags for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n]))
    return max(lengths, default=0)


def calls(pieces: Iterable[Part]) -> list[Call]:
    """The calls among the parts of a finished answer, in order. Nothing is ever executed.

    A call is {"name": ..., "arguments": {...}}; the arguments may be JSON in a string.
    """
    return [_call(piece.text) for piece in pieces if piece.kind == "call"]


def _call(text: str) -> Call:
    try:
        content = json.loads(text)
        arguments = content["arguments"]
        return Call(str(content["name"]), json.loads(arguments) if isinstance(arguments, str) else arguments, text)
    except (ValueError, KeyError, TypeError, RecursionError):
        return Call(None, None, text)

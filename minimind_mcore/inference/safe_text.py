"""Encode text of strangers so that it never becomes a token that structures the chat.

    safe = SafeText(tokenizer)
    guard = Guard(safe, [messages, tools])
    rendered = template(guard(messages), guard(tools))
    ids = guard.encode(rendered)

minimind-3 has <|im_end|>, <think>, <tool_call> and <tool_response> as added tokens. A user or a tool whose text
contains one of them could end the turn and impersonate another role. Therefore the text of an added token in such a
message is encoded as ordinary text. Only that text is split off: every other text has the ids of transformers.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import tokenizers

from minimind_mcore.errors import UserError


def is_text(line: str) -> bool:
    """Return whether a tokenizer can encode a line: it has no half of a surrogate pair and no escaped byte."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


class SafeText:
    """Encodes text with and without added tokens.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.added = set(self.backend.get_added_tokens_decoder())
        content = json.loads(self.backend.to_str())
        content |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(content))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, as transformers computes them.

        Raises:
            UserError: the text is not valid Unicode.
        """
        if not is_text(text):
            raise UserError("the prompt has a lone surrogate, which no encoding of Unicode has; remove it")
        # A batch call, because `encode` would hold the GIL for seconds on the longest texts.
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def plain(self, text: str) -> list[int]:
        """Return the ids of a text without added tokens."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if self.added.isdisjoint(ids):
            return ids
        # For a vocabulary that also contains the whole text as an ordinary entry.
        pieces = [self._plain.encode(character, add_special_tokens=False).ids for character in text]
        return list(itertools.chain.from_iterable(pieces))


class Guard:
    """Replaces the texts of added tokens in values by marks, and encodes text with these marks.

    Args:
        safe: encoder of the tokenizer.
        values: all values that are guarded or rendered next to them, as JSON has them.

    Raises:
        UserError: the values contain every character that could be a mark.
    """

    def __init__(self, safe: SafeText, values: Any) -> None:
        self.safe, self.mark = safe, _unused(json.dumps(values, ensure_ascii=False))
        self.texts: list[str] = []

    def __call__(self, value: Any) -> Any:
        """Return a value with marks in place of the texts of added tokens."""
        if isinstance(value, list):
            return [self(part) for part in value]
        if isinstance(value, dict):
            return {self(k): self(v) for k, v in value.items()}
        if not isinstance(value, str) or not is_text(value):
            return value
        found, end, encoded = [], 0, self.safe.backend.encode_batch([value], add_special_tokens=False)[0]
        for number, token in enumerate(encoded.ids):
            if token in self.safe.added:
                start, stop = encoded.token_to_chars(number) or (end, end)
                found += [value[end:start], f"{self.mark}{len(self.texts)}{self.mark}"]
                self.texts.append(value[start:stop])
                end = stop
        return "".join([*found, value[end:]]) if found else value

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text with marks.

        Raises:
            UserError: the text is not valid Unicode.
        """
        # tojson may escape the mark.
        mark = rf"(?:{self.mark}|\\u{ord(self.mark):04x})"
        pieces = re.split(rf"{mark}(\d+){mark}", text)
        encoded = [
            self.safe.plain(self.texts[int(piece)]) if odd else self.safe.encode(piece)
            for piece, odd in zip(pieces, itertools.cycle((False, True)), strict=False)
        ]
        return list(itertools.chain.from_iterable(encoded))


def _unused(text: str) -> str:
    """Return a character of Unicode's private use area that does not occur in a text.

    Raises:
        UserError: all of them occur.
    """
    unused = set(map(chr, range(0xE000, 0xF900))).difference(text)
    if not unused:
        raise UserError("the chat has every character of Unicode's private use area; expected some text")
    return min(unused)

"""Convert token ids to text, token by token. Text is returned as soon as no later token can change it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

UNFINISHED = "�"  # the decoded form of an incomplete character
WINDOW = 64  # maximum number of tokens that wait for the rest of a character


class Detokenizer:
    """Converts ids to text incrementally. The concatenated pieces equal `tokenizer.decode` of all ids.

    Args:
        tokenizer: a transformers tokenizer.
        skip_special_tokens: leave out the texts of special tokens.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._decode, self._skip = tokenizer.backend_tokenizer.decode, skip_special_tokens
        self._ids: list[int] = []  # includes earlier ids, because some decoders depend on the previous token
        self._before = 0  # number of leading ids whose text was returned; they stay as context
        self._sent = 0  # number of characters of the ids' text that were returned

    def add(self, token: int) -> str:
        """Add a token and return the text that later tokens cannot change."""
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
        """Return the remaining text."""
        return str(self._decode(self._ids, skip_special_tokens=self._skip))[self._sent :]


def detokenize(ids: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Yield the text of ids incrementally. A character is yielded once all its bytes have arrived."""
    detokenizer = Detokenizer(tokenizer)
    for token in ids:
        if text := detokenizer.add(token):
            yield text
    if text := detokenizer.end():
        yield text

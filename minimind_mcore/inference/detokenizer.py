"""Token ids to text, token by token. Text is given out as soon as no later token can change it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

UNFINISHED = "�"  # bytes of a character whose rest is still to come
WINDOW = 64  # tokens that wait at most for the rest of a character


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

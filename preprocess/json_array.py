"""A JSON array read element by element, so that a file of any size takes the memory of one element."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from minimind_mcore.errors import UserError

READ_CHARS = 1 << 20


class JsonArray:
    """Iterate over (line, element) of a stream that holds one JSON array.

    Args:
        stream: the text; lines count from 1 where it stands.
        path: named in errors.
        limit: longest element, in characters.

    Raises:
        UserError: the array is malformed; what follows the fault cannot be told apart.
    """

    def __init__(self, stream: TextIO, path: str, limit: int) -> None:
        self._stream = stream
        self._path = path
        self._limit = limit
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._line = 1

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self._take("[")
        if self._peek() != "]":
            yield self._element()
            while self._peek() == ",":
                self._take(",")
                yield self._element()
        self._take("]")
        if self._peek():
            raise self._fault("there is more after the end of the array")

    def _peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            rest = self._buffer.lstrip(" \t\r\n")
            self._line += self._buffer.count("\n", 0, len(self._buffer) - len(rest))
            self._buffer = rest or self._stream.read(READ_CHARS)
            if rest or not self._buffer:
                return self._buffer[:1]

    def _take(self, wanted: str) -> None:
        found = self._peek()
        if found != wanted:
            raise self._fault(f"expected {wanted!r}, found {found!r}" if found else f"the file ends before {wanted!r}")
        self._buffer = self._buffer[1:]

    def _element(self) -> tuple[int, Any]:
        self._peek()
        line = self._line
        while True:
            try:
                value, size = self._decoder.raw_decode(self._buffer)
            except (ValueError, RecursionError) as error:
                value, size, why = None, len(self._buffer), str(error)
            else:
                why = ""
            # An element that ends with the buffer may go on behind it: 12 is the start of 123.
            if size < len(self._buffer):
                break
            # Doubling keeps the work of trying again linear in the element's size.
            more = self._stream.read(max(READ_CHARS, len(self._buffer)))
            if not more and not why:
                break
            if not more or len(self._buffer) > self._limit:
                raise self._fault(f"malformed JSON ({why})")
            self._buffer += more
        self._line += self._buffer.count("\n", 0, size)
        self._buffer = self._buffer[size:]
        return line, value

    def _fault(self, what: str) -> UserError:
        return UserError(
            f"input {self._path}, line {self._line}: {what}; the rest of a broken array cannot be read: repair it, "
            "or write one JSON object per line (.jsonl), where a bad line costs only itself"
        )

"""uvicorn's HTTP protocol with limits for the head of a request: its lines up to the empty one.

uvicorn limits neither the time nor the size of a head: a client could hold a connection for ever, or fill the memory.
The body's limits are those of `api.py`.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol  # pyright: ignore[reportMissingImports]

HEAD_SECONDS = 30
HEAD_BYTES = 64 << 10


class LimitedHeads(HttpToolsProtocol):
    """Closes a connection whose request's head takes too long or is too large."""

    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        in_head = self._timer is not None
        super().data_received(data)
        if in_head and self._timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"the head of a request has {HEAD_BYTES} bytes at most")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begin()

    def on_headers_complete(self) -> None:
        self._end()
        super().on_headers_complete()

    def _begin(self) -> None:
        self._end()
        self._head_bytes = 0
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

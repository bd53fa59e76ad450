"""A server with OpenAI's chat API whose answers a test writes, for tests of clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# A chunk's delta, with further keys: "finish" is the finish reason, and "choice" has fields next to the delta, such as
# logprobs. A number is a pause in seconds.
Part = dict[str, Any] | float
Answer = Callable[[dict[str, Any]], Iterable[Part]]


class StandIn(ThreadingHTTPServer):
    """The server.

    Attributes:
        answer: makes the parts of an answer from the body of a request; an exception becomes status 400.
        bodies: of the requests.
        left: clients that have closed their connection in the middle of an answer.
        key: what clients must send; "" for none.
    """

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.key = name, ""
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.answer: Answer = lambda body: [{"content": "hello"}]
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.left = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: StandIn

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "*")
        self.end_headers()

    def _json(self, status: int, content: object) -> None:
        self._head(status, "application/json")
        self.wfile.write(json.dumps(content).encode())

    def _refused(self) -> bool:
        given = self.headers.get("Authorization", "")
        self.server.keys.append(given.removeprefix("Bearer "))
        if self.server.key in ("", given.removeprefix("Bearer ")):
            return False
        self._json(401, {"error": {"message": "wrong key"}})
        return True

    def do_OPTIONS(self) -> None:
        self._head(204, "text/plain")

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": self.server.name}]})
        else:
            self._json(404, {"error": {"message": "no such address"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        if self.path not in ("/v1/chat/completions", "/v1/completions"):
            self._json(404, {"error": {"message": "no such address"}})
            return
        self.server.bodies.append(body)
        try:
            parts = iter(self.server.answer(body))
        except ValueError as error:
            self._json(400, {"error": {"message": str(error)}})
            return
        self._head(200, "text/event-stream")
        try:
            self._stream(parts)
        except OSError:
            self.server.left.set()

    def _stream(self, parts: Iterator[Part]) -> None:
        count, finish = 0, "stop"
        for part in parts:
            if not isinstance(part, dict):
                time.sleep(part)
                continue
            count += 1
            finish = part.pop("finish", "tool_calls" if "tool_calls" in part else "stop")
            choice = {"index": 0, "finish_reason": None} | part.pop("choice", {})
            text = {"text": part.get("content", "")} if self.path == "/v1/completions" else {"delta": part}
            self._event({"choices": [choice | text]})
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        usage = {"prompt_tokens": 12, "completion_tokens": count, "total_tokens": 12 + count}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()


@contextmanager
def stand_in(name: str = "scripted") -> Iterator[StandIn]:
    """Run a stand-in that serves a model of this name."""
    with StandIn(name) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def call(name: str, arguments: str, number: int = 0) -> dict[str, Any]:
    """The delta of a tool call."""
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": number, "id": f"call_{number}", "type": "function", "function": function}]}

"""A stand-in for an SGLang server: the part of its protocol that MiniMind's rollout_engine.py uses, on transformers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import transformers


class StandIn:
    """The model of a server, and what was asked of it.

    Attributes:
        change: makes another answer of the right one, for tests of errors; it is given the path and the answer.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.asked: list[str] = []
        self.change: Callable[[str, Any], Any] = lambda path, answer: answer
        self.numbers = torch.Generator().manual_seed(0)

    def answer(self, path: str, body: Any) -> Any:
        self.asked.append(path)
        if path == "/generate":
            return self.change(path, [self.generate(ids, body["sampling_params"]) for ids in body["input_ids"]])
        if path == "/update_weights_from_disk":
            answer = self.change(path, {"success": True, "message": "Succeeded to update model weights."})
            if answer["success"] and "kept" not in answer:
                load: Any = transformers.AutoModelForCausalLM.from_pretrained
                self.model = load(body["model_path"], dtype=torch.float32).eval()
            return answer
        return self.change(path, {} if path in ("/health", "/flush_cache") else None)

    @torch.no_grad()
    def generate(self, prompt: list[int], how: dict[str, Any]) -> dict[str, Any]:
        """SGLang returns log-probabilities after the temperature and before top-k and top-p."""
        ids, pairs, reason = list(prompt), [], "length"
        for _ in range(how["max_new_tokens"]):
            logits = self.model(torch.tensor([ids])).logits[0, -1] / how["temperature"]
            logp = logits.log_softmax(-1)
            values, order = logits.topk(how["top_k"] if how["top_k"] > 0 else len(logits))
            p = values.softmax(-1)
            p = p.masked_fill(p.cumsum(-1) - p >= how["top_p"], 0.0)
            token = int(order[torch.multinomial(p, 1, generator=self.numbers)])
            ids.append(token)
            pairs.append([float(logp[token]), token, None])
            if token in how["stop_token_ids"]:
                reason = "stop"
                break
        about = {"output_token_logprobs": pairs, "finish_reason": {"type": reason}}
        return {"output_ids": ids[len(prompt) :], "meta_info": about}


@contextmanager
def serve() -> Iterator[tuple[str, StandIn]]:
    """A server in this process: its base URL, and its model."""
    standing = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body: Any) -> None:
            answer = standing.answer(self.path, body)
            text = json.dumps(answer).encode()
            self.send_response(500 if answer is None else 200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", standing
    finally:
        server.shutdown()
        server.server_close()

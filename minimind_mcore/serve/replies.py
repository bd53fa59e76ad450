"""Answers in OpenAI's format: whole, or streamed as chunks. Both come from the same pieces, so the text is the same."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from minimind_mcore.inference.sampling import Logprob
from minimind_mcore.serve.scheduler import Piece
from minimind_mcore.tools.parser import Call, StreamParser, Text

ARGUMENTS = 64  # maximum characters of a tool call's arguments in one chunk


class Tokens:
    """Texts and bytes of single tokens, for log-probabilities.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._bytes = {chr(code): byte for byte, code in _byte_characters().items()}
        self._added = self._backend.get_added_tokens_decoder()
        self._byte_level = "ByteLevel" in str(json.loads(self._backend.to_str())["decoder"])

    def text(self, token: int) -> str:
        """Return the text of a token that is decoded alone."""
        text: str = self._backend.decode([token], skip_special_tokens=False)
        return text

    def raw(self, token: int) -> list[int]:
        """Return the bytes of a token, which may be a part of a character."""
        piece = self._backend.id_to_token(token) or ""
        if self._byte_level and token not in self._added and all(character in self._bytes for character in piece):
            return [self._bytes[character] for character in piece]
        return list(self.text(token).encode())

    def chat(self, logprob: Logprob) -> dict[str, Any]:
        """Return the log-probabilities of one position in the format of chat completions."""
        top = [self._entry(token, value) for token, value in logprob.top]
        return self._entry(logprob.token, logprob.value) | {"top_logprobs": top}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": max(value, -9999.0), "bytes": self.raw(token)}


def _byte_characters() -> dict[int, int]:
    """Return the code point of the character that stands for each byte in GPT-2's byte-level BPE.

    A printable byte stands for itself. The others have the code points from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 256 + number for number, byte in enumerate(others)}


class ChatChoice:
    """One answer of a chat.

    Args:
        thinking: the prompt ends inside a thinking block.
        tools: tool calls are parsed.
        parallel: all tool calls are returned, not only the first.
        tokens: texts of tokens, to return log-probabilities. None: no log-probabilities.
        with_ids: token ids are returned.
    """

    def __init__(self, thinking: bool, tools: bool, parallel: bool, tokens: Tokens | None, with_ids: bool) -> None:
        self.tokens, self.with_ids, self.parallel = tokens, with_ids, parallel
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.ids: list[int] = []
        self.reasoning_tokens = 0
        self.finish: str | None = None
        self.stop_reason: str | int | None = None
        self._parser = StreamParser(thinking, tools)

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Add a piece, and return the deltas of the chunks for this piece."""
        deltas: list[dict[str, Any]] = []
        if self._parser.kind == "thinking":
            self.reasoning_tokens += len(piece.ids)
        self.ids += piece.ids
        if piece.logprob is not None and self.tokens is not None:
            self.logprobs.append(self.tokens.chat(piece.logprob))
        for part in self._parser.add(piece.text):
            deltas += self._deltas(part)
        if piece.finish is not None:
            for part in self._parser.end():
                deltas += self._deltas(part)
            self.finish = "tool_calls" if self.calls and piece.finish == "stop" else piece.finish
            self.stop_reason = piece.stop_reason
        return deltas

    def _deltas(self, part: Text | Call) -> list[dict[str, Any]]:
        if isinstance(part, Text):
            if part.kind == "thinking":
                return [{"reasoning_content": part.text, "reasoning": part.text}]
            return [{"content": part.text}]
        if self.calls and not self.parallel:
            return []
        number = len(self.calls)
        head = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        self.calls.append(head | {"function": {"name": part.name, "arguments": part.raw}})
        begun = head | {"index": number, "function": {"name": part.name, "arguments": ""}}
        pieces = [part.raw[start : start + ARGUMENTS] for start in range(0, len(part.raw), ARGUMENTS)]
        rest = [{"index": number, "function": {"arguments": piece}} for piece in pieces]
        return [{"tool_calls": [one]} for one in (begun, *rest)]

    def whole(self, index: int) -> dict[str, Any]:
        """Return the choice of a reply that is not streamed."""
        content, reasoning = self._parser.answer, self._parser.thinking or None
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if self.calls else "")}
        message |= {"refusal": None, "reasoning_content": reasoning, "reasoning": reasoning}
        if self.calls:
            message["tool_calls"] = self.calls
        choice = {"index": index, "message": message, "finish_reason": self.finish, "stop_reason": self.stop_reason}
        choice["logprobs"] = {"content": self.logprobs, "refusal": None} if self.tokens else None
        return choice | ({"token_ids": self.ids} if self.with_ids else {})

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Add a piece, and return the choices of its chunks."""
        seen = len(self.logprobs)
        deltas = self.add(piece)
        if not deltas and (self.tokens or self.with_ids) and piece.ids:
            deltas = [{}]  # reports the token, although its text is not yet complete
        choices: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if choices and self.tokens:
            choices[0]["logprobs"] = {"content": self.logprobs[seen:], "refusal": None}
        if choices and self.with_ids:
            choices[0]["token_ids"] = list(piece.ids)
        if piece.finish is not None:
            last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": self.finish}
            choices.append(last | {"stop_reason": self.stop_reason})
        return choices


class TextChoice:
    """One answer of a completion.

    Args:
        tokens: texts of tokens, to return log-probabilities. None: no log-probabilities.
        with_ids: token ids are returned.
    """

    def __init__(self, tokens: Tokens | None, with_ids: bool) -> None:
        self.tokens, self.with_ids = tokens, with_ids
        self.text = ""
        self.ids: list[int] = []
        self.reasoning_tokens = 0
        self.finish: str | None = None
        self.stop_reason: str | int | None = None
        self._logprobs: dict[str, list[Any]] = _no_logprobs()
        self._offset = 0

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        self.text += piece.text
        self.ids += piece.ids
        self.finish, self.stop_reason = piece.finish, piece.stop_reason
        if piece.logprob is not None and self.tokens is not None:
            found = self.tokens.chat(piece.logprob)
            self._logprobs["tokens"].append(found["token"])
            self._logprobs["token_logprobs"].append(found["logprob"])
            # As in OpenAI's API the sampled token is in top_logprobs, even if it is not one of the likeliest.
            self._logprobs["top_logprobs"].append(
                {top["token"]: top["logprob"] for top in [*found["top_logprobs"], found]}
            )
            self._logprobs["text_offset"].append(self._offset)
            self._offset += len(found["token"])

    def whole(self, index: int) -> dict[str, Any]:
        """Return the choice of a reply that is not streamed."""
        choice = {"index": index, "text": self.text, "finish_reason": self.finish, "stop_reason": self.stop_reason}
        choice["logprobs"] = self._logprobs if self.tokens else None
        return choice | ({"token_ids": self.ids} if self.with_ids else {})

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Add a piece, and return the choices of its chunks."""
        self._logprobs = _no_logprobs()
        self.add(piece)
        if not (piece.text or piece.finish or (piece.ids and (self.tokens or self.with_ids))):
            return []
        choice = {"index": index, "text": piece.text, "finish_reason": piece.finish, "stop_reason": piece.stop_reason}
        choice["logprobs"] = self._logprobs if self.tokens else None
        return [choice | ({"token_ids": list(piece.ids)} if self.with_ids else {})]


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def usage(prompt_tokens: int, choices: Sequence[ChatChoice | TextChoice]) -> dict[str, Any]:
    """Return the number of tokens of a request, as in OpenAI's `usage`."""
    written = sum(len(choice.ids) for choice in choices)
    thought = sum(choice.reasoning_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "completion_tokens_details": {"reasoning_tokens": thought},
    }


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error object in OpenAI's format."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}

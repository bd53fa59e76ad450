"""The layer between HTTP and the scheduler: requests become sequences, and pieces of output become answers."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from minimind_mcore.inference.loading import Loaded
from minimind_mcore.inference.sampling import SamplingParams
from minimind_mcore.serve.engines import ServerOptions
from minimind_mcore.serve.grammar import Grammar, call_grammar, json_grammar
from minimind_mcore.serve.metrics import ServerMetrics
from minimind_mcore.serve.prompts import SafePrompts
from minimind_mcore.serve.protocol import (
    Body,
    ChatBody,
    ChatTemplateFields,
    CompletionBody,
    NamedTool,
    RequestError,
    Tool,
)
from minimind_mcore.serve.replies import ChatChoice, TextChoice, Tokens
from minimind_mcore.serve.scheduler import Piece, Scheduler, Sequence, Stops

DEFAULT_NAME = "minimind"


@dataclass
class GenerationRequest:
    """The sequences of one request.

    Attributes:
        prompts: token ids of each prompt.
        choices: receiver of the pieces of each sequence.
        make: returns the sampling parameters of sequence n. Called once per sequence.
        stops: stop conditions, one per prompt.
        stream: send pieces as soon as they are generated.
    """

    prompts: list[list[int]]
    choices: SequenceOf[ChatChoice | TextChoice]
    make: Callable[[int], SamplingParams]
    stops: list[Stops]
    stream: bool

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in all prompts."""
        return sum(map(len, self.prompts))


class Outbox:
    """Passes generated pieces from the scheduler's thread to the event loop, with one call per scheduler step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: list[tuple[asyncio.Queue[list[tuple[int, Piece]]], int, list[Piece]]] = []

    def put(self, queue: asyncio.Queue[list[tuple[int, Piece]]], index: int, pieces: list[Piece]) -> None:
        """Store pieces until `flush`."""
        self._items.append((queue, index, pieces))

    def flush(self) -> None:
        """Pass all stored pieces to the event loop."""
        if not self._items:
            return
        items, self._items = self._items, []

        def deliver() -> None:
            for queue, index, pieces in items:
                queue.put_nowait([(index, piece) for piece in pieces])

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)


class Service:
    """The model service behind the endpoints. Before `start` every request is answered with status 503.

    Args:
        options: options of the server.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options, self.name, self.metrics = options, options.name, ServerMetrics()
        self.created = int(time.time())
        self._scheduler: Scheduler | None = None

    def start(self, loaded: Loaded, scheduler: Scheduler, outbox: Outbox, max_model_len: int) -> None:
        """Start the scheduler, and answer requests from now on."""
        self.loaded, self.outbox, self.max_model_len = loaded, outbox, max_model_len
        self.prompts, self.tokens = SafePrompts(loaded.tokenizer), Tokens(loaded.tokenizer)
        self.eos: frozenset[int] = frozenset({loaded.tokenizer.eos_token_id})
        scheduler.start()
        self._scheduler = scheduler

    def close(self) -> None:
        """Stop the scheduler, and abort unfinished sequences."""
        if self._scheduler is not None:
            self._scheduler.close()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._scheduler is not None and self._scheduler.alive

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler.

        Raises:
            RequestError: the model is not loaded yet, or the scheduler has stopped.
        """
        if self._scheduler is None or not self._scheduler.alive:
            raise RequestError("the model is not loaded yet, or the server ends", status=503)
        return self._scheduler

    @property
    def has_chats(self) -> bool:
        """Whether chat requests are supported. A base model (`--raw`, or no chat template) only completes text."""
        return bool(self.loaded.tokenizer.chat_template) and not self.options.raw

    def card(self) -> dict[str, Any]:
        """Return the entry of `/v1/models`."""
        _ = self.scheduler
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "minimind"}
        return card | {"max_model_len": self.max_model_len, "chat_template": self.has_chats}

    def check_model(self, name: str | None) -> None:
        """Raise a `RequestError` if the name is of another model, or no model is loaded."""
        _ = self.scheduler
        if name not in (None, "", self.name, DEFAULT_NAME):
            found = name if len(name) <= 100 else name[:100] + "..."
            message = f"the model {found!r} does not exist; this server has {self.name!r}"
            raise RequestError(message, "model", 404, "model_not_found")

    def check_ids(self, ids: SequenceOf[int], field_name: str) -> None:
        """Raise a `RequestError` if an id is outside the vocabulary."""
        size = self.loaded.info.vocab_size
        if wrong := next((token for token in ids if token >= size), None):
            raise RequestError(f"{field_name}: found the id {wrong}, expected 0 to {size - 1}", field_name)

    def chat_ids(
        self, body: ChatTemplateFields, tools: list[Tool] | None, prompt: bool = True
    ) -> tuple[list[int], bool]:
        """Return the token ids of a chat, and whether the prompt ends inside a reasoning block.

        Raises:
            RequestError: the model has no chat template.
            UserError: the template rejects the chat.
        """
        if not self.has_chats:
            raise RequestError("this model is only pretrained and has no chats; use /v1/completions")
        messages = [_template_message(message.model_dump(exclude_none=True)) for message in body.messages]
        definitions = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
        return self.prompts.chat(messages, definitions, self._switches(body), prompt)

    def _switches(self, body: ChatTemplateFields) -> dict[str, Any]:
        """Return the arguments of the chat template, with the reasoning switch under MiniMind's name and Qwen3's."""
        given = dict(body.chat_template_kwargs or {})
        named = [value for value in (given.pop("open_thinking", None), given.pop("enable_thinking", None),
                                     body.open_thinking) if value is not None]  # fmt: skip
        if not all(isinstance(value, bool) for value in named):
            raise RequestError("open_thinking and enable_thinking are true or false", "chat_template_kwargs")
        thinking = self.options.thinking
        if named:
            thinking = any(named)
        elif body.reasoning_effort is not None:
            thinking = body.reasoning_effort != "none"
        return given | ({} if thinking is None else {"open_thinking": thinking, "enable_thinking": thinking})

    def chat(self, body: ChatBody) -> GenerationRequest:
        """Return the sequences of a chat request.

        Raises:
            UserError: the request is invalid.
        """
        self.check_model(body.model)
        choice = body.tool_choice or ("auto" if body.tools else "none")
        tools = None if choice == "none" else body.tools
        ids, thinking = self.chat_ids(body, tools)
        tokens = self.tokens if body.logprobs else None
        with_ids, parallel = bool(body.return_token_ids), body.parallel_tool_calls is not False
        make = self._grammar(body, tools, choice, thinking)
        choices = [ChatChoice(thinking, bool(tools), parallel, tokens, with_ids) for _ in range(body.n or 1)]
        return self._job(body, [ids], choices, make, (body.top_logprobs or 0) if body.logprobs else None)

    def completion(self, body: CompletionBody) -> GenerationRequest:
        """Return the sequences of a completion request.

        Raises:
            UserError: the request is invalid.
        """
        self.check_model(body.model)
        prompts = []
        for prompt in body.prompts():
            ids = self.prompts.raw(prompt) if isinstance(prompt, str) else prompt
            if not ids:
                raise RequestError("prompt is empty; expected a text or token ids", "prompt")
            self.check_ids(ids, "prompt")
            prompts.append(ids)
        tokens = self.tokens if body.logprobs is not None else None
        choices = [TextChoice(tokens, bool(body.return_token_ids)) for _ in range((body.n or 1) * len(prompts))]
        return self._job(body, prompts, choices, self._grammar(body, None, "none", False), body.logprobs)

    def _grammar(
        self, body: ChatBody | CompletionBody, tools: list[Tool] | None, choice: str | NamedTool, thinking: bool
    ) -> Callable[[], Grammar] | None:
        """Return a factory of the grammar that constrains the answers, or None for free text.

        Raises:
            RequestError: the response format is not supported.
        """
        stop, tokenizer = sorted(self.eos), self.loaded.tokenizer
        break_ = "\n\n" if thinking else ""  # follows a reasoning block
        form = body.response_format or {"type": "text"}
        if tools and choice not in ("auto", "none"):
            wanted = [tool.model_dump(exclude_none=True) for tool in tools]
            if isinstance(choice, NamedTool):
                wanted = [tool for tool in wanted if tool["function"]["name"] == choice.function.name]
            before, behind = self.prompts.encode(f"{break_}<tool_call>\n"), self.prompts.encode("\n</tool_call>")
            text = call_grammar(wanted)
        elif form.get("type") in ("json_object", "json_schema"):
            schema = form.get("json_schema") if form["type"] == "json_schema" else {"schema": {"type": "object"}}
            schema = schema.get("schema") if isinstance(schema, dict) else None
            if not isinstance(schema, dict):
                raise RequestError("response_format.json_schema has no schema; expected an object", "response_format")
            before, behind, text = self.prompts.encode(break_), [], json_grammar(schema)
        elif form.get("type") == "text":
            return None
        else:
            raise RequestError(
                f"response_format.type is {str(form.get('type'))[:40]!r}; expected text, json_object or json_schema",
                "response_format",
            )

        return Grammar(text, tokenizer, stop, before, behind, thinking).copy

    def _job(
        self,
        body: ChatBody | CompletionBody,
        prompts: list[list[int]],
        choices: SequenceOf[ChatChoice | TextChoice],
        grammar: Callable[[], Grammar] | None,
        logprobs: int | None,
    ) -> GenerationRequest:
        """Return a request with the sampling parameters and stop conditions of its sequences.

        Raises:
            RequestError: a field is invalid, or prompt and answer exceed the context length.
        """
        limit = self.options.max_batch_size + self.options.max_queue
        if len(choices) > limit:  # checked before anything is allocated per sequence
            raise RequestError(f"{len(choices)} answers are asked for; expected {limit} at most. Lower n", "n")
        stops = [self._stops(body, prompt) for prompt in prompts]
        bias = {}
        for key, value in (body.logit_bias or {}).items():
            if not key.isdecimal() or len(key) > 9 or int(key) >= self.loaded.info.vocab_size:
                raise RequestError(f"logit_bias: {key[:20]!r} is not a token id", "logit_bias")
            bias[int(key)] = value
        defaults: dict[str, Any] = dict(self.options.defaults)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty"):  # fmt: skip
            if (value := getattr(body, name)) is not None:
                defaults[name] = value
        defaults["top_k"] = max(int(defaults.get("top_k", 0)), 0)
        banned = self.eos | frozenset(body.stop_token_ids or ())

        def make(number: int) -> SamplingParams:
            return SamplingParams(
                **defaults,
                logit_bias=bias,
                seed=None if body.seed is None else body.seed + number,
                logprobs=logprobs,
                min_tokens=body.min_tokens or 0,
                banned=banned,
                grammar=grammar() if grammar else None,
            )

        return GenerationRequest(prompts, choices, make, stops, bool(body.stream))

    def _stops(self, body: Body, prompt: list[int]) -> Stops:
        limit: int | None = getattr(body, "limit", None)
        free = self.max_model_len - len(prompt)
        if free < 1 or (limit or 1) > free:
            asked = "" if free < 1 else f", and max_tokens asks for {limit}"
            raise RequestError(
                f"the context has {self.max_model_len} tokens; the prompt has {len(prompt)}{asked}. Shorten the prompt "
                "or max_tokens",
                "messages" if isinstance(body, ChatBody) else "prompt",
                code="context_length_exceeded",
            )
        if (body.min_tokens or 0) > (limit or free):
            raise RequestError(
                f"min_tokens: found {body.min_tokens}, expected at most max_tokens, {limit or free}", "min_tokens"
            )
        self.check_ids(body.stop_token_ids or (), "stop_token_ids")
        texts = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        return Stops(
            eos=frozenset() if body.ignore_eos else self.eos,
            ids=frozenset(body.stop_token_ids or ()),
            texts=texts,
            max_tokens=limit or free,
            keep_text=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
        )

    def submit(self, job: GenerationRequest) -> Answers:
        """Queue a request, and return an async iterator over its output.

        Raises:
            QueueFull: the queue is full.
        """
        queue: asyncio.Queue[list[tuple[int, Piece]]] = asyncio.Queue()
        sequences = []
        for number in range(len(job.choices)):
            prompt = number * len(job.prompts) // len(job.choices)
            emit = functools.partial(self.outbox.put, queue, number)
            sequences.append(Sequence(job.prompts[prompt], job.make(number), job.stops[prompt], emit, job.stream))
        scheduler = self.scheduler
        scheduler.submit(sequences)
        return Answers(queue, scheduler, sequences)


class Answers:
    """Async iterator over batches of (choice number, piece), until all choices are finished.

    This is a class because `aclose` of an async generator does nothing before the first iteration.
    """

    def __init__(
        self, queue: asyncio.Queue[list[tuple[int, Piece]]], scheduler: Scheduler, sequences: list[Sequence]
    ) -> None:
        self._queue, self._scheduler, self._sequences = queue, scheduler, sequences
        self._left = len(sequences)

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> list[tuple[int, Piece]]:
        if not self._left:
            raise StopAsyncIteration
        batch = await self._queue.get()
        while not self._queue.empty():
            batch += self._queue.get_nowait()
        self._left -= sum(piece.finish is not None for _, piece in batch)
        return batch

    async def aclose(self) -> None:
        """Cancel the unfinished sequences."""
        if self._left:
            self._left = 0
            self._scheduler.cancel(self._sequences)


def _template_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message in the form that chat templates expect."""
    if message["role"] == "developer":
        message["role"] = "system"
    content = message.get("content", "")
    message["content"] = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    if message["role"] == "assistant" and "reasoning" in message:
        message.setdefault("reasoning_content", message.pop("reasoning"))
    return message

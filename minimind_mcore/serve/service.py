"""Requests to sequences: what lies between HTTP and the scheduler."""

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
    """The sequences that one request asks for.

    Attributes:
        prompts: ids of each prompt.
        choices: where the pieces of each sequence go.
        make: makes the settings of sequence number n; called once for each.
        stops: what ends the sequences.
        stream: pieces come one by one.
    """

    prompts: list[list[int]]
    choices: SequenceOf[ChatChoice | TextChoice]
    make: Callable[[int], SamplingParams]
    stops: list[Stops]
    stream: bool

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))


class Outbox:
    """Brings what the scheduler's thread has made to the event loop, once for each of its rounds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: list[tuple[asyncio.Queue[list[tuple[int, Piece]]], int, list[Piece]]] = []

    def put(self, queue: asyncio.Queue[list[tuple[int, Piece]]], index: int, pieces: list[Piece]) -> None:
        """Keep pieces until `flush`."""
        self._items.append((queue, index, pieces))

    def flush(self) -> None:
        """Hand everything over."""
        if not self._items:
            return
        items, self._items = self._items, []

        def deliver() -> None:
            for queue, index, pieces in items:
                queue.put_nowait([(index, piece) for piece in pieces])

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)


class Service:
    """What the endpoints use. Until `start` it only says that it is not ready.

    Args:
        options: of the server.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options, self.name, self.metrics = options, options.name, ServerMetrics()
        self.created = int(time.time())
        self._scheduler: Scheduler | None = None

    def start(self, loaded: Loaded, scheduler: Scheduler, outbox: Outbox, max_model_len: int) -> None:
        """Begin to answer."""
        self.loaded, self.outbox, self.max_model_len = loaded, outbox, max_model_len
        self.prompts, self.tokens = SafePrompts(loaded.tokenizer), Tokens(loaded.tokenizer)
        self.eos: frozenset[int] = frozenset({loaded.tokenizer.eos_token_id})
        scheduler.start()
        self._scheduler = scheduler

    def close(self) -> None:
        """End; what is unfinished is aborted."""
        if self._scheduler is not None:
            self._scheduler.close()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._scheduler is not None and self._scheduler.alive

    @property
    def scheduler(self) -> Scheduler:
        """What runs the sequences.

        Raises:
            RequestError: the model is not loaded yet.
        """
        if self._scheduler is None or not self._scheduler.alive:
            raise RequestError("the model is not loaded yet, or the server ends", status=503)
        return self._scheduler

    def card(self) -> dict[str, Any]:
        """The model as `/v1/models` describes it."""
        _ = self.scheduler
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "minimind"}
        return card | {"max_model_len": self.max_model_len}

    def check_model(self, name: str | None) -> None:
        """Raise a `RequestError` for the name of another model, or where no model is loaded."""
        _ = self.scheduler
        if name not in (None, "", self.name, DEFAULT_NAME):
            found = name if len(name) <= 100 else name[:100] + "..."
            message = f"the model {found!r} does not exist; this server has {self.name!r}"
            raise RequestError(message, "model", 404, "model_not_found")

    def check_ids(self, ids: SequenceOf[int], field_name: str) -> None:
        """Raise a `RequestError` for ids that the tokenizer does not have."""
        size = self.loaded.info.vocab_size
        if wrong := next((token for token in ids if token >= size), None):
            raise RequestError(f"{field_name}: found the id {wrong}, expected 0 to {size - 1}", field_name)

    def chat_ids(
        self, body: ChatTemplateFields, tools: list[Tool] | None, prompt: bool = True
    ) -> tuple[list[int], bool]:
        """The ids of a chat, and whether they end inside of a thought.

        Raises:
            RequestError: the model has no chat template.
            UserError: the template refuses the chat.
        """
        if self.options.raw or not self.loaded.tokenizer.chat_template:
            raise RequestError("this model is only pretrained and has no chats; use /v1/completions")
        messages = [_template_message(message.model_dump(exclude_none=True)) for message in body.messages]
        definitions = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
        return self.prompts.chat(messages, definitions, self._switches(body), prompt)

    def _switches(self, body: ChatTemplateFields) -> dict[str, Any]:
        """The arguments of the chat template: MiniMind's name of the switch for thoughts, and Qwen3's."""
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
        """The job of a chat.

        Raises:
            UserError: it cannot be answered.
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
        """The job of a completion.

        Raises:
            UserError: it cannot be answered.
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
        """Makes what the answers must follow; None if nothing.

        Raises:
            RequestError: it is not supported.
        """
        stop, tokenizer = sorted(self.eos), self.loaded.tokenizer
        break_ = "\n\n" if thinking else ""  # behind a thought
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
        """Sampling and stops of the sequences.

        Raises:
            RequestError: prompt and answer are longer than the model's context.
        """
        limit = self.options.max_batch_size + self.options.max_queue
        if len(choices) > limit:  # before anything is made for each of them
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
        """Queue a job.

        Returns:
            What is written.

        Raises:
            QueueFull: too many requests wait.
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
    """Batches of pieces, each with the number of its choice, until all choices are finished.

    No generator, whose `aclose` would do nothing before the first piece is asked for.
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
        """Cancel what is unfinished."""
        if self._left:
            self._left = 0
            self._scheduler.cancel(self._sequences)


def _template_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it."""
    if message["role"] == "developer":
        message["role"] = "system"
    content = message.get("content", "")
    message["content"] = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    if message["role"] == "assistant" and "reasoning" in message:
        message.setdefault("reasoning_content", message.pop("reasoning"))
    return message

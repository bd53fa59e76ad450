"""The HTTP interface of the embedded server: OpenAI's endpoints, and a few of vLLM's."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response  # pyright: ignore[reportMissingImports]
from fastapi.responses import JSONResponse  # pyright: ignore[reportMissingImports]
from sse_starlette import EventSourceResponse  # pyright: ignore[reportMissingImports]
from starlette.datastructures import Headers  # pyright: ignore[reportMissingImports]
from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]
from starlette.middleware.cors import CORSMiddleware  # pyright: ignore[reportMissingImports]
from starlette.requests import ClientDisconnect  # pyright: ignore[reportMissingImports]
from starlette.types import ASGIApp, Message, Receive, Scope, Send  # pyright: ignore[reportMissingImports]

from minimind_mcore import web
from minimind_mcore.errors import UserError
from minimind_mcore.serve.engines import ServerOptions
from minimind_mcore.serve.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    RequestBody,
    RequestError,
    TokenizeBody,
    TokenizeChatBody,
    ToolCallBody,
    validated,
)
from minimind_mcore.serve.replies import error, usage
from minimind_mcore.serve.scheduler import Piece, QueueFull, report
from minimind_mcore.serve.service import Answers, GenerationRequest, Service
from minimind_mcore.tools.process import Result as ToolResult
from minimind_mcore.tools.registry import BUILTIN, PARALLEL, Toolbox, open_tools

logger = logging.getLogger(__name__)
MAX_BODY = 8 << 20  # maximum size of a body in bytes
LARGE_BODY = 1 << 18  # bytes from which bodies are encoded one at a time; encoding 8 MiB takes 7 s
MAX_DEPTH = 100  # maximum nesting of lists and objects in a body
BODY_SECONDS = 30.0  # time for a client to send a body
SEND_SECONDS = 120.0  # time for a client to read a chunk
ROUTES = (
    "/", "/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/tools", "/tools/call",
    "/health", "/metrics",
)  # fmt: skip
# The chat page can connect to other servers too, to compare answers or instead of this server.
PAGE = web.page("chat", connect="'self' http: https:")
AnyBody = TypeVar("AnyBody", bound=RequestBody)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def create_app(service: Service) -> ASGIApp:
    """The application. The model of the service may still be loading."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if origins := service.options.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(QueueFull, _queue_full)
    app.add_exception_handler(Exception, _unexpected)
    app.state.large = asyncio.Semaphore(1)
    _add_information(app, service)
    _add_answers(app, service)
    _add_tools(app, open_tools(BUILTIN), service.options.is_anonymous)
    add_page(app, PAGE)
    return Gate(app, service)


def _add_information(app: FastAPI, service: Service) -> None:
    async def health() -> Response:
        return JSONResponse({"status": "ok"}) if service.alive else _reply(503, "the model is not loaded yet")

    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.card()]})

    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(service.card())

    async def tokenize(request: Request) -> Response:
        content = await read_json(request)
        body: TokenizeBody | TokenizeChatBody
        if isinstance(content, dict) and "messages" in content:
            body = parse(TokenizeChatBody, content)
            service.check_model(body.model)
            prompt = bool(body.add_generation_prompt)
            ids, _ = await _in_thread(request, service.chat_ids, body, body.tools, prompt)
        else:
            body = parse(TokenizeBody, content)
            service.check_model(body.model)
            encode = service.prompts.raw if body.add_special_tokens else service.prompts.encode
            ids = await _in_thread(request, encode, body.prompt)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
        texts = [service.tokens.text(token) for token in ids] if body.return_token_strs else None
        return JSONResponse(found | {"token_strs": texts})

    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeBody, await read_json(request))
        service.check_model(body.model)
        service.check_ids(body.tokens, "tokens")
        text = service.loaded.tokenizer.backend_tokenizer.decode(body.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    for path, endpoint in (("/health", health), ("/metrics", metrics), ("/v1/models", models)):
        app.add_api_route(path, endpoint, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"])
    app.add_api_route("/tokenize", tokenize, methods=["POST"])
    app.add_api_route("/detokenize", detokenize, methods=["POST"])


def _add_answers(app: FastAPI, service: Service) -> None:
    async def chat(request: Request) -> Response:
        body = parse(ChatBody, await read_json(request))
        job = await _in_thread(request, service.chat, body)
        return await _answer(request, service, body, job, "chat.completion", "chatcmpl-")

    async def completions(request: Request) -> Response:
        body = parse(CompletionBody, await read_json(request))
        job = await _in_thread(request, service.completion, body)
        return await _answer(request, service, body, job, "text_completion", "cmpl-")

    app.add_api_route("/v1/chat/completions", chat, methods=["POST"])
    app.add_api_route("/v1/completions", completions, methods=["POST"])


def _add_tools(app: FastAPI, toolbox: Toolbox, is_anonymous: bool) -> None:
    """Let the chat page run tools: each call in a subprocess with limits. Strangers on a network may run none."""
    run = in_slots(toolbox)

    async def tools() -> Response:
        return JSONResponse({"tools": [] if is_anonymous else toolbox.definitions})

    async def call(request: Request) -> Response:
        if is_anonymous:
            raise HTTPException(403, "the server runs no tools for other hosts without a key; start it with API_KEY")
        body = parse(ToolCallBody, await read_json(request))
        result = await run(body.name, body.arguments)
        return JSONResponse({"text": result.text, "ok": result.ok})

    app.add_api_route("/tools", tools, methods=["GET"])
    app.add_api_route("/tools/call", call, methods=["POST"])


def in_slots(toolbox: Toolbox) -> Callable[[str, object], Awaitable[ToolResult]]:
    """Return what runs a built-in tool in a thread, a few at a time: each call starts a process."""
    slots = asyncio.Semaphore(PARALLEL)

    async def run(name: str, arguments: object) -> ToolResult:
        async with slots:
            result = await asyncio.to_thread(toolbox.run, name, arguments)
        assert result is not None  # a function is behind each built-in tool
        return result

    return run


def add_page(app: FastAPI, files: Mapping[str, tuple[bytes, dict[str, str]]]) -> None:
    """Serve the files of `web.page`."""

    def file(content: bytes, headers: dict[str, str]) -> Callable[[], Awaitable[Response]]:
        async def reply() -> Response:
            return Response(content, headers=headers)

        return reply

    for path, (content, headers) in files.items():
        app.add_api_route(path, file(content, headers), methods=["GET"])


async def _in_thread(
    request: Request, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Run what encodes a body outside of the event loop, which goes on; large bodies are encoded one at a time."""
    large = request.state.size > LARGE_BODY
    async with request.app.state.large if large else contextlib.nullcontext():
        return await asyncio.to_thread(function, *args, **kwargs)


async def _answer(
    request: Request, service: Service, body: ChatBody | CompletionBody, job: GenerationRequest, kind: str, prefix: str
) -> Response:
    """Run a job, and reply whole or as a stream."""
    head = {"id": prefix + (body.request_id or uuid.uuid4().hex), "object": kind, "created": int(time.time())}
    head |= {"model": service.name}
    pieces = service.submit(job)
    if not body.stream:
        async with contextlib.aclosing(_until_disconnected(request, pieces)) as found:
            async for index, piece in found:
                _check(piece)
                job.choices[index].add(piece)
        if any(choice.finish is None for choice in job.choices):
            return Response(status_code=499)  # the client has left
        whole: list[dict[str, Any]] = [choice.whole(index) for index, choice in enumerate(job.choices)]
        extra = {"prompt_token_ids": job.prompts[0]} if body.return_token_ids else {}
        return JSONResponse(head | {"choices": whole, "usage": usage(job.prompt_tokens, job.choices)} | extra)
    chunk = head | {"object": "chat.completion.chunk" if kind == "chat.completion" else kind}
    return _Stream(_events(job, pieces, chunk, body), pieces)


class _Stream(EventSourceResponse):
    """A stream. However it ends, also before its first event, the answers that nobody reads are cancelled."""

    def __init__(self, events: AsyncGenerator[bytes, None], answers: Answers) -> None:
        super().__init__(events, ping=15, sep="\n", send_timeout=SEND_SECONDS)
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.answers.aclose()


async def _events(
    job: GenerationRequest, answers: Answers, head: dict[str, Any], body: ChatBody | CompletionBody
) -> AsyncGenerator[bytes, None]:
    """The events of a stream."""
    last = {"usage": None} if body.include_usage else {}

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: " + _dumps(head | {"choices": choices} | last | more) + b"\n\n"

    if isinstance(body, ChatBody):
        more = {"prompt_token_ids": job.prompts[0]} if body.return_token_ids else {}
        role = {"role": "assistant", "content": ""}
        first = [{"index": n, "delta": role, "logprobs": None, "finish_reason": None} for n in range(len(job.choices))]
        yield b"".join(event([choice], **more) for choice in first)
    async for batch in answers:
        events: list[bytes] = []
        for index, piece in batch:
            if piece.finish in ("abort", "error"):
                yield b"".join([*events, b"data: ", _dumps(error(_reason(piece), 500)), b"\n\n"])
                return
            events += [event([choice]) for choice in job.choices[index].chunks(index, piece)]
        if events:
            yield b"".join(events)
    if body.include_usage:
        yield event([], usage=usage(job.prompt_tokens, job.choices))
    yield b"data: [DONE]\n\n"


async def _until_disconnected(request: Request, answers: Answers) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of a job; they end when the client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.ensure_future(left())
    try:
        async with contextlib.aclosing(answers):
            while True:
                batch = asyncio.ensure_future(anext(answers, None))
                await asyncio.wait({batch, watcher}, return_when=asyncio.FIRST_COMPLETED)
                if not batch.done():
                    batch.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await batch
                    return
                found = batch.result()
                if found is None:
                    return
                for one in found:
                    yield one
    finally:
        watcher.cancel()


def _check(piece: Piece) -> None:
    """Raise where an answer has failed."""
    if piece.finish == "abort":
        raise HTTPException(503, _reason(piece))
    if piece.finish == "error":
        raise HTTPException(500, _reason(piece))


def _reason(piece: Piece) -> str:
    return "the server is shutting down" if piece.finish == "abort" else "the answer failed; the server's log says why"


async def read_json(request: Request) -> Any:
    """The body of a request.

    Raises:
        RequestError: it is too large, too slow, not JSON, or nested too deeply.
    """
    data = bytearray()

    async def receive() -> None:
        async for part in request.stream():
            data.extend(part)
            if len(data) > MAX_BODY:
                raise RequestError(f"the body has more than {MAX_BODY >> 20} MiB", status=413)

    try:
        await asyncio.wait_for(receive(), BODY_SECONDS)
    except asyncio.TimeoutError as problem:
        raise RequestError(f"the body did not arrive within {BODY_SECONDS:.0f} s", status=408) from problem
    except ClientDisconnect as problem:  # not an error of the server, which would be logged
        raise RequestError("the client left before the body arrived", status=499) from problem
    request.state.size = len(data)
    try:
        content = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as problem:
        raise RequestError(f"the body is not JSON in UTF-8: {str(problem)[:100]}") from problem
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels")
        inner = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list))
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def parse(kind: type[AnyBody], content: Any) -> AnyBody:
    """A body as one of the classes of `protocol.py`.

    Raises:
        RequestError: a field is missing or has a wrong value.
    """
    body = validated(kind, content)
    body.check()
    return body


def _dumps(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _reply(status: int, message: str, param: str | None = None, code: str | None = None, **headers: str) -> Response:
    return JSONResponse(error(message, status, param, code), status, headers)


async def _http_error(request: Request, problem: Any) -> Response:
    detail = problem.detail if problem.status_code not in (404, 405) else f"no {request.method} at this address"
    return _reply(problem.status_code, str(detail), None, None, **(problem.headers or {}))


async def _user_error(request: Request, problem: Exception) -> Response:
    if isinstance(problem, RequestError):
        return _reply(problem.status, str(problem), problem.param, problem.code)
    return _reply(400, str(problem))


async def _queue_full(request: Request, problem: Exception) -> Response:
    return _reply(429, f"the server is busy: {problem}; try again later", None, "queue_full", **{"Retry-After": "1"})


async def _unexpected(request: Request, problem: Exception) -> Response:
    return _reply(500, "the server failed; its log says where")


def refusal(options: ServerOptions, headers: Headers) -> str | None:
    """Return why a request may come from a page of another site; None if it does not.

    A browser sends the page's address as Origin with each POST. A site can also let its own name point to this host
    (DNS rebinding): its pages then read replies as their own, but Host has the name. A key stops both.
    """
    allowed = options.cors_origins
    if options.api_key is not None or "*" in allowed:
        return None
    host, origin = headers.get("host", ""), headers.get("origin")
    names = {"", "localhost", options.host.lower(), *(urlsplit(other).hostname for other in allowed)}
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name not in names:
            ipaddress.ip_address(name)  # an address, unlike a name, points to no other host
    except ValueError:
        return f"Host is {host[:80]!r}; expected an IP address or localhost. To accept every Host, set API_KEY"
    if origin is None or origin in (f"http://{host}", f"https://{host}", *allowed):
        return None
    return f"Origin is {origin[:80]!r}; to let this web page send requests, start the server with --cors-origin"


class Gate:
    """Refuses pages of other sites, asks for the key, counts and logs requests, and keeps exceptions to itself.

    The log has neither bodies nor addresses that a client made up.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.metrics, self.options = app, service.metrics, service.options
        key = self.options.api_key
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        route = path if path in ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"
        began, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if path != "/health" and (reason := refusal(self.options, Headers(scope=scope))):
                await _reply(403, reason)(scope, receive, counted)
            elif path not in ("/health", *PAGE) and not self._allowed(scope):  # the page asks its user for the key
                refused = _reply(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", None,
                                 "invalid_api_key", **{"WWW-Authenticate": "Bearer"})  # fmt: skip
                await refused(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        except Exception as problem:
            report(logger, "a request failed", problem)
        seconds = time.perf_counter() - began
        self.metrics.request(route, status)
        level = logging.DEBUG if route in ("/health", "/metrics") else logging.INFO
        logger.log(level, "%s %s %d %.3f s", scope["method"][:8], route, status, seconds)

    def _allowed(self, scope: Scope) -> bool:
        if self._expected is None or scope["method"] == "OPTIONS":  # a browser asks without the key
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._expected)

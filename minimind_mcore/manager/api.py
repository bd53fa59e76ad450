"""The HTTP interface of the manager. docs/manager.md lists the paths."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, get_args

from fastapi import FastAPI, Request, Response  # pyright: ignore[reportMissingImports]
from fastapi.responses import JSONResponse  # pyright: ignore[reportMissingImports]
from sse_starlette import EventSourceResponse  # pyright: ignore[reportMissingImports]
from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]
from starlette.types import ASGIApp, Receive, Scope, Send  # pyright: ignore[reportMissingImports]

import minimind_mcore
from minimind_mcore import web
from minimind_mcore.errors import UserError, shown
from minimind_mcore.manager import devices, events, options, request
from minimind_mcore.manager.events import Cursor, described
from minimind_mcore.manager.files import entry
from minimind_mcore.manager.plan import Planner
from minimind_mcore.manager.queue import Queue
from minimind_mcore.manager.record import ENDED, LOG, JobRecord
from minimind_mcore.manager.runner import typed
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.serve.api import add_page, read_json
from minimind_mcore.serve.protocol import RequestError

logger = logging.getLogger(__name__)
PAGE = web.page("manager")
Endpoint = Callable[[Request], Awaitable[Response]]
POLL_SECONDS = 0.3
MOST_ROWS = 2000  # rows of metrics in one reply
MOST_JOBS = 8  # jobs in one comparison
TAIL = 1000  # most lines of an older log that a client can ask for


def create_app(planner: Planner, token: str) -> ASGIApp:
    """Return the application.

    Args:
        planner: checks the requests of jobs, and has their queue.
        token: bearer token that clients must send.
    """
    from minimind_mcore.manager import ascend_api

    queue = planner.queue
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    add_page(app, PAGE)
    routes = {**_information(queue), **_jobs(queue, planner), **ascend_api.routes(queue, planner)}
    for name, endpoint in routes.items():
        method, path = name.split()
        app.add_api_route(path, endpoint, methods=[method])
    return Gate(app, token)


def _information(queue: Queue) -> dict[str, Endpoint]:
    """Return the endpoints about the manager, its devices, directories and forms, by method and path."""
    directories, hardware = queue.directories, queue.hardware

    async def info(asked: Request) -> Response:
        found = {"version": minimind_mcore.__version__, "device": hardware.kind, "devices": list(hardware.numbers)}
        found |= {"presets": list(PRESETS), "recipes": list(filter(None, get_args(request.Recipe)))}
        stages = {name: {"inputs": request.inputs(name)} for name in request.JOB_STAGES}
        return JSONResponse(found | {"stages": stages, "readable": list(map(str, directories.readable))})

    async def form(asked: Request) -> Response:
        stage, query = asked.path_params["stage"], asked.query_params
        body = {"stage": stage, "model": query.get("model", "minimind3"), "recipe": query.get("recipe", "")}
        wanted = request.read(body)
        model = request.model_of(wanted, directories)
        found = await asyncio.to_thread(options.options, stage, model, wanted.recipe)
        rows = [option.described() for option in found.values()]
        return JSONResponse({"stage": stage, "inputs": request.inputs(stage), "options": rows})

    def listing(name: str, rows: Callable[[], object]) -> dict[str, Endpoint]:
        async def reply(asked: Request) -> Response:
            return JSONResponse({name: await asyncio.to_thread(rows)})

        return {f"GET /api/{name}": reply}

    return {
        "GET /api/info": info, "GET /api/form/{stage}": form,
        **listing("devices", lambda: devices.table(hardware, queue.listed())),
        **listing("datasets", directories.datasets), **listing("checkpoints", directories.checkpoints),
        **listing("tokenizers", directories.tokenizers),
    }  # fmt: skip


def _jobs(queue: Queue, planner: Planner) -> dict[str, Endpoint]:
    """Return the endpoints about jobs, by method and path."""

    async def listed(asked: Request) -> Response:
        return JSONResponse({"jobs": [described(queue, job) for job in queue.listed()[::-1]]})

    async def plan(asked: Request) -> Response:
        found = await planner.plan(request.read(await read_json(asked)))
        return JSONResponse(dataclasses.asdict(found), 422 if found.error else 200)

    async def start(asked: Request) -> Response:
        wanted = request.read(await read_json(asked))
        found = await planner.plan(wanted)
        if wanted.dry_run or found.error:
            return JSONResponse(dataclasses.asdict(found), 422 if found.error else 200)
        return JSONResponse(described(queue, await asyncio.to_thread(queue.add, wanted)), 201)

    async def one(asked: Request) -> Response:
        job = job_of(queue, asked.path_params["id"])
        commands = [typed(command.words, command.settings) for command in job.commands]
        folder = await asyncio.to_thread(entry, queue.folder(job))
        return JSONResponse({**described(queue, job), "commands": commands, "folder": folder})

    async def delete(asked: Request) -> Response:
        job = job_of(queue, asked.path_params["id"])
        return JSONResponse({"deleted": await asyncio.to_thread(queue.delete, job)})

    def changing(change: Callable[[JobRecord], None]) -> Endpoint:
        async def changed(asked: Request) -> Response:
            job = job_of(queue, asked.path_params["id"])
            await asyncio.to_thread(change, job)
            return JSONResponse(described(queue, job))

        return changed

    async def stream(asked: Request) -> Response:
        return event_stream(queue, job_of(queue, asked.path_params["id"]), asked)

    async def metrics(asked: Request) -> Response:
        found = await asyncio.to_thread(events.metrics, queue, job_of(queue, asked.path_params["id"]), MOST_ROWS)
        return JSONResponse({"rows": found})

    async def samples(asked: Request) -> Response:
        found = await asyncio.to_thread(events.samples, queue, job_of(queue, asked.path_params["id"]), 40)
        return JSONResponse({"samples": found})

    async def compare(asked: Request) -> Response:
        names = asked.query_params.get("jobs", "").split(",")[:MOST_JOBS]
        found = {}
        for name in names:
            found[name] = await asyncio.to_thread(events.metrics, queue, job_of(queue, name), MOST_ROWS)
        return JSONResponse({"jobs": found})

    async def chat(asked: Request) -> Response:
        job = job_of(queue, asked.path_params["id"])
        wanted = await asyncio.to_thread(queue.chat_request, job)
        await planner.require(wanted)
        return JSONResponse(described(queue, await asyncio.to_thread(queue.add, wanted)), 201)

    return {
        "GET /api/jobs": listed, "POST /api/jobs": start, "POST /api/plan": plan, "GET /api/compare": compare,
        "GET /api/jobs/{id}": one, "DELETE /api/jobs/{id}": delete,
        "POST /api/jobs/{id}/stop": changing(queue.stop),
        "POST /api/jobs/{id}/kill": changing(queue.kill), "POST /api/jobs/{id}/resume": changing(queue.resume),
        "GET /api/jobs/{id}/events": stream, "GET /api/jobs/{id}/metrics": metrics,
        "GET /api/jobs/{id}/samples": samples, "POST /api/jobs/{id}/chat": chat,
    }  # fmt: skip


def job_of(queue: Queue, name: str) -> JobRecord:
    """Return the job of an id.

    Raises:
        HTTPException: the job does not exist.
    """
    job = queue.jobs.get(name)
    if job is None:
        raise HTTPException(404, f"the job {shown(name)} does not exist")
    return job


def event_stream(queue: Queue, job: JobRecord, asked: Request) -> Response:
    """Return the events of a job that a client does not have.

    The header Last-Event-ID says what the client has. Without it the query `tail` limits the log to its last lines. The
    server closes the stream after the last event of a job, because a browser opens at most six connections to a server.
    """
    last, tail = asked.headers.get("last-event-id", ""), asked.query_params.get("tail", "")
    cursor = Cursor.parse(last)
    if not last and tail.isdecimal():
        cursor = events.at_tail(queue.folder(job) / LOG, min(int(tail[:6]), TAIL))

    async def stream(cursor: Cursor) -> AsyncIterator[dict[str, str]]:
        while True:
            ended = job.state in ENDED
            found = await asyncio.to_thread(events.news, queue, job, cursor)
            for event in found:
                cursor = event.cursor
                yield {"event": event.kind, "id": str(cursor), "data": json.dumps(event.data, ensure_ascii=False)}
            if ended and not found:
                return
            await asyncio.sleep(0 if found else POLL_SECONDS)

    return EventSourceResponse(stream(cursor), ping=15, sep="\n")


def _error(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status)


async def _user_error(asked: Request, problem: Any) -> Response:
    return _error(str(problem), problem.status if isinstance(problem, RequestError) else 400)


async def _http_error(asked: Request, problem: Any) -> Response:
    wrong_path = problem.detail in ("Not Found", "Method Not Allowed")
    return _error(f"no {asked.method} at this address" if wrong_path else str(problem.detail), problem.status_code)


async def _unexpected(asked: Request, problem: Exception) -> Response:
    logger.error("a request failed", exc_info=problem)
    return _error("the manager failed; its log says where", 500)


class Gate:
    """Refuse requests without the token. Only the files of the page, which contain no data, need no token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        is_page = scope.get("path") in PAGE and scope.get("method") in ("GET", "HEAD")
        if scope["type"] == "http" and not is_page:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                refused = JSONResponse(
                    {"error": "the token is missing or wrong; send it as Authorization: Bearer TOKEN"},
                    401,
                    {"WWW-Authenticate": "Bearer"},
                )
                await refused(scope, receive, send)
                return
        await self.app(scope, receive, send)

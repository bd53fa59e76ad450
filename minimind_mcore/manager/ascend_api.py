"""The paths of minimind-ascend's manager, for its web panel: one job at a time, the one that runs.

Its tools are those of the kit's one registry, which also knows minimind-ascend's names of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import Request, Response  # pyright: ignore[reportMissingImports]
from fastapi.responses import JSONResponse  # pyright: ignore[reportMissingImports]
from sse_starlette import EventSourceResponse  # pyright: ignore[reportMissingImports]

from minimind_mcore import __version__
from minimind_mcore.errors import UserError, shown
from minimind_mcore.manager import devices, events, request
from minimind_mcore.manager.plan import Planner
from minimind_mcore.manager.queue import Queue
from minimind_mcore.manager.record import ENDED, LOG, JobRecord
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.pipeline.stages import RL, TRAININGS
from minimind_mcore.serve.api import in_slots, read_json
from minimind_mcore.tools.registry import BUILTIN, open_tools

STATES = {"queued": "running", "running": "running", "stopping": "running", "finished": "finished", "failed": "error"}
IDLE_SECONDS, POLL_SECONDS = 2.0, 0.3
FIELDS = {"epochs": "EPOCHS", "batch_size": "MBS", "learning_rate": "LR"}


def routes(queue: Queue, planner: Planner) -> dict[str, Any]:
    """Return the endpoints by method and path."""

    count = LineCounter()

    async def status(asked: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(_status, queue, _current(queue), count))

    async def weights(asked: Request) -> Response:
        return JSONResponse({"weights": await asyncio.to_thread(queue.directories.checkpoints)})

    async def start(asked: Request) -> Response:
        try:
            wanted = await asyncio.to_thread(_request, queue, await read_json(asked))
            found = await planner.require(wanted)
            await asyncio.to_thread(queue.add, wanted)
        except UserError as error:
            return JSONResponse({"ok": False, "error": str(error)})
        return JSONResponse({"ok": True, "command": found.commands[-1]})

    async def stop(asked: Request) -> Response:
        job = _current(queue)
        if job is None or job.state in ENDED:
            return JSONResponse({"ok": False, "error": "no training runs"})
        await asyncio.to_thread(queue.stop, job)
        return JSONResponse({"ok": True})

    async def logs(asked: Request) -> Response:
        return EventSourceResponse(_logs(queue, asked.headers.get("last-event-id", "")), ping=15, sep="\n")

    async def cards(asked: Request) -> Response:
        rows = await asyncio.to_thread(devices.table, queue.hardware, queue.listed())
        raw = await asyncio.to_thread(devices.printed, "npu-smi", "info") or "npu-smi is not installed on this host"
        found = [
            {"id": row["number"], "name": row["name"], "health": row["health"], "power": row["power"],
             "temp": row["temperature"]}
            for row in rows if row["kind"] == "npu"
        ]  # fmt: skip
        return JSONResponse({"raw": raw, "devices": found})

    return {
        "GET /api/status": status, "GET /api/weights": weights, "POST /api/train/start": start,
        "POST /api/train/stop": stop, "GET /api/train/logs": logs, "GET /api/npu": cards, **_tools(),
    }  # fmt: skip


def _current(queue: Queue) -> JobRecord | None:
    """Return the training that runs; of several, and if none runs, the newest."""
    found = [job for job in queue.listed() if job.request.stage in (*TRAININGS, *RL)]
    return max(found, key=lambda job: (job.state in ("running", "stopping"), job.created), default=None)


class LineCounter:
    """Counts the lines of a file that grows; each call reads only what is new."""

    def __init__(self) -> None:
        self._known = (0, 0, 0)  # inode, bytes, lines

    def __call__(self, log: Path) -> int:
        """Return the number of lines of a file; 0 if there is none."""
        if not log.is_file():
            return 0
        inode, size, lines = self._known
        with log.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != inode or found.st_size < size:
                size = lines = 0
            file.seek(size)
            while chunk := file.read(1 << 20):
                size += len(chunk)
                lines += chunk.count(b"\n")
        self._known = (found.st_ino, size, lines)
        return lines


def _status(queue: Queue, job: JobRecord | None, count: LineCounter) -> dict[str, object]:
    if job is None:
        return {"status": "idle", "stage": "", "error": "", "log_lines": 0, "elapsed_seconds": None}
    lines = count(queue.folder(job) / LOG)
    elapsed = int(time.time() - job.started) if job.state in ("running", "stopping") else None
    state = STATES.get(job.state, "idle")
    found: dict[str, object] = {"status": state, "stage": job.request.stage, "error": job.error}
    return found | {"log_lines": lines, "elapsed_seconds": elapsed}


def _request(queue: Queue, body: object) -> request.JobRequest:
    """Return minimind-ascend's request as one of the kit.

    Raises:
        UserError: a field is wrong.
    """
    if not isinstance(body, dict):
        raise UserError(f"the body is {shown(body)}; expected a JSON object with the field stage")
    wanted: dict[str, Any] = {"stage": body.get("stage"), "name": body.get("save_weight") or ""}
    settings = {ours: body[theirs] for theirs, ours in FIELDS.items() if body.get(theirs) is not None}
    if any(name in body for name in ("hidden_size", "num_hidden_layers", "use_moe")):
        wanted["model"] = _preset(body)
    if data := body.get("data_path"):
        wanted["data"] = _named(queue.directories.datasets(), "data_path", data)
    if weight := body.get("from_weight"):
        wanted["weights"] = _named(queue.directories.checkpoints(), "from_weight", weight)
    words = str(body.get("extra_args") or "").split()
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--"):
            raise UserError(f"extra_args: found {shown(name)}, expected flags such as --weight-decay 0.1")
        follows = not equals and bool(words) and not words[0].startswith("--")
        settings[name] = value if equals else words.pop(0) if follows else True
    return request.read(wanted | {"settings": settings})


def _preset(body: Mapping[str, object]) -> str:
    """Return the newest preset of minimind-ascend's sizes.

    Raises:
        UserError: there is none.
    """
    hidden, layers, moe = body.get("hidden_size", 512), body.get("num_hidden_layers", 8), bool(body.get("use_moe"))
    for name, config in PRESETS.items():
        if (config.hidden_size, config.num_layers, config.moe is not None) == (hidden, layers, moe):
            return name
    raise UserError(
        f"hidden_size {shown(hidden)}, num_hidden_layers {shown(layers)}, use_moe {moe}: no preset has these sizes; "
        f"the presets are {', '.join(PRESETS)}"
    )


def _named(rows: list[dict[str, object]], field: str, name: object) -> str:
    """Return the path of the file of a list that has a name, with or without its suffix, or a path."""
    for row in rows:
        path = str(row["path"])
        if name in (path, row["name"], str(row["name"]).rpartition(".")[0]) or path.endswith(f"/{name}/checkpoints"):
            return path
    raise UserError(f"{field}: found {shown(name)}, expected one of {', '.join(str(row['name']) for row in rows[:20])}")


async def _logs(queue: Queue, last: str) -> AsyncIterator[dict[str, str]]:
    """Yield the log of the current training, then its state; while there is none the state "idle"."""
    while (job := _current(queue)) is None:
        yield {"data": json.dumps({"type": "status", "data": "idle"})}
        await asyncio.sleep(IDLE_SECONDS)
    name, _, rest = last.partition("@")
    place, line = (int(part) if part.isdecimal() else 0 for part in [*rest.split("."), "", ""][:2])
    cursor = events.Cursor(log=place) if name == job.id else events.Cursor()
    skip = line if name == job.id else 0  # lines after `place` that the client has
    while True:
        ended = job.state in ENDED
        found = await asyncio.to_thread(events.news, queue, job, cursor)
        for event in found:
            lines = event.data["lines"] if event.kind == "log" else []
            assert isinstance(lines, list)
            for number, text in list(enumerate(lines, 1))[skip:]:
                data = json.dumps({"type": "log", "data": text}, ensure_ascii=False)
                yield {"id": f"{job.id}@{cursor.log}.{number}", "data": data}
            cursor, skip = event.cursor, 0 if event.kind == "log" else skip
        if ended and not found:
            yield {"data": json.dumps({"type": "status", "data": STATES.get(job.state, "idle")})}
            return
        await asyncio.sleep(0 if found else POLL_SECONDS)


def _tools() -> dict[str, Any]:
    """Return the endpoints of tools: shaped as JSON-RPC, with minimind-ascend's methods."""
    toolbox = open_tools(BUILTIN)
    run = in_slots(toolbox)

    def reply(result: object) -> Response:
        return JSONResponse({"jsonrpc": "2.0", "id": 1, "result": result})

    async def info(asked: Request) -> Response:
        about = {"name": "minimind-mcore", "version": __version__, "description": "MiniMind's built-in tools"}
        return reply(about | {"capabilities": {"tools": True}})

    async def listed(asked: Request) -> Response:
        functions = [definition["function"] for definition in toolbox.definitions]
        names = [
            {"name": f["name"], "description": f.get("description", ""), "inputSchema": f.get("parameters", {})}
            for f in functions if isinstance(f, Mapping)
        ]  # fmt: skip
        return reply({"tools": names})

    async def call(asked: Request) -> Response:
        body = await read_json(asked)
        if not isinstance(body, dict) or not isinstance(body.get("name"), str):
            raise UserError('the body has no name of a tool; expected {"name": ..., "arguments": {...}}')
        result = await run(body["name"], body.get("arguments", {}))
        return reply({"content": [{"type": "text", "text": result.text}], "isError": not result.ok})

    return {
        "GET /api/mcp/info": info, "GET /api/mcp/tools/list": listed, "POST /api/mcp/tools/call": call,
    }  # fmt: skip

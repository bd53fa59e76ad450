"""The web pages: the committed files are those of the sources, and the server gives them to everybody."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx  # pyright: ignore[reportMissingImports]
import pytest
from helpers.chat_stand_in import stand_in
from helpers.engine import ROOT
from helpers.serving import embedded, shrunk, vocabulary, write_served

from minimind_mcore import web
from minimind_mcore.errors import UserError
from minimind_mcore.manager import request
from minimind_mcore.pipeline import serving
from minimind_mcore.pipeline.stages import Run
from minimind_mcore.serve.api import create_app
from minimind_mcore.serve.engines import ServerOptions
from minimind_mcore.serve.service import Service
from minimind_mcore.tools.registry import open_tools

SOURCES = ROOT / "web"


def missing() -> str:
    """What a build of the pages lacks here, and what to do; "" if it lacks nothing."""
    if shutil.which("node") is None:
        return "the built pages are not compared with their sources: install Node.js 20 or later, with npm"
    if not (SOURCES / "node_modules/.package-lock.json").is_file():  # npm writes it last
        return "the built pages are not compared with their sources: run `npm ci --ignore-scripts` in web/"
    return ""


needs_node = pytest.mark.skipif(bool(missing()), reason=missing())


def node(*words: str) -> None:
    """Run a program of Node.js in web/."""
    done = subprocess.run(["node", *words], cwd=SOURCES, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_node
def test_the_built_files_are_those_of_the_sources(tmp_path: Path) -> None:
    node("build.mjs", str(tmp_path))
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    widgets = [ROOT / "docs/figures" / name for name in ("learn.js", "learn.css")]
    files = [file for file in web.FOLDER.iterdir() if file.suffix not in (".py", "")] + widgets
    committed = {file.name: file.read_bytes() for file in files}
    assert made.keys() == committed.keys()
    assert not [name for name in made if made[name] != committed[name]], "run `npm run build` in web/ and commit"


@needs_node
def test_the_sources_have_no_type_errors() -> None:
    node("node_modules/typescript/bin/tsc", "--noEmit")


def test_the_lock_file_names_no_registry() -> None:
    lock = (SOURCES / "package-lock.json").read_text(encoding="utf-8")
    assert '"integrity"' in lock and '"resolved"' not in lock


def ask_server(
    *requests: tuple[str, str, Any],
    key: str = "secret",
    headers: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
) -> list[httpx.Response]:
    """The replies of a server with the key "secret" and no model."""

    async def ask() -> list[httpx.Response]:
        fields = {"host": "127.0.0.1", "port": 0, "name": "minimind", "api_key": "secret"} | (options or {})
        app = create_app(Service(ServerOptions(**fields)))
        transport = httpx.ASGITransport(app)
        sent = {"Authorization": f"Bearer {key}"} | (headers or {})
        async with httpx.AsyncClient(transport=transport, base_url="http://server", headers=sent) as client:
            return [await client.request(method, path, json=body) for method, path, body in requests]

    return asyncio.run(ask())


def test_the_server_gives_the_page_without_the_key() -> None:
    paths = ("/", "/chat.js", "/chat.css", "/v1/models", "/tools", "/tools/call")
    page, script, style, *others = ask_server(*(("GET", path, None) for path in paths), key="")
    assert [reply.status_code for reply in others] == [401, 401, 401]
    for reply, kind in ((page, "text/html"), (script, "text/javascript"), (style, "text/css")):
        assert reply.status_code == 200 and reply.headers["content-type"].startswith(kind)
        assert reply.headers["x-content-type-options"] == "nosniff"
    policy = page.headers["content-security-policy"]
    assert "script-src 'self';" in policy and "unsafe" not in policy and "default-src 'none'" in policy
    assert 'src="chat.js"' in page.text and 'href="chat.css"' in page.text and "<script>" not in page.text


def test_the_server_runs_built_in_tools() -> None:
    bodies: list[Any] = [
        {"name": "calculate_math", "arguments": {"expression": "256*37"}},
        {"name": "calculate_math", "arguments": {"expression": "__import__('os').getpid()"}},
        {"name": "os:system", "arguments": {"command": "true"}},
        {"name": "calculate_math", "arguments": "256*37"},
        {"arguments": {}},
        ["calculate_math"],
    ]
    listed, right, hostile, unknown, *wrong = ask_server(
        ("GET", "/tools", None), *(("POST", "/tools/call", body) for body in bodies)
    )
    assert listed.json()["tools"] == open_tools("builtin").definitions
    assert right.json() == {"text": '{"result": "9472"}', "ok": True}
    assert not hostile.json()["ok"] and not unknown.json()["ok"]
    assert "there is no tool 'os:system'" in unknown.json()["text"]
    assert [reply.status_code for reply in wrong] == [400, 400, 400]


CALL = ("POST", "/tools/call", {"name": "calculate_math", "arguments": {"expression": "256*37"}})
EVIL = "http://evil.example"


@pytest.mark.parametrize(
    ("headers", "options", "status"),
    [
        ({"Host": "127.0.0.1:8998"}, {}, 200),
        ({"Host": "localhost:8998"}, {}, 200),
        ({"Host": "[::1]:8998"}, {"host": "::1"}, 200),
        ({"Host": "localhost:8998", "Origin": "http://localhost:8998"}, {}, 200),
        ({"Host": "evil.example:8998"}, {}, 403),  # DNS rebinding
        ({"Host": "evil.example:8998", "Origin": f"{EVIL}:8998"}, {}, 403),
        ({"Host": "127.0.0.1.evil.example"}, {}, 403),
        ({"Host": "[::1"}, {}, 403),
        ({"Host": "127.0.0.1:8998", "Origin": EVIL}, {}, 403),  # a page of another site
        ({"Host": "127.0.0.1:8998", "Origin": "http://127.0.0.1:3000"}, {}, 403),  # another server's page
        ({"Host": "127.0.0.1:8998", "Origin": "null"}, {}, 403),  # a file, or a frame without an origin
        ({"Host": "127.0.0.1:8998", "Origin": EVIL}, {"cors_origins": (EVIL,)}, 200),
        ({"Host": "evil.example", "Origin": "https://evil.example"}, {"cors_origins": (EVIL,)}, 200),  # a proxy
        ({"Host": "evil.example", "Origin": EVIL}, {"cors_origins": ("*",)}, 200),
        ({"Host": "evil.example", "Origin": EVIL}, {"api_key": "secret"}, 200),  # the key says enough
        ({"Host": "gpu.example"}, {"api_key": "secret", "host": "0.0.0.0"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(headers: dict[str, str], options: dict[str, Any], status: int) -> None:
    content = {"Content-Type": "text/plain"} if "Origin" in headers else {}  # which a browser sends without asking
    requests = (CALL, ("GET", "/v1/models", None), ("GET", "/", None), ("GET", "/health", None))
    call, *others, health = ask_server(*requests, headers=headers | content, options={"api_key": None} | options)
    assert [call.status_code, *(reply.status_code == 403 for reply in others)] == [status, status == 403, status == 403]
    assert health.status_code == 503  # for load balancers, whatever they call the server
    if status == 403:
        assert next(iter(headers.values()))[:5] in call.json()["error"]["message"] or "Origin" in headers
        assert "9472" not in call.text


@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.1.5", "::"])
def test_strangers_on_the_network_run_no_tools(address: str) -> None:
    requests = (CALL, ("GET", "/tools", None), ("GET", "/v1/models", None))
    call, tools, models = ask_server(
        *requests, headers={"Host": "192.168.1.5:8998"}, options={"host": address, "api_key": None}
    )
    assert call.status_code == 403 and "API_KEY" in call.json()["error"]["message"]
    assert tools.json() == {"tools": []} and models.status_code == 503  # the answers themselves are for all


def test_the_stage_web_prints_the_address_of_the_page(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_served(tmp_path / "model", shrunk("minimind3", vocabulary(tokenizer)), tokenizer)
    with embedded(model) as (address, _), stand_in() as other:
        for server in (address, other.address):
            serving.page(cast(Run, SimpleNamespace(port=int(server.rpartition(":")[2]))))
        shown = capsys.readouterr().out
    assert f"chat page   {address}/\n" in shown and f"open its page with ?api={other.address}\n" in shown


def test_wrong_fields_are_named_in_the_words_of_the_manager() -> None:
    for value, found in ({"a": 1}, "{'a': 1}"), (["x" * 99], "['xxxxxx"):
        [reply] = ask_server(("POST", "/tools/call", {"name": value}))
        message = reply.json()["error"]["message"]
        with pytest.raises(UserError) as refused:
            request.read({"stage": value})
        assert message.replace("name: ", "stage: ") == str(refused.value)
        assert message.startswith(f"name: Input should be a valid string; found {found}") and len(message) < 150

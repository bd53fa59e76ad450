"""The web pages: the committed files are those of the sources, and the server gives them to everybody."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import httpx  # pyright: ignore[reportMissingImports]
import pytest
from helpers.engine import ROOT

from minimind_mcore import web
from minimind_mcore.serve.api import create_app
from minimind_mcore.serve.engines import ServerOptions
from minimind_mcore.serve.service import Service

SOURCES = ROOT / "web"
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (SOURCES / "node_modules").is_dir(),
    reason="the packages of the pages are not installed: run `npm ci --ignore-scripts` in web/ (Node.js 20 or later)",
)


def node(*words: str) -> None:
    """Run a program of Node.js in web/."""
    done = subprocess.run(["node", *words], cwd=SOURCES, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_node
def test_the_built_files_are_those_of_the_sources(tmp_path: Path) -> None:
    node("build.mjs", str(tmp_path))
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    committed = {file.name: file.read_bytes() for file in web.FOLDER.iterdir() if file.suffix not in (".py", "")}
    assert made.keys() == committed.keys()
    assert not [name for name in made if made[name] != committed[name]], "run `npm run build` in web/ and commit"


@needs_node
def test_the_sources_have_no_type_errors() -> None:
    node("node_modules/typescript/bin/tsc", "--noEmit")


def test_the_lock_file_names_no_registry() -> None:
    lock = (SOURCES / "package-lock.json").read_text(encoding="utf-8")
    assert '"integrity"' in lock and '"resolved"' not in lock


async def replies(*requests: tuple[str, str]) -> list[httpx.Response]:
    """The replies of a server with a key and no model, without the key."""
    app = create_app(Service(ServerOptions(host="127.0.0.1", port=0, name="minimind", api_key="secret")), "secret")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        return [await client.request(method, path) for method, path in requests]


async def page_and_others() -> None:
    page, script, style, models = await replies(
        ("GET", "/"), ("GET", "/chat.js"), ("GET", "/chat.css"), ("GET", "/v1/models")
    )
    assert models.status_code == 401
    for reply, kind in ((page, "text/html"), (script, "text/javascript"), (style, "text/css")):
        assert reply.status_code == 200 and reply.headers["content-type"].startswith(kind)
        assert reply.headers["x-content-type-options"] == "nosniff"
    policy = page.headers["content-security-policy"]
    assert "script-src 'self';" in policy and "unsafe" not in policy and "default-src 'none'" in policy
    assert 'src="chat.js"' in page.text and 'href="chat.css"' in page.text and "<script>" not in page.text


def test_the_server_gives_the_page_without_the_key() -> None:
    asyncio.run(page_and_others())

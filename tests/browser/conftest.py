"""Headless Chromium for the tests of the web pages."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.engine import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
AXE = ROOT / "web/node_modules/axe-core/axe.min.js"
SERIOUS = ("serious", "critical")


# Not for the session: playwright's event loop would be in the way of later tests that have their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium of the system; skips where it or playwright is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    api.expect.set_options(timeout=20_000)  # the default of 5 s is short on a busy machine
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


class Errors(list[str]):
    """What the console and the scripts of a test's pages have complained about."""

    def watch(self, page: Page) -> None:
        page.on("console", lambda message: self.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.append(str(error)))


@pytest.fixture
def errors() -> Iterator[Errors]:
    """The errors of the test's pages, of which there must be none at its end."""
    found = Errors()
    yield found
    assert found == []


@pytest.fixture
def new_page(browser: Browser, errors: Errors) -> Iterator[Callable[..., Page]]:
    """Open an address in a browser context of its own."""
    contexts: list[BrowserContext] = []

    def open_page(address: str, **options: Any) -> Page:
        context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1200, "height": 800}} | options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        errors.watch(page)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def accessible() -> Callable[..., None]:
    """Check a page, or the part of it with a selector, with axe-core; skips where it is missing."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: run `npm ci --ignore-scripts` in web/")

    def check(page: Page, part: str = "html") -> None:
        page.evaluate(AXE.read_text(encoding="utf-8"))
        violations = page.evaluate("async part => (await axe.run(part)).violations", part)
        found = [
            (rule["id"], rule["help"], [node["html"][:200] for node in rule["nodes"]])
            for rule in violations
            if rule["impact"] in SERIOUS
        ]
        assert found == [], json.dumps(found, indent=1)

    return check


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def site(built_site: Path) -> Iterator[str]:
    """The address of the built site. From files it works too, but the search shows no excerpts."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(built_site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

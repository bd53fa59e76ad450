"""The documentation site in a real browser: pages, the other language, search."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from helpers.site import build, needs_sphinx

if TYPE_CHECKING:
    from playwright.sync_api import Page

    NewPage = Callable[..., Page]

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
pytestmark = needs_sphinx


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the built site. From files it works too, but the search shows no excerpts."""
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stderr
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(out))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("page", ["start", "rl", "flags"])
def test_a_page_and_its_counterpart(page: str, site: str, new_page: NewPage) -> None:
    opened = new_page(f"{site}/en/{page}.html")
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.reload()
    english = opened.locator("h1").inner_text()
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    opened.locator("header").get_by_role("link", name="中文").click()
    expect(opened).to_have_url(f"{site}/zh/{page}.html")
    assert opened.locator("h1").inner_text() != english
    opened.locator("header").get_by_role("link", name="English").click()
    expect(opened).to_have_url(f"{site}/en/{page}.html")
    assert asked and all(url.startswith((site, "data:")) for url in asked), asked


@pytest.mark.parametrize(
    ("language", "query", "title"), [("en", "pipeline bubble", "Forecast"), ("zh", "参考模型的权重", "奖励与算法")]
)
def test_the_search_finds_a_page(language: str, query: str, title: str, site: str, new_page: NewPage) -> None:
    page = new_page(f"{site}/{language}/search.html?q={query}")
    expect(page.locator("#search-results a").filter(has_text=title).first).to_be_visible()


@pytest.mark.parametrize(("locale", "language"), [("en-US", "en"), ("zh-CN", "zh")])
def test_the_first_page_is_in_the_reader_s_language(locale: str, language: str, site: str, new_page: NewPage) -> None:
    expect(new_page(f"{site}/index.html", locale=locale)).to_have_url(f"{site}/{language}/index.html")

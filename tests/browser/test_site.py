"""The documentation site in a real browser: pages, the other language, search."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from helpers.pages import english_pages
from helpers.site import needs_sphinx

if TYPE_CHECKING:
    from playwright.sync_api import Page

    NewPage = Callable[..., Page]

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
pytestmark = needs_sphinx
PAGES = sorted(page.stem for page in english_pages() if page.stem != "README")


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


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_page_opens(language: str, site: str, new_page: NewPage) -> None:
    """Without an error, a request to another host, or a page that is wider than a phone."""
    page = new_page("about:blank", viewport={"width": 390, "height": 800})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for name in PAGES:
        response = page.goto(f"{site}/{language}/{name}.html")
        assert response is not None and response.status == 200, name
        assert page.locator("article h1").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
    assert len(asked) > len(PAGES) and all(url.startswith((site, "data:")) for url in asked), asked

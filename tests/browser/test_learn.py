"""The chapters in a real browser: every figure can be used, in both languages, without an error or another host."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.engine import ROOT
from helpers.site import needs_sphinx
from tokenizers import Tokenizer, models, pre_tokenizers

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    NewPage = Callable[..., Page]

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
pytestmark = needs_sphinx
CHAPTERS = sorted(page.stem for page in (ROOT / "docs").glob("learn_*.md") if not page.stem.endswith("_zh"))


def use(figure: Locator) -> None:
    """Move every slider with the keyboard, choose the last entry of every list, press every kind of button."""
    for slider in figure.locator("input[type=range]").all():
        slider.press("End")
        slider.press("ArrowLeft")
    for count in range(figure.locator("select").count()):
        options = figure.locator("select").nth(count).locator("option").all()
        figure.locator("select").nth(count).select_option(index=len(options) - 1)
    if buttons := figure.locator("button").all():
        buttons[-1].focus()
        buttons[-1].press("Enter")


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter(chapter: str, language: str, site: str, new_page: NewPage, accessible: Callable[..., None]) -> None:
    dark = {"color_scheme": "dark", "viewport": {"width": 390, "height": 800}} if language == "zh" else {}
    page = new_page("about:blank", **dark)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{site}/{language}/{chapter}.html")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for figure in page.locator(".figure-widget").all():
        before = figure.inner_html()
        use(figure)
        expect(figure).to_be_visible()
        assert figure.inner_html() != before
        text = figure.inner_text()
        assert "NaN" not in text and "undefined" not in text, text
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for question in page.locator("article details:not(.excerpt) > summary").all():
        question.click()
    assert page.locator("article details:not(.excerpt)[open]").count() >= 2
    assert asked and all(url.startswith((site, "data:")) for url in asked), asked
    accessible(page, "article")


def test_the_ids_are_those_of_the_tokenizer(site: str, new_page: NewPage) -> None:
    """The examples of the figure have the ids of the tokenizers library."""
    page = new_page(f"{site}/en/learn_tokenizer.html")
    figure = json.loads((ROOT / "docs/figures/tokenizer.json").read_text(encoding="utf-8"))
    for example in figure["examples"]:
        page.get_by_label("Text", exact=True).fill(example["text"])
        ids = " ".join(map(str, example["ids"]))
        expect(page.locator(".ids")).to_have_attribute("data-ids", ids)


def test_another_tokenizer_and_back(site: str, new_page: NewPage, tmp_path: Path) -> None:
    """A tokenizer without merges gives bytes. The text stays."""
    page = new_page(f"{site}/en/learn_tokenizer.html")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    content: dict[str, object] = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": {character: i for i, character in enumerate(alphabet)}, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    content["pre_tokenizer"] = {"type": "Digits"}
    (tmp_path / "broken.json").write_text(json.dumps(content), encoding="utf-8")
    text = page.get_by_label("Text", exact=True)
    text.fill("user 12")
    ids = page.locator(".ids")
    own = str(ids.get_attribute("data-ids"))
    page.get_by_label("Another tokenizer.json").set_input_files(tmp_path / "tokenizer.json")
    expect(ids).to_have_attribute("data-ids", " ".join(str(alphabet.index(one)) for one in "userĠ12"))
    page.get_by_label("Another tokenizer.json").set_input_files(tmp_path / "broken.json")
    expect(page.get_by_role("alert")).to_contain_text("does not support pre_tokenizer Digits at the end")
    page.get_by_role("button", name="Back to the page's own tokenizer").click()
    expect(ids).to_have_attribute("data-ids", own)
    expect(text).to_have_value("user 12")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_long_piece(site: str, new_page: NewPage) -> None:
    """5,000 equal signs are one piece. The steps of its merges would be 12 million symbols."""
    page = new_page(f"{site}/en/learn_tokenizer.html")
    figure = json.loads((ROOT / "docs/figures/tokenizer.json").read_text(encoding="utf-8"))
    listed = [*figure["added"], *sorted(pre_tokenizers.ByteLevel.alphabet())]
    listed += [pair.replace(" ", "") for pair in figure["merges"]]
    merges = [tuple(pair.split(" ")) for pair in figure["merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(listed)}, merges))  # type: ignore[arg-type]
    page.set_default_timeout(10_000)
    page.get_by_label("Text", exact=True).fill("=" * 5000)
    ids = " ".join(map(str, backend.encode("=" * 5000).ids))
    expect(page.locator(".ids")).to_have_attribute("data-ids", ids, timeout=10_000)
    expect(page.locator(".detail").first).to_contain_text("more than 100 bytes")
    page.get_by_label("Text", exact=True).fill("tokenization")
    assert page.locator(".detail ol li").count() > 2

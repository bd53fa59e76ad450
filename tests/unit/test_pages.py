"""Each page exists in English and Chinese, with the same headings, commands, tables, pictures and numbers."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.pages import Content, content, counterpart, english_pages

PAGES = english_pages()


def test_every_page_has_a_counterpart() -> None:
    docs = PAGES[1].parent
    assert {page.name for page in docs.glob("*_zh.md")} == {counterpart(page).name for page in PAGES[1:]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_both_languages_have_the_same_content(page: Path) -> None:
    english, chinese = content(page), content(counterpart(page))
    for field in fields(Content):
        left, right = getattr(english, field.name), getattr(chinese, field.name)
        if isinstance(left, frozenset):
            assert left == right, f"{page.name} {field.name}: only English {left - right}, only Chinese {right - left}"
            continue
        for one, other in zip(left, right, strict=False):
            assert one == other, f"{page.name} {field.name}"
        assert len(left) == len(right), f"{page.name} {field.name}: {len(left)} in English, {len(right)} in Chinese"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_links_to_its_own_language(page: Path) -> None:
    """The only link to the other language is the one at the top, to the counterpart."""
    links = re.compile(r"\]\((?:docs/|\.\./)?(\w+)\.md\b")
    other = counterpart(page)
    english, chinese = (links.findall(p.read_text(encoding="utf-8")) for p in (page, other))
    assert [name for name in english if name.endswith("_zh")] == [other.stem]
    translated = {p.stem for p in PAGES}
    assert [name for name in chinese if name in translated] == [page.stem]
    assert {name.removesuffix("_zh") for name in english} == {name.removesuffix("_zh") for name in chinese}

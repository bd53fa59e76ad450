"""The documentation site: one build for each SITE_LANGUAGE, en or zh. docs/build.sh runs both.

A Chinese page is PAGE_zh.md next to PAGE.md. Its document name is PAGE in both builds, so that a page has the same
address under en/ and zh/. The pages are also read on the repository's website, so they hold no directives of Sphinx
except those of chapters.py: the links of index.md and of the pages that it names make the navigation.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.search.en import SearchEnglish

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # for chapters.py and messages.py
CHINESE = os.environ.get("SITE_LANGUAGE") == "zh"
SUFFIX = "_zh.md" if CHINESE else ".md"

project = "MiniMind on Megatron"
author = copyright = "MiniMind on Megatron"
language = "zh_CN" if CHINESE else "en"
extensions = ["myst_parser", "sphinx_copybutton", "chapters"]
source_suffix = {SUFFIX: "markdown"}
include_patterns = ["*_zh.md"] if CHINESE else ["*.md"]
exclude_patterns = [] if CHINESE else ["*_zh.md"]
myst_heading_anchors = 4  # as on the repository's website
html_theme = "pydata_sphinx_theme"
html_title = project
html_favicon = "images/icon.svg"
html_show_sourcelink = False
html_sidebars = {"**": ["sidebar-nav-bs"], "index": [], "start": []}
html_static_path = ["images", "figures"]
templates_path = ["templates"]
html_theme_options = {
    "navbar_end": ["language", "theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
}
html_context = {"chinese": CHINESE, "default_mode": "auto"}


def links(page: str) -> list[str]:
    """Return the names of the pages that a page links to, in order."""
    text = (DOCS / f"{page}{SUFFIX}").read_text(encoding="utf-8")
    names = re.findall(rf"\]\((\w+?){re.escape(SUFFIX)}\)", text)
    return [name for name in dict.fromkeys(names) if not name.endswith("_zh")]


def navigation() -> dict[str, list[str]]:
    """Return the pages below index and below each page that index names. A page has one place, the first one."""
    sections = links("index")
    placed = {"index", *sections}
    found = {"index": sections}
    # Contribute and Reference before Learn, which also links to their pages.
    for section in sorted(sections, key=["start", "guides", "contribute", "reference", "learn"].index):
        found[section] = [] if section == "start" else [name for name in links(section) if name not in placed]
        placed.update(found[section])
    return found


def read(app: Sphinx, page: str, source: list[str]) -> None:
    """Leave out the link to the other language, which the header has; name pages by titles; add the navigation.

    A line break between two Chinese characters would be shown as a blank, so the lines are joined.
    """
    text = re.sub(r" ?\[(?:English|中文)\]\(\w+\.md\)", "", source[0], count=1)
    text = re.sub(r"\[\w+\.md\](?=\(\w+\.md)", "[]", text)  # MyST shows the title of the page or the heading
    text = re.sub(r"(?<=[\u4e00-\u9fff，。；：、）]) *\n {0,3}(?=[\u4e00-\u9fff（“])", "", text)
    if page == "errors":
        import messages

        text += "\n" + messages.render("zh" if CHINESE else "en")
    if below := navigation().get(page):
        text += "\n```{toctree}\n:hidden:\n\n" + "\n".join(below) + "\n```\n"
    source[0] = text


class BothLanguages(SearchEnglish):
    """Search that splits Chinese into pairs of characters, at build time and in the browser.

    Sphinx's own Chinese search splits the pages into words and the query at blanks, so that a query of two words
    without a blank finds nothing. Pairs need no dictionary, and a query finds what contains all its pairs.
    """

    lang = "zh" if CHINESE else "en"
    js_splitter_code = r"""
function splitQuery(query) {
  return query.match(/[\u4e00-\u9fff]+|(?:(?![\u4e00-\u9fff])[\p{L}\p{N}_])+/gu)?.flatMap(word =>
    /[\u4e00-\u9fff]/.test(word) && word.length > 2
      ? Array.from({length: word.length - 1}, (_, i) => word.slice(i, i + 2)) : [word]) ?? [];
}
"""

    def split(self, input: str) -> list[str]:
        words: list[str] = []
        for word in re.findall(r"[\u4e00-\u9fff]+|[^\W\u4e00-\u9fff]+", input):
            chinese = "\u4e00" <= word[0] <= "\u9fff" and len(word) > 2
            words += [word[i : i + 2] for i in range(len(word) - 1)] if chinese else [word]
        return words


def setup(app: Sphinx) -> None:
    """Register the search and the changes to the pages."""
    app.add_search_language(BothLanguages)
    app.connect("source-read", read)

"""The documentation site: both languages build without a warning, have the same pages, and need no other host."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.engine import ROOT
from helpers.pages import english_pages
from helpers.site import build, needs_sphinx

pytestmark = needs_sphinx
# What a browser does at a query: the built index, and the built function that splits the query.
SEARCH = """
const fs = require("fs"), vm = require("vm");
globalThis.window = globalThis;
globalThis.Search = {setIndex: index => { globalThis.index = index; }};
const [folder, ...queries] = process.argv.slice(1);
for (const file of ["_static/language_data.js", "searchindex.js"])
  vm.runInThisContext(fs.readFileSync(`${folder}/${file}`, "utf8"));
const stemmer = new Stemmer();
const pages = term => new Set([index.terms[term] ?? [], index.titleterms[term] ?? []].flat());
console.log(JSON.stringify(queries.map(query => {
  const hits = splitQuery(query).map(word => pages(stemmer.stemWord(word.toLowerCase())));
  return index.docnames.filter((_, number) => hits.every(hit => hit.has(number)));
})));
"""


@pytest.fixture
def site(built_site: Path) -> Path:
    return built_site


def test_both_languages_have_every_page(site: Path) -> None:
    names = {page.stem for page in english_pages() if page.parent.name == "docs"}
    for language in ("en", "zh"):
        found = {page.stem for page in (site / language).glob("*.html")}
        assert found == names | {"search", "genindex"}
    text = (site / "zh/plan.html").read_text(encoding="utf-8")
    assert '<html lang="zh-CN"' in text and 'href="./../en/plan.html"' in text and "预测内存与时间" in text
    assert 'href="./../zh/plan.html"' in (site / "en/plan.html").read_text(encoding="utf-8")
    assert {"en/index.html", "zh/index.html"} <= set(re.findall(r'href="([^"]+)"', (site / "index.html").read_text()))


def test_chinese_has_no_blank_where_a_source_line_ends(site: Path) -> None:
    broken = re.compile(r"[\u4e00-\u9fff，。；：、）] *\n *[\u4e00-\u9fff（“]")
    for page in (site / "zh").glob("*.html"):
        for paragraph in re.findall(r"<(?:p|li)>(.*?)</", page.read_text(encoding="utf-8"), re.S):
            assert not broken.search(paragraph), f"{page.name}: {paragraph}"


def test_every_page_is_in_the_navigation(site: Path) -> None:
    sections = ("start", "guides", "learn", "reference", "contribute")
    for language in ("en", "zh"):
        text = (site / language / "index.html").read_text(encoding="utf-8")
        header = text[text.index("bd-header") : text.index("</header>")]
        assert re.findall(r'class="nav-link nav-internal" href="(\w+)\.html"', header)[: len(sections)] == list(
            sections
        )


def test_the_pages_load_nothing_from_another_host(site: Path) -> None:
    loaded = re.compile(r'<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]*)"')
    assert [found for page in site.rglob("*.html") for found in loaded.findall(page.read_text(encoding="utf-8"))] == []
    asked = re.compile(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]*)")
    assert [found for sheet in site.rglob("*.css") for found in asked.findall(sheet.read_text(encoding="utf-8"))] == []


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the search's JavaScript: there is no node")
def test_the_search_finds_words_of_both_languages(site: Path) -> None:
    def found(language: str, *queries: str) -> list[list[str]]:
        command = ["node", "-e", SEARCH, str(site / language), *queries]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return list(json.loads(done.stdout))

    pipeline, joined, mixed, nothing = found("zh", "流水线", "参考模型的权重", "DPO偏好", "量子纠缠")
    assert "plan" in pipeline and "benchmarks" not in pipeline
    assert "rewards" in joined and "posttrain" in mixed and nothing == []
    english, unknown = found("en", "pipeline bubbles", "entanglement")
    assert "plan" in english and unknown == []


def test_a_broken_link_anchor_excerpt_or_figure_ends_the_build(tmp_path: Path) -> None:
    root = tmp_path / "kit"
    shutil.copytree(ROOT / "docs", root / "docs")
    (root / "minimind_mcore").symlink_to(ROOT / "minimind_mcore")  # for the excerpts of source code
    for name in ("plan.md", "plan_zh.md"):
        with (root / "docs" / name).open("a", encoding="utf-8") as file:
            file.write("\n[one](pretrain.md#no-such-heading)\n[two](no_such_page.md)\n")
            file.write("\n```{excerpt}\nmodels.moe:no_such_function\n```\n\n```{widget} no_such_figure\n```\n")
    done = build(tmp_path / "out", root)
    assert done.returncode != 0
    wrong = ("no-such-heading", "no_such_page", "moe.py has no no_such_function", "there is no no_such_figure.json")
    assert not [name for name in wrong if name not in done.stderr], done.stderr

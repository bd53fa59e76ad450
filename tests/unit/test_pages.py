"""Each page exists in English and Chinese, with the same headings, commands, tables, pictures and numbers."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import pages
from helpers.engine import ROOT
from helpers.pages import Content, commands, content, counterpart, english_pages

from minimind_mcore.cli import COMMANDS, PROGRAMS

PAGES = english_pages()
NAMES = json.loads((ROOT / "tests/contract/names.json").read_text(encoding="utf-8"))
LISTED = [*NAMES["settings"].values(), *NAMES["documented settings"].values()]
# CARDS is a setting of docker/run_ascend.sh.
OTHERS = {"PYTHONPATH", "MINDSPEED_RL_HOME", "CARDS"}
SETTINGS = {name for lines in LISTED for name in " ".join(lines).split()} | OTHERS


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


FOLDERS = r"(?:examples|docker|benchmarks|configs|tests|minimind_mcore|requirements|docs|rehearsal|\.github)"
# These pages also name files of other kits, or files that the reader makes.
OF_OTHERS = ("extending", "from_mindspeed", "install_ascend")
NOT_FILES = ("NAME", "configs/envs/runtime_env.yaml")  # the second is MindSpeed-RL's


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in OF_OTHERS], ids=lambda page: page.stem)
def test_files_commands_and_settings_on_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = set(re.findall(rf"(?<![\w/.-])({FOLDERS}/[\w./-]*\w)(?![\w{{])", text))
    missing = {name for name in files if not (ROOT / name).exists()}
    assert {name for name in missing if not any(other in name for other in NOT_FILES)} == set()
    named = set(re.findall(r"(?:minimind-mcore|minimind_mcore\.cli) ([a-z][\w-]*(?:\.py)?)", text))
    assert named <= {*COMMANDS, *PROGRAMS}
    given = {name for command in commands(page) for name in re.findall(r"(?:^|\s)([A-Z][A-Z_]+)=", command)}
    assert given <= SETTINGS


def test_pages_whose_counterpart_changed_later_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits: the second one changes an English page and a Chinese one."""

    def git(*words: str, second: int = 0) -> None:
        moment = {"GIT_AUTHOR_DATE": f"@{10**9 + second} +0000", "GIT_COMMITTER_DATE": f"@{10**9 + second} +0000"}
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *name, *words], cwd=tmp_path, env=os.environ | moment, check=True, capture_output=True)

    (tmp_path / "docs").mkdir()
    files = [tmp_path / name for name in ("README.md", "docs/rl.md", "docs/serve.md")]
    for file in files:
        file.write_text("one")
        counterpart(file).write_text("one")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.changed_later() == []
    files[0].write_text("two")
    counterpart(files[2]).write_text("two")
    git("commit", "-am", "two", second=60)
    assert pages.changed_later() == [(counterpart(files[0]), files[0]), (files[2], counterpart(files[2]))]

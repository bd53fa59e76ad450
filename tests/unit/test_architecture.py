"""docs/architecture.md is true: the names in it exist, and the picture shows its list of layers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers.engine import ROOT
from helpers.layers import PICTURE, layers, picture

PAGES = (ROOT / "docs/architecture.md", ROOT / "docs/architecture_zh.md")


def names(page: Path) -> set[str]:
    """Names such as `training/step.py:train_step` or `rl/runtime/`."""
    return set(re.findall(r"`([\w./]+(?:\.py(?::\w+)?|/))`", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_names_of_the_page_exist(page: Path) -> None:
    found = names(page)
    assert len(found) > 40
    for name in found:
        file, _, symbol = name.partition(":")
        place = next((top / file for top in (ROOT / "minimind_mcore", ROOT) if (top / file).exists()), None)
        assert place is not None, f"{page.name}: there is no {file}"
        if symbol:
            defined = {getattr(node, "name", None) for node in ast.parse(place.read_text(encoding="utf-8")).body}
            assert symbol in defined, f"{page.name}: {file} has no {symbol}"


def test_both_languages_name_the_same() -> None:
    english, chinese = map(names, PAGES)
    assert english == chinese
    assert [packages for _, packages in layers(PAGES[0])] == [packages for _, packages in layers(PAGES[1])]


def test_the_picture_shows_the_layers() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "PYTHONPATH=tests python -m helpers.layers draws it again"

"""The reference is what the code says.

After a change write its pages again: PYTHONPATH=tests python -m helpers.reference
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator

import pytest
from helpers.engine import ROOT
from helpers.reference import PAGES, file_name, render

SOURCE = ROOT / "minimind_mcore"


@pytest.mark.parametrize("chinese", [False, True], ids=["en", "zh"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_the_code_says(page: str, chinese: bool) -> None:
    found = (ROOT / "docs" / file_name(page, chinese)).read_text(encoding="utf-8")
    assert found == render(page, chinese), "write the pages again: PYTHONPATH=tests python -m helpers.reference"


def strings(path: str, *functions: str) -> Iterator[str]:
    """The strings in functions of a file, or in the whole file; docstrings have white space and do not count."""
    tree = ast.parse((SOURCE / path).read_text(encoding="utf-8"))
    chosen = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in functions]
    for node in ast.walk(ast.Module([*chosen], []) if functions else tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w/]+", node.value):
            yield node.value


def test_the_page_of_metrics_has_every_metric() -> None:
    """Names that the code writes, without those that it forms from a name, a phase or a reason."""
    listed = set(re.findall(r"`([\w/]+)`", (ROOT / "docs/metrics.md").read_text(encoding="utf-8")))
    curves = set(json.loads((SOURCE / "training/curves.json").read_text(encoding="utf-8")))
    rl = [str(path.relative_to(SOURCE)) for path in (SOURCE / "rl").rglob("*.py")]
    families = r"(actor|critic|rollout|group|eval|grpo|spo|timing|train|response_length|tokens)/[\w/]*\w"
    written = curves | {name for path in rl for name in strings(path) if re.fullmatch(families, name)}
    written |= {name for name in strings("training/metrics.py", "_row") if "/" not in name}
    assert written - listed == set()
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    phases = set(re.findall(r"self\.clock\(\"(\w+)\"\)", code))
    assert phases == {name.removeprefix("timing/") for name in listed if name.startswith("timing/")} - {"all"}

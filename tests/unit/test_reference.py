"""The reference is what the code says.

After a change write its pages again: PYTHONPATH=tests python -m helpers.reference
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import re
from collections.abc import Iterator

import pytest
from helpers.engine import ROOT
from helpers.reference import PAGES, file_name, render

from minimind_mcore import arguments, cli, validation
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.errors import UserError
from minimind_mcore.models.presets import get_preset
from minimind_mcore.serve import protocol

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


def error_classes() -> set[str]:
    """UserError and all classes below it, by the sources."""
    packages = ("", "models", "preprocess", "converters")  # links, which rglob does not follow
    files = [file for package in packages for file in (SOURCE / package).rglob("*.py")]
    nodes = itertools.chain.from_iterable(ast.walk(ast.parse(file.read_text(encoding="utf-8"))) for file in files)
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    found = {"UserError"}
    while below := {node.name for node in classes if found & {ast.unparse(base) for base in node.bases}} - found:
        found |= below
    return found


@pytest.mark.parametrize("language", ["en", "zh"])
def test_errors_are_in_the_list_of_messages(language: str) -> None:
    spec = importlib.util.spec_from_file_location("messages", ROOT / "docs/messages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    listed = module.messages(module.TITLES[language])
    assert list(listed) == list(module.TITLES[language])[: len(listed)] and all(listed.values())
    texts = [text for texts in listed.values() for text in texts]
    assert not error_classes() - module.ERRORS.keys()
    patterns = [re.compile(".*?".join(map(re.escape, re.split("<.*?>", text)))) for text in texts]
    flags = ["--seq-length", "64", "--micro-batch-size", "3", "--global-batch-size", "8", "--train-iters", "1"]
    args = arguments.parse([*get_preset("minimind3_tiny").megatron_flags(), *flags, "--lr", "1e-3"])
    # The last two have a class of its own, and a message in a conditional expression.
    layout = ParallelLayout(ep=3)
    for fails in (
        lambda: cli.dispatch(["trane"]),
        lambda: validation.validate(args, 1),
        lambda: protocol.validated(protocol.ChatBody, []),
        lambda: layout.check(get_preset("minimind3_moe")),
    ):
        with pytest.raises(UserError) as error:
            fails()
        assert any(pattern.fullmatch(" ".join(str(error.value).split())) for pattern in patterns), str(error.value)

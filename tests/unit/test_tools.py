"""An editor's "go to definition" finds what another package defines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.engine import ROOT

jedi = pytest.importorskip("jedi")

# Where a name of another package is used.
USES = (
    ("converters/hf.py", "tokenizer_fingerprint"),  # defined in preprocess
    ("minimind_mcore/doctor/host.py", "default_outputs"),  # the package itself
    ("minimind_mcore/inference/loading.py", "ModelConfig"),  # models
    ("minimind_mcore/mindspeed/flags.py", "quick_check"),  # preprocess
    ("minimind_mcore/posttrain/dpo.py", "unwrap"),  # models
    ("minimind_mcore/rl/runtime/jobs.py", "averaged"),  # training
    ("minimind_mcore/rl/runtime/rank.py", "open_source"),  # converters
    ("minimind_mcore/training/data.py", "tokenizer_info"),  # preprocess
    ("models/recipes.py", "parse_blend"),  # preprocess
    ("preprocess/main.py", "build_parser"),  # the package itself
    ("tests/unit/test_router_weight.py", "Server"),  # tests/helpers
)


def defined(name: str) -> set[Path]:
    """The files that define a function or class of that name at their top level."""
    tops = ("minimind_mcore", "models", "preprocess", "converters", "tests/helpers")
    pattern = re.compile(rf"^(?:def|class) {name}\b", re.MULTILINE)
    files = (file for top in tops for file in (ROOT / top).rglob("*.py"))
    return {file for file in files if pattern.search(file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize(("file", "name"), USES)
def test_the_definition_of_a_name_is_found(file: str, name: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    line, column = next(
        (number, text.index(name))
        for number, text in enumerate(source.splitlines(), 1)
        if re.search(rf"\b{name}\b[()\],:]", text) and "import" not in text
    )
    project = jedi.Project(ROOT, added_sys_path=[str(ROOT / "tests")])
    found = jedi.Script(path=ROOT / file, project=project).goto(line, column, follow_imports=True)
    assert {Path(place.module_path).resolve() for place in found} == defined(name) and len(found) == 1

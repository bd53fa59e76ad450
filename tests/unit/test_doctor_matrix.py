"""The matrix of versions that the doctor compares with, the documents that show it, and the command itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import matrix_tables
from helpers.engine import ROOT

from minimind_mcore.doctor import installed, main, matrix
from minimind_mcore.doctor.installed import Host
from minimind_mcore.errors import UserError


def test_rows_are_whole() -> None:
    for stack in matrix.stacks():
        assert (
            stack.sources
            and stack.note
            and stack.proof in ("tested in CI", "rehearsed", "rehearsed in part", "untested")
        )
        assert set(stack.needs) | set(stack.best) | set(stack.programs) <= set(installed.COMPONENTS), stack.name
        for component, best in stack.best.items():
            if component in stack.needs and best.startswith("=="):  # the best is one that is allowed
                assert matrix.allows(stack.needs[component], best[2:].removesuffix(".*")), (stack.name, component)
    proofs = {stack.name: stack.proof for stack in matrix.stacks()}
    assert proofs["MindSpeed-LLM 2.3.0"] == proofs["MindSpeed-LLM 26.0.0"] == "untested"


def test_requirements_are_those_of_the_matrix() -> None:
    lines = (ROOT / "requirements/ascend.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    stack = matrix.newest("npu", "mindspeed-llm")
    for name, version in pins.items():
        assert stack.judge(name, version) == "ok", name


def test_git_blob(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert installed.git_blob(tmp_path / "empty") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git hash-object


@pytest.mark.parametrize("name", ["MindSpeed-LLM", "MindSpeed"])
def test_fingerprints_of_the_sources(name: str) -> None:
    variable = name.upper().replace("-", "_") + "_HOME"
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: no sources to look at")
    assert installed.fingerprint(name, Path(os.environ[variable])) in ("26.1.0", "2.2.0")


def test_the_command_itself() -> None:
    code = "import sys, minimind_mcore.cli as c; sys.argv[1:] = ['doctor']; c.main()"
    environ = {**os.environ, "DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environ)
    assert "device cpu; backend native" in done.stdout
    assert done.returncode == (1 if "A job would fail here" in done.stdout else 0), done.stderr


def test_unknown_commands_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_mcore import cli

    with pytest.raises(UserError, match="did you mean doctor"):
        cli.dispatch(["docter"])
    with pytest.raises(UserError, match="DEVICE=tpu"):
        main.main([], Host(environ={"DEVICE": "tpu"}))
    with pytest.raises(UserError, match="BACKEND=other"):
        main.main([], Host(environ={"DEVICE": "cpu", "BACKEND": "other"}))
    assert json.loads((ROOT / "minimind_mcore/doctor/matrix.json").read_text()) == matrix.data()


@pytest.mark.parametrize("file", matrix_tables.FILES)
def test_documents_have_the_tables_of_the_matrix(file: str) -> None:
    text = (matrix_tables.DOCS / file).read_text(encoding="utf-8")
    assert text == matrix_tables.rendered(file), "run PYTHONPATH=tests python -m helpers.matrix_tables"
    assert text.count("<!-- matrix:") == 5


def test_both_languages_have_the_same_commands() -> None:
    for name in ("install_ascend", "fusionone"):
        texts = [(matrix_tables.DOCS / f"{name}{suffix}.md").read_text(encoding="utf-8") for suffix in ("", "_zh")]
        english, chinese = (
            [
                line.split("#")[0].rstrip()
                for block in re.findall(r"```\n(.*?)```", text, re.S)
                for line in block.splitlines()
            ]
            for text in texts
        )
        assert english == chinese, name
        assert texts[0].count("\n## ") == texts[1].count("\n## ")

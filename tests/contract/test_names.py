"""The settings of the scripts and the flags of the commands have the recorded names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, list[str]]]:
    """The names of this checkout."""
    spec = importlib.util.spec_from_file_location("record_names", HERE / "record_names.py")
    assert spec and spec.loader
    recorder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recorder)
    return dict(recorder.record(HERE.parents[1]))


@pytest.mark.parametrize("kind", ["flags", "documented settings", "settings"])
def test_names_are_the_recorded_ones(kind: str, found: dict[str, Any]) -> None:
    recorded = json.loads((HERE / "names.json").read_text(encoding="utf-8"))[kind]
    assert found[kind].keys() == recorded.keys()
    for place, lines in recorded.items():
        assert set(found[kind][place]) == set(" ".join(lines).split()), place

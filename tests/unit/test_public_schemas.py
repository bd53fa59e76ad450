"""Files that other programs read fit the schemas that these programs publish (check-jsonschema ships them)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from helpers.engine import ROOT

SCHEMAS = {
    ".github/workflows/ci.yml": "github-workflows",
    ".github/workflows/release.yml": "github-workflows",
    ".github/workflows/site.yml": "github-workflows",
    ".github/ISSUE_TEMPLATE/bug.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/feature.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    "compose.yaml": "compose-spec",
    "docker/compose.yaml": "compose-spec",
}
SLOW = {"mindspeed", "real_vllm"}  # folders in which every test is slow, or needs another environment
NO_TESTS = {"helpers", "__pycache__"}


@pytest.mark.parametrize("file", SCHEMAS)
def test_files_fit_their_schema(file: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{SCHEMAS[file]}", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_runs_every_group_of_tests() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    groups = workflow["jobs"]["tests"]["strategy"]["matrix"]["group"]
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert set(groups) == folders - SLOW - NO_TESTS


def test_every_push_publishes_the_site() -> None:
    """Pages are made from docstrings and from web/, too: a path filter would leave them out of date."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text(encoding="utf-8"))
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert triggers["push"] == {"branches": ["main"]}

"""Build the documentation site for tests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.engine import ROOT

_NEEDED = ("sphinx", "myst_parser", "pydata_sphinx_theme", "sphinx_copybutton")
_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
needs_sphinx = pytest.mark.skipif(bool(_MISSING), reason=f"requirements/docs.txt is not installed: no {_MISSING}")


def build(out: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout into a directory."""
    command = ["bash", str(root / "docs/build.sh"), str(out)]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)

"""Paths of the installation."""

import functools
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent  # parent of the package; in site-packages it has no examples/ or docs/
CONFIGS = (PACKAGE / "configs").resolve()  # a link in a checkout, a directory in an installed package


@functools.cache
def package_json(name: str) -> dict[str, Any]:
    """Return the content of a JSON file of this package. All callers share it, so they must not change it."""
    content: dict[str, Any] = json.loads((PACKAGE / name).read_text(encoding="utf-8"))
    return content


def install_command(extra: str) -> str:
    """Return the command that installs an optional dependency group of pyproject.toml, to be run in a checkout."""
    return f"pip install '.[{extra}]' (in the directory of the repository)"


def default_outputs() -> Path:
    """Return the directory in which scripts create outputs/ and data/: the checkout, else the current directory."""
    return CHECKOUT if (CHECKOUT / "examples").is_dir() else Path.cwd()

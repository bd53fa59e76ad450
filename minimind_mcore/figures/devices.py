"""What runs each part of a training step on each device."""

from __future__ import annotations

import ast
import json
from typing import Any

from minimind_mcore.errors import UserError, require
from minimind_mcore.figures.study import Study
from minimind_mcore.paths import PACKAGE
from minimind_mcore.platform.device import BACKENDS


def devices(study: Study) -> dict[str, Any]:
    """The table of devices.json, with the first line of the documentation of each function.

    Raises:
        UserError: a name in the table does not exist.
    """
    content = json.loads((PACKAGE / "figures/devices.json").read_text(encoding="utf-8"))
    for part in content["parts"]:
        for kind, backend in BACKENDS.items():
            part[kind] = [[name, summary(name) if ":" in name else ""] for name in part[kind]]
            known = part["part"] != "communication" or part[kind] == [[backend, ""]]
            require(known, f"devices.json: found {part[kind]} for communication, expected {backend}")
    return {"parts": content["parts"]}


def summary(name: str) -> str:
    """Return the first line of the documentation of `module:name`. Reads the source: not every device is here.

    Raises:
        UserError: the name does not exist.
    """
    module, _, wanted = name.partition(":")
    file = PACKAGE / f"{module.replace('.', '/')}.py"
    nodes = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == wanted:
            return (ast.get_docstring(node) or "").partition("\n")[0].strip()
    raise UserError(f"devices.json names {name}, which does not exist: name the function that took its place")

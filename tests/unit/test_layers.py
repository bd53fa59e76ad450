"""No files import each other in a circle, and a package imports only from the layers below its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from helpers.engine import ROOT
from helpers.layers import layers

LINKED = ("models", "preprocess", "converters")


def modules() -> dict[str, Path]:
    """The files of the package by module name; those of the linked folders lie at the top."""
    found = {}
    for file in [
        *(ROOT / "minimind_mcore").rglob("*.py"),
        *(f for name in LINKED for f in (ROOT / name).rglob("*.py")),
    ]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "minimind_mcore" else ("minimind_mcore", *parts)
        if not set(LINKED) & set(parts[1:2]) or file.is_relative_to(ROOT / parts[1]):
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements below a node, those in functions too, but for those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from statements(other)
        else:
            yield from statements(child)


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in statements(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module or ""}
            if names - MODULES.keys():
                found.add(node.module or "")
    return found & MODULES.keys()


GRAPH = {name: imported(file) - {name, "minimind_mcore"} for name, file in MODULES.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The names of one circle, its first again at the end; empty if there is none."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if found := follow(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := follow(name, []))), [])


def test_files_do_not_import_each_other_in_a_circle() -> None:
    assert circle(GRAPH) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_packages_import_from_lower_layers_only() -> None:
    height = {package: -row for row, (_, packages) in enumerate(layers()) for package in packages}

    def package(module: str) -> str:
        name = module.removeprefix("minimind_mcore.")
        return max((p for p in height if f"{name}.".startswith(f"{p}.")), key=len, default=f"not listed: {name}")

    unlisted = {package(name) for name in MODULES if name != "minimind_mcore"} - height.keys()
    assert not unlisted, f"docs/architecture.md lists no layer for {unlisted}"
    wrong = [
        f"{name} imports {other}"
        for name in sorted(GRAPH.keys() - {"minimind_mcore"})
        for other in sorted(GRAPH[name])
        if package(name) != package(other) and height[package(name)] <= height[package(other)]
    ]
    assert not wrong, "\n".join(wrong)


def test_every_layer_has_its_packages() -> None:
    assert {name for _, packages in layers() for name in packages} <= {
        name.removeprefix("minimind_mcore.") for name in MODULES
    }

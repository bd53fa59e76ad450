"""Parameters of training/, posttrain/ and rl/runtime/ have types; an argparse.Namespace stays at the command line."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from helpers.engine import ROOT

# Functions that take an argparse.Namespace: they read a command line.
PARSING = {("training", "run"), ("training", "from_args"), ("posttrain", "stage_of")}


def parameters(package: str) -> Iterator[tuple[str, str]]:
    """Function and annotation of every parameter."""
    for file in sorted((ROOT / "minimind_mcore" / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                for parameter in [*found, *filter(None, [node.args.vararg, node.args.kwarg])]:
                    if parameter.annotation is not None:
                        yield node.name, ast.unparse(parameter.annotation)


@pytest.mark.parametrize("package", ["training", "posttrain", "rl/runtime"])
def test_a_namespace_stays_where_a_command_line_is_read(package: str) -> None:
    found = {(package, name) for name, kind in parameters(package) if "Namespace" in kind}
    assert found <= PARSING


@pytest.mark.parametrize("package", ["training", "posttrain"])
def test_at_most_one_parameter_in_twenty_is_untyped(package: str) -> None:
    kinds = [kind for _, kind in parameters(package)]
    assert sum("Any" in kind for kind in kinds) <= 0.05 * len(kinds)

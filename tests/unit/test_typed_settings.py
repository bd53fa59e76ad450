"""How many parameters of training/ and posttrain/ are an argparse.Namespace or Any: the figures may only fall."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from helpers.engine import ROOT

# Command lines come in here, or are compared with the arguments of a checkpoint, for MindSpeed-LLM too.
EDGES = ("training/layout.py", "training/checkpoint_fit.py", "training/sample_order.py")
# Functions that take an argparse.Namespace outside these files. They read a command line before it is a TrainConfig.
PARSING = {"run", "show", "check", "stage_of", "_section", "from_args"}


def parameters(package: str) -> Iterator[tuple[str, str, str]]:
    """File, function and annotation of every parameter."""
    for file in sorted((ROOT / "minimind_mcore" / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                for parameter in [*found, *filter(None, [node.args.vararg, node.args.kwarg])]:
                    if parameter.annotation is not None:
                        yield f"{package}/{file.name}", node.name, ast.unparse(parameter.annotation)


@pytest.mark.parametrize("package", ["training", "posttrain"])
def test_a_namespace_stays_where_a_command_line_is_read(package: str) -> None:
    found = {(file, name) for file, name, kind in parameters(package) if "Namespace" in kind and file not in EDGES}
    assert {name for _, name in found} <= PARSING, sorted(found)


# Among them are objects of megatron-core (optimizer, scheduler, process group), which has no types.
@pytest.mark.parametrize(("package", "bound"), [("training", 0.16), ("posttrain", 0.28)])
def test_untyped_parameters_do_not_become_more(package: str, bound: float) -> None:
    kinds = [kind for _, _, kind in parameters(package)]
    assert sum("Any" in kind for kind in kinds) <= bound * len(kinds)

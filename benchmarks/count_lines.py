"""Count the product's lines of code.

    python benchmarks/count_lines.py                 # this checkout
    python benchmarks/count_lines.py ../a ../b       # other checkouts, one row each

Python: tracked `*.py` outside tests/, benchmarks/ and the stand-in for torch_npu; a line counts if it has a token that
is neither a comment nor part of a docstring. Shell: every line of tracked `*.sh` in examples/ and requirements/.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path

# The stand-in is test equipment. It has moved: counts of older checkouts leave out the same files.
STAND_IN = ("minimind_mcore/mindspeed/emulation/", "rehearsal/")
LAYOUT_TOKENS = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def docstrings(source: str) -> set[tuple[int, int]]:
    """Return where docstrings start, as (line, column)."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add((first.lineno, first.col_offset))
    return found


def code_lines(source: str) -> int:
    """Count the lines of Python source that have a token that is neither a comment nor part of a docstring."""
    documentation, lines = docstrings(source), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and token.start in documentation
        if token.type not in LAYOUT_TOKENS and not is_docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def count(checkout: Path) -> tuple[int, int]:
    """Count the lines of Python and of shell of one checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=checkout, capture_output=True, text=True, check=True)
    python = shell = 0
    for name in filter(None, listed.stdout.split("\0")):
        if (checkout / name).is_symlink() or not (checkout / name).is_file():
            continue  # a link's target is tracked under its own name
        if name.endswith(".py") and not name.startswith(("tests/", "benchmarks/", *STAND_IN)):
            python += code_lines((checkout / name).read_text(encoding="utf-8"))
        elif name.endswith(".sh") and name.startswith(("examples/", "requirements/")):
            shell += (checkout / name).read_text(encoding="utf-8").count("\n")
    return python, shell


def main(argv: Sequence[str]) -> None:
    """Print a row for each checkout: lines of Python, lines of shell, both, path."""
    print(f"{'python':>8}{'shell':>8}{'both':>8}  checkout")
    for checkout in map(Path, argv or [Path(__file__).resolve().parents[1]]):
        python, shell = count(checkout)
        print(f"{python:>8,}{shell:>8,}{python + shell:>8,}  {checkout}")


if __name__ == "__main__":
    main(sys.argv[1:])

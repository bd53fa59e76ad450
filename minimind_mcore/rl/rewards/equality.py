"""Compare two mathematical expressions: as text, as numbers, part by part, and finally with sympy.

The steps are those of MindSpeed-RL's `math_equal` (after Qwen2.5-Math and ToRA). The text comes from a model and
reaches sympy's parser, which evaluates Python with all of sympy's names: `doctest()` starts processes, `init_session()`
opens a console. Here only the names of `_mathematics` are resolved, and text with strings or attributes is not parsed
(`_harmless`). Sympy can take minutes for one line, so callers run the comparison in a `verifier_pool.VerifierPool`.
"""

from __future__ import annotations

import builtins
import functools
import keyword
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import isclose, isfinite
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from latex2sympy2_extended.math_normalization import NormalizationConfig
from sympy import Basic, Expr, MatrixBase, N, nan, simplify, zoo
from sympy.core.relational import Relational
from sympy.parsing.sympy_parser import parse_expr

Symbolic = Callable[[str, str], bool]
_MATRIX = re.compile(r"\\begin\{[pb]matrix\}.*\\end\{[pb]matrix\}", re.DOTALL)
# Same results as the older latex2sympy2 of MindSpeed-RL: "x = 3" is 3, letters are real and keep their case. Two of its
# bugs are not copied: it reads the mixed number 2\frac{1}{2} as a product, and keeps x = 3 for later responses.
_PLAIN = ConversionConfig(interpret_simple_eq_as_assignment=True, lowercase_symbols=False)
_AS_IT_IS = NormalizationConfig(basic_latex=True, boxed="none")
_NOT_MATHEMATICS = ({*dir(builtins), *keyword.kwlist} - {"abs", "min", "max", "round", "pow", "sum"}) | {"self"}


def equal(answer: str, label: str, symbolic: Symbolic | None = None) -> bool:
    """Return whether `answer` (normalized by `extraction.tidy`) equals `label`.

    Args:
        answer: the answer extracted from the response.
        label: the right answer.
        symbolic: compares what text and numbers cannot decide. None: `symbolically_equal`.
    """
    symbolic = symbolic or symbolically_equal
    if answer.strip().lower() == label.strip().lower():
        return True
    if label in list("ABCDE") and _choice(answer) == label:
        return True
    numbers = _number(answer), _number(label)
    if numbers[0] is not None and numbers[1] is not None:
        return any(_close(numbers[0], numbers[1] * scale) for scale in (0.01, 1, 100))
    if not answer:
        return False
    answer, label = answer.strip(), label.strip()
    if "pmatrix" in answer and "pmatrix" not in label:
        label = _as_matrix(label)
    if _same_text(answer, label) or _same_parts(answer, label, symbolic):
        return True
    return _same_equation(answer, label, symbolic) or symbolic(answer, label)


def _choice(answer: str) -> str:
    """Return the last stand-alone letter of A to E, or the answer itself."""
    answer = answer.strip("\n").rstrip(".").rstrip("/").strip(" ").lstrip(":")
    letters = re.findall(r"\b([ABCDE])\b", answer.upper())
    return str(letters[-1]) if letters else answer.strip().strip(".").rstrip(".").rstrip("/")


def _number(text: str) -> float | None:
    """Parse a number with thousands separators, or a percentage."""
    text = text.replace(",", "")
    with suppress(ValueError):
        return float(text)
    if text.endswith("%"):
        with suppress(ValueError):
            return float(text.removesuffix("%").removesuffix("\\")) / 100
    return None


def _close(a: float, b: float) -> bool:
    # isclose treats two infinities as equal, and a literal above 1.8e308 becomes infinity.
    return isfinite(a) and isfinite(b) and isclose(a, b, rel_tol=1e-4)


def _as_matrix(label: str) -> str:
    r"""Convert {a,b} to a matrix with one row per entry (one backslash before each comma, as in MindSpeed-RL)."""
    rows = [found.strip("{}").replace(",", "\\") for found in re.findall(r"\{.*,.*\}", label.strip())]
    return ", ".join(f"\\begin{{pmatrix}}{row}\\end{{pmatrix}}" for row in rows)


def _same_text(answer: str, label: str) -> bool:
    """Return whether two texts are equal apart from brackets and case."""
    square = answer.startswith("[") and answer.endswith("]") and not label.startswith("(")
    round_ = answer.startswith("(") and answer.endswith(")") and not label.startswith("[")
    if square or round_:
        answer, label = answer.strip("[]()"), label.strip("[]()")
    bare = str.maketrans("", "", "{}()")
    return answer.translate(bare).lower() == label.translate(bare).lower()


def _same_parts(answer: str, label: str, symbolic: Symbolic) -> bool:
    """Compare points and intervals coordinate by coordinate, and matrices entry by entry."""

    def alike(left: str, right: str, by: str) -> bool:
        pair = left.split(by), right.split(by)
        return len(pair[0]) == len(pair[1]) and all(equal(a, b, symbolic) for a, b in zip(*pair, strict=True))

    tuples = [re.match(r"[(\[].+[)\]]", text) for text in (answer, label)]
    if all(tuples) and alike(answer[1:-1], label[1:-1], ","):
        return True
    if not (_MATRIX.fullmatch(answer) and _MATRIX.fullmatch(label)):
        return False
    cut = len("\\begin{pmatrix}"), -len("\\end{pmatrix}")
    rows = [[row.strip() for row in text[slice(*cut)].split("\\\\") if row.strip()] for text in (answer, label)]
    return len(rows[0]) == len(rows[1]) and all(alike(a, b, "&") for a, b in zip(*rows, strict=True))


def _same_equation(answer: str, label: str, symbolic: Symbolic) -> bool:
    """Compare equations by the difference of their sides, and "x = 3" as 3."""
    if answer.count("=") == 1 and label.count("=") == 1:
        left, right = ("{} - ({})".format(*(side.strip() for side in text.split("="))) for text in (answer, label))
        return symbolic(left, right) or symbolic(f"-({left})", right)
    for named, value, swapped in ((answer, label, False), (label, answer, True)):
        if named.count("=") == 1 and "=" not in value and len(named.split("=")[0].strip()) <= 2:
            side = named.split("=")[1]
            return equal(value, side, symbolic) if swapped else equal(side, value, symbolic)
    return False


def symbolically_equal(answer: str, label: str) -> bool:
    """Return whether sympy finds both expressions equal. Text that sympy cannot parse is compared as text."""
    a, b = _parse(answer), _parse(label)
    if isinstance(a, str) or isinstance(b, str):
        return str(a) == str(b)  # text must not reach sympy's functions, which would evaluate it
        # Sympy maps every division by zero to one complex infinity, so that 12:00 would equal 1:00. latex2sympy2 1.9.1
        # of MindSpeed-RL builds objects that differ from each other.
    if _divides_by_zero(a) or _divides_by_zero(b):
        return False
    tests: list[Callable[[], Any]] = [
        lambda: str(a) == str(b) or a == b,
        lambda: a.equals(b) or simplify(a - b) == 0,
        lambda: abs(a.lhs - a.rhs).equals(abs(b.lhs - b.rhs)),
        lambda: _close(float(N(b)), float(N(a))),
        lambda: a.shape == b.shape and _rounded(a).equals(_rounded(b)),
    ]
    for test in tests:
        # Sympy raises exceptions of any type for undefined operations. The test is then skipped.
        with suppress(Exception):
            if test():
                return True
    return False


def _divides_by_zero(parsed: Any) -> bool:
    """Return whether a parsed expression is undefined. An infinity in the text itself counts as defined."""
    if not isinstance(parsed, Basic | MatrixBase):
        return False
    with suppress(Exception):  # as in the tests of `symbolically_equal`
        return bool(parsed.has(zoo, nan) or parsed.doit().has(zoo, nan))
    return False


def _rounded(matrix: Any) -> Any:
    return matrix.applyfunc(lambda x: round(x, 3))


def _parse(text: str) -> Any:
    """Parse Python or LaTeX notation to a sympy object. Text that cannot be parsed is returned unchanged."""
    for spelling in (text.replace("\\\\", "\\"), text):
        if _harmless(spelling):
            with suppress(Exception):
                return parse_expr(spelling, global_dict=dict(_mathematics()))
    for spelling in (text.replace("\\\\", "\\"), text):
        with suppress(Exception):
            found = latex2sympy(spelling, None, True, normalization_config=_AS_IT_IS, conversion_config=_PLAIN)
            if isinstance(found, Expr | MatrixBase | Relational):  # latex2sympy2 cannot parse sets
                return found
    return text


@functools.cache
def _mathematics() -> Mapping[str, Any]:
    """Return the names that a response may use: sympy's constants, functions, sets, matrices and relations.

    `parse_expr` turns any other name into a symbol. Without `__builtins__` Python would add its own functions.
    """
    kinds = (sympy.Function, sympy.Set, Relational, sympy.MatrixBase, sympy.Sum, sympy.Product, sympy.Integral)
    names = {
        name: value
        for name, value in vars(sympy).items()
        if isinstance(value, sympy.Basic) or (isinstance(value, type) and issubclass(value, kinds))
    }
    # functions of Python that build an expression, and the classes that parse_expr writes into the text it evaluates
    others = "sqrt cbrt root real_root gcd lcm N diff expand factor simplify".split()
    others += "Symbol Integer Float Rational Add Mul Pow Function Tuple".split()
    python = {"abs": abs, "min": min, "max": max, "round": round, "pow": pow, "sum": sum}
    return {**names, **{name: getattr(sympy, name) for name in others}, **python, "__builtins__": {}}


def _harmless(text: str) -> bool:
    """Return whether Python may evaluate a text: it has no strings, attributes or keywords."""
    if re.search(r"""["'`:;@\\]|__|\.\s*[^\W\d]|\d{40}""", text):
        return False
    return not _NOT_MATHEMATICS.intersection(re.findall(r"[^\W\d]\w*", text))

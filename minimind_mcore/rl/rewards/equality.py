"""Whether two pieces of mathematics are the same: as text, as numbers, part by part, or for sympy.

The steps are those of MindSpeed-RL's `math_equal` (after Qwen2.5-Math and ToRA). Text that a model wrote reaches
sympy's parser, which evaluates Python with all of sympy's names: `doctest()` starts processes, `init_session()` opens a
console. Only the names of `_mathematics` are resolved here, and text with strings or attributes is not parsed
(`_harmless`). Sympy can take minutes over a line, so callers run this in `workers.Workers`.
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
# As the older latex2sympy2 that MindSpeed-RL has: "x = 3" is 3, letters are real and keep their case. (That one takes
# the mixed number 2\frac{1}{2} for a product, and remembers from one response to the next that x is 3: not copied.)
_PLAIN = ConversionConfig(interpret_simple_eq_as_assignment=True, lowercase_symbols=False)
_AS_IT_IS = NormalizationConfig(basic_latex=True, boxed="none")
_NOT_MATHEMATICS = ({*dir(builtins), *keyword.kwlist} - {"abs", "min", "max", "round", "pow", "sum"}) | {"self"}


def equal(answer: str, label: str, symbolic: Symbolic | None = None) -> bool:
    """Whether `answer` (tidied, see `extraction`) is `label`.

    Args:
        answer: what was found in the response.
        label: the truth.
        symbolic: decides what text and numbers cannot; `symbolically_equal` where it is None.
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
    """The last letter of A to E that stands alone, or the answer itself."""
    answer = answer.strip("\n").rstrip(".").rstrip("/").strip(" ").lstrip(":")
    letters = re.findall(r"\b([ABCDE])\b", answer.upper())
    return str(letters[-1]) if letters else answer.strip().strip(".").rstrip(".").rstrip("/")


def _number(text: str) -> float | None:
    """A number with commas, or a percentage."""
    text = text.replace(",", "")
    with suppress(ValueError):
        return float(text)
    if text.endswith("%"):
        with suppress(ValueError):
            return float(text.removesuffix("%").removesuffix("\\")) / 100
    return None


def _close(a: float, b: float) -> bool:
    # isclose takes two infinities for equal, and a float of more than 1.8e308 is one.
    return isfinite(a) and isfinite(b) and isclose(a, b, rel_tol=1e-4)


def _as_matrix(label: str) -> str:
    r"""{a,b} as a matrix of rows, which a comma ends (one backslash, as MindSpeed-RL writes it)."""
    rows = [found.strip("{}").replace(",", "\\") for found in re.findall(r"\{.*,.*\}", label.strip())]
    return ", ".join(f"\\begin{{pmatrix}}{row}\\end{{pmatrix}}" for row in rows)


def _same_text(answer: str, label: str) -> bool:
    """The same but for brackets and capitals."""
    square = answer.startswith("[") and answer.endswith("]") and not label.startswith("(")
    round_ = answer.startswith("(") and answer.endswith(")") and not label.startswith("[")
    if square or round_:
        answer, label = answer.strip("[]()"), label.strip("[]()")
    bare = str.maketrans("", "", "{}()")
    return answer.translate(bare).lower() == label.translate(bare).lower()


def _same_parts(answer: str, label: str, symbolic: Symbolic) -> bool:
    """Points and intervals coordinate by coordinate, matrices entry by entry."""

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
    """Equations as the difference of their sides; "x = 3" as 3."""
    if answer.count("=") == 1 and label.count("=") == 1:
        left, right = ("{} - ({})".format(*(side.strip() for side in text.split("="))) for text in (answer, label))
        return symbolic(left, right) or symbolic(f"-({left})", right)
    for named, value, swapped in ((answer, label, False), (label, answer, True)):
        if named.count("=") == 1 and "=" not in value and len(named.split("=")[0].strip()) <= 2:
            side = named.split("=")[1]
            return equal(value, side, symbolic) if swapped else equal(side, value, symbolic)
    return False


def symbolically_equal(answer: str, label: str) -> bool:
    """Whether sympy takes them for the same; what it cannot read is compared as text."""
    a, b = _parse(answer), _parse(label)
    if isinstance(a, str) or isinstance(b, str):
        return str(a) == str(b)  # and nothing else: sympy's functions evaluate text that they are given
    # Every division by zero is sympy's one complex infinity: 12:00 would be 1:00. latex2sympy2 1.9.1, which
    # MindSpeed-RL has, builds other objects for them, which are not equal.
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
        # Sympy raises whatever comes to hand where an operation means nothing: then this test says nothing.
        with suppress(Exception):
            if test():
                return True
    return False


def _divides_by_zero(parsed: Any) -> bool:
    """Whether what sympy read has no value; a written infinity has one."""
    if not isinstance(parsed, Basic | MatrixBase):
        return False
    with suppress(Exception):  # as in the tests of `symbolically_equal`
        return bool(parsed.has(zoo, nan) or parsed.doit().has(zoo, nan))
    return False


def _rounded(matrix: Any) -> Any:
    return matrix.applyfunc(lambda x: round(x, 3))


def _parse(text: str) -> Any:
    """A sympy object from Python's or LaTeX's notation, or the text itself."""
    for spelling in (text.replace("\\\\", "\\"), text):
        if _harmless(spelling):
            with suppress(Exception):
                return parse_expr(spelling, global_dict=dict(_mathematics()))
    for spelling in (text.replace("\\\\", "\\"), text):
        with suppress(Exception):
            found = latex2sympy(spelling, None, True, normalization_config=_AS_IT_IS, conversion_config=_PLAIN)
            if isinstance(found, Expr | MatrixBase | Relational):  # it could not read sets
                return found
    return text


@functools.cache
def _mathematics() -> Mapping[str, Any]:
    """Return the names that a response may use: constants, functions, sets, matrices, relations of sympy.

    `parse_expr` makes a symbol of any other name. Without `__builtins__` Python would add its own functions.
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
    """Whether Python may evaluate it: no strings, attributes or names of the language."""
    if re.search(r"""["'`:;@\\]|__|\.\s*[^\W\d]|\d{40}""", text):
        return False
    return not _NOT_MATHEMATICS.intersection(re.findall(r"[^\W\d]\w*", text))

"""Evaluate arithmetic that a model wrote, without `eval`: numbers, operators and a few functions, within limits."""

from __future__ import annotations

import ast
import builtins
import math
import operator
from collections.abc import Callable

Number = int | float

LONGEST = 1_000  # characters of an expression
LARGEST = 1_000  # bits of an integer, and the largest exponent
SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "（": "(", "）": ")", "²": "^2", "³": "^3", "，": ","})
OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Number]] = {
    **{name: getattr(math, name) for name in "sqrt sin cos tan log log2 log10 exp floor ceil factorial".split()},
    **{name: getattr(builtins, name) for name in "abs round min max".split()},
}
CONSTANTS = {"pi": math.pi, "e": math.e}


def evaluate(expression: str) -> Number:
    """Evaluate an expression such as 256*37, 2^10 or sqrt(144).

    Raises:
        ValueError: something else than arithmetic, or too large.
        ZeroDivisionError: a division by zero.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has {len(expression):,} characters; expected {LONGEST:,} at most")
    try:
        tree = ast.parse(expression.translate(SIGNS).replace("^", "**").strip(), mode="eval")
        return _value(tree.body)
    except (SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from error
    except OverflowError as error:
        raise ValueError(f"the value of {expression!r} is too large") from error


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and node.value is not True:
        return _small(node.value)
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > LARGEST:
            raise OverflowError
        return _small(OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        values = [_value(argument) for argument in node.args]
        if node.func.id == "round" and len(values) > 1 and abs(values[1]) > LARGEST:
            raise OverflowError  # round(5, -10**9) computes 10**10**9
        if node.func.id in FUNCTIONS and not (node.func.id == "factorial" and values and values[0] > LARGEST):
            return _small(FUNCTIONS[node.func.id](*values))
    raise ValueError(f"expected numbers, + - * / // % ^, parentheses and {', '.join(FUNCTIONS)}")


def _small(value: Number) -> Number:
    """Return the value. Raise OverflowError if an integer has too many bits, and ValueError if the value is complex."""
    if isinstance(value, complex):
        raise ValueError("the value is not a real number")
    if isinstance(value, int) and value.bit_length() > LARGEST:
        raise OverflowError
    return value

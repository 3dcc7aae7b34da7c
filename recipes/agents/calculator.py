"""A calculator for a policy: arithmetic and nothing else, read from Python's syntax tree; nothing is ever executed."""

import ast
import math
import operator
import re
from collections.abc import Callable

MAX_CHARACTERS = 200
MAX_DEPTH = 20
MAX_EXPONENT = 100
MAX_MAGNITUDE = 10**30  # of every number and every result on the way

_Number = int | float

_BINARY: dict[type[ast.operator], Callable[[_Number, _Number], _Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[_Number], _Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """
    Calculate the value of an arithmetic expression.

    Args:
        expression: Numbers, brackets and the operators + - * / // % **, such as "48/2 + 17".

    Returns:
        The value, in up to 12 significant digits.
    """
    if not isinstance(expression, str):
        raise ValueError("the expression must be text.")
    text = expression.strip()
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the expression is longer than {MAX_CHARACTERS} characters.")
    # As people write: 1,000 for a thousand, × ÷ − and ^.
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = text.replace("×", "*").replace("÷", "/").replace("−", "-").replace("^", "**")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError("the expression cannot be read.") from error
    return _written(_value(tree.body, 0))


def _value(node: ast.AST, depth: int) -> _Number:
    """The value of a node of the syntax tree; whatever is not arithmetic raises `ValueError`."""
    if depth > MAX_DEPTH:
        raise ValueError(f"the expression is nested more than {MAX_DEPTH} deep.")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):  # bool is an int, and no number
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, depth + 1))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            try:
                return _bounded(_BINARY[type(node.op)](left, right))
            except ZeroDivisionError as error:
                raise ValueError("division by zero.") from error
    raise ValueError("only numbers, brackets and + - * / // % ** are allowed.")


def _power(base: _Number, exponent: _Number) -> _Number:
    """A power whose size is known before it is calculated."""
    if abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"an exponent is beyond {MAX_EXPONENT}.")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero.")
    if base < 0 and exponent != int(exponent):
        raise ValueError("a root of a negative number.")
    if base != 0 and exponent * math.log10(abs(base)) > math.log10(MAX_MAGNITUDE) + 1:
        raise ValueError("a number is too large.")
    return _bounded(base**exponent)


def _bounded(value: _Number) -> _Number:
    if not math.isfinite(value) or abs(value) > MAX_MAGNITUDE:
        raise ValueError("a number is too large.")
    return value


def _written(value: _Number) -> str:
    """A whole number without a point, any other in up to 12 significant digits."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value) if isinstance(value, int) else f"{value:.12g}"

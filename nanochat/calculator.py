"""
The tool that the model may call: arithmetic, read as a syntax tree and never handed to eval().

The tree is Python's own (`ast.parse`), but every node is on a short list: numbers, `+ - * / // % **`,
signs, parentheses, and `.count("x")` on a string literal, which nanochat's letter-counting task needs.
Numbers are exact fractions all the way, so 0.1 + 0.2 is 0.3 and (1/3)*3 is 1. No clock or signal guards it:
length, depth, digits and exponents are limited, and within those limits every expression is cheap.
(SIGALRM, the usual guard, works only in the main thread and not on Windows.)

`evaluate` never raises: whatever the model wrote, the answer is a string or None, and None means that
the tool stays silent.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_LITERAL_DIGITS = 30
MAX_DEPTH = 32
MAX_BITS = 512  # of a numerator or denominator, between steps: about 150 digits
MAX_EXPONENT = 1000
MAX_RESULT_CHARACTERS = 64
SIGNIFICANT_DIGITS = 10

# Letters occur only inside string literals and in `.count(`, so names, prefixes like f"" and 1e9 stop here,
# before the parser sees them (it would print warnings about some of them).
_ALLOWED = re.compile(r"""(?: "[^"\\]*" | '[^'\\]*' | \.count\s?\( | [-+*/%()0-9.,\ ] )+""", re.VERBOSE)
_STRING_OR_GROUPED = re.compile(r"""("[^"]*"|'[^']*')|(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])""")
_TOO_MANY_DIGITS = re.compile(rf"[0-9.]{{{MAX_LITERAL_DIGITS + 1},}}")
_TYPOGRAPHY = str.maketrans({"×": "*", "÷": "/", "−": "-"})


class _Refused(Exception):
    """The expression is outside the whitelist or its limits."""


def evaluate(expression: str) -> str | None:
    """The value of an arithmetic expression as text, or None where there is none to give."""
    text = expression.translate(_TYPOGRAPHY).strip()
    if not text or len(text) > MAX_CHARACTERS or not text.isprintable() or not _ALLOWED.fullmatch(text):
        return None
    text = _STRING_OR_GROUPED.sub(lambda m: m.group(1) or m.group().replace(",", ""), text)
    if _TOO_MANY_DIGITS.search(text):
        return None
    try:
        value = _value(ast.parse(text, mode="eval").body, depth=0)
        result = format_number(value) if isinstance(value, Fraction) else ""
    except (_Refused, SyntaxError, ArithmeticError, ValueError, RecursionError, MemoryError):
        return None
    return result if 0 < len(result) <= MAX_RESULT_CHARACTERS else None


def format_number(value: Fraction) -> str:
    """
    An integer as such; anything else as plain decimals, rounded half to even to 10 significant digits
    (or to an integer where the integer part alone has more), trailing zeros dropped, never an exponent.
    """
    if value.denominator == 1:
        return str(value.numerator)
    magnitude = abs(value)
    decimals = SIGNIFICANT_DIGITS - _leading_digit_place(magnitude)
    if decimals <= 0:
        return str(round(value))
    digits = str(round(magnitude * 10**decimals)).rjust(decimals + 1, "0")
    text = f"{digits[:-decimals]}.{digits[-decimals:]}".rstrip("0").rstrip(".")
    return f"-{text}" if value < 0 else text


def _leading_digit_place(magnitude: Fraction) -> int:
    """1 for 1 <= m < 10, 3 for 123.4, 0 for 0.5, -2 for 0.004."""
    if magnitude >= 1:
        return len(str(int(magnitude)))
    # A positive m < 1 has as many zeros after its point as the integer part of its inverse has extra digits.
    place = 1 - len(str(int(1 / magnitude)))
    return place + 1 if magnitude >= Fraction(10) ** place else place


def _value(node: ast.expr, *, depth: int) -> Fraction | str:
    if depth > MAX_DEPTH:
        raise _Refused("too deep")
    if isinstance(node, ast.Constant):
        return _literal(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_number(node.operand, depth=depth + 1))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _number(node.left, depth=depth + 1), _number(node.right, depth=depth + 1)
        return _bounded(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Call):
        return _count(node, depth=depth)
    raise _Refused(type(node).__name__)


def _number(node: ast.expr, *, depth: int) -> Fraction:
    value = _value(node, depth=depth)
    if isinstance(value, str):
        raise _Refused("a string is not a number")
    return value


def _literal(value: object) -> Fraction | str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused("not a number")
    return Fraction(str(value))  # str() gives a float's shortest decimal: what was written, not its binary


def _count(node: ast.Call, *, depth: int) -> Fraction:
    method = node.func
    if (
        not isinstance(method, ast.Attribute)
        or method.attr != "count"
        or node.keywords
        or len(node.args) != 1
    ):
        raise _Refused("only .count(one string)")
    text, wanted = _value(method.value, depth=depth + 1), _value(node.args[0], depth=depth + 1)
    if not isinstance(text, str) or not isinstance(wanted, str):
        raise _Refused("count needs string literals")
    return Fraction(text.count(wanted))


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise _Refused("too many digits")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """Exact for a whole exponent, through floating point for a root; the size is checked before computing."""
    if abs(exponent) > MAX_EXPONENT:
        raise _Refused("exponent too large")
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if (bits - 1) * abs(exponent) > MAX_BITS:
            raise _Refused("too many digits")
        return base**exponent.numerator
    if base < 0:
        raise _Refused("root of a negative number")
    return Fraction(str(float(base) ** float(exponent)))


_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}

"""
Arithmetic as a tree whose leaves are the numbers of a question.

"820*3-850-705" solves one question; `n2*3-n0-n1` solves it with other numbers, too. Trees are read from MathQA's formulas
(Amini et al. 2019, arXiv 1905.13319), from programs in Python, from equations and from the arithmetic of a rationale, and are shown
as one expression for the calculator.

A number in a solution that stands neither in the question nor in a short list of constants is refused: it came from a
step that was not written down, and whoever learns from it learns to guess.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from nanochat.calculator import evaluate

NUMBER = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|(?<!\d)\.\d+")
"""a number as questions write it; 1,200 is one"""
PI = "3.1416"
LARGEST_CONSTANT = 12
CONSTANTS = frozenset(
    Fraction(text)
    for text in "15 18 20 24 25 30 36 50 52 60 90 100 180 360 365 1000 3600 10000 0.5 0.25 0.1 0.01 3.14".split()  # noqa: SIM905
)
"""beside the whole numbers up to LARGEST_CONSTANT"""
TOLERANCE = Fraction(6, 1000)  # of the value: options are rounded


class Unreadable(ValueError):
    """A solution that cannot be written as a tree over the numbers of its question, and why."""


@dataclass(frozen=True, slots=True)
class Number:
    """The number at `place` of the question, counted from 0."""

    place: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A number that the question does not name, such as the 100 of a percentage."""

    text: str


@dataclass(frozen=True, slots=True)
class Operation:
    """`left symbol right`, the symbol one of the calculator's."""

    symbol: str
    left: Tree
    right: Tree


Tree = Number | Constant | Operation

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2, "**": 3}


def show(tree: Tree, numbers: Sequence[str]) -> str:
    """The tree as an expression, with no more parentheses than it needs. Raises IndexError where a number is missing."""
    if isinstance(tree, Number):
        return numbers[tree.place]
    if isinstance(tree, Constant):
        return tree.text
    own = _PRECEDENCE[tree.symbol]
    left, right = show(tree.left, numbers), show(tree.right, numbers)
    # Powers group from the right, everything else from the left. a+(b+c) is a+b+c and a*(b*c) is a*b*c, but not a*(b%c*d).
    same = isinstance(tree.right, Operation) and tree.right.symbol == tree.symbol and tree.symbol in "+*"
    same = same and not (tree.symbol == "*" and ("%" in right or "//" in right))
    if (inner := _strength(tree.left)) < own or (inner == own and tree.symbol == "**"):
        left = f"({left})"
    if (inner := _strength(tree.right)) < own or (inner == own and tree.symbol != "**" and not same):
        right = f"({right})"
    return left + tree.symbol + right


def _strength(tree: Tree) -> int:
    return _PRECEDENCE[tree.symbol] if isinstance(tree, Operation) else 4


def places(tree: Tree) -> frozenset[int]:
    """Which numbers of the question the tree uses."""
    if isinstance(tree, Operation):
        return places(tree.left) | places(tree.right)
    return frozenset((tree.place,)) if isinstance(tree, Number) else frozenset()


def subtrees(tree: Tree) -> Iterator[Tree]:
    """The tree, and everything in it."""
    yield tree
    if isinstance(tree, Operation):
        yield from subtrees(tree.left)
        yield from subtrees(tree.right)


def numbers_of(text: str) -> list[str]:
    """The numbers of a question in order, without the commas of thousands."""
    return [match[0].replace(",", "") for match in NUMBER.finditer(text)]


_MIXED = re.compile(r"(-?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")
_RATIO = re.compile(r"(-?)\s*(\d[\d,]*(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)")
_PLAIN = re.compile(r"(-?)\s*[$£€]?\s*(\d[\d,]*(?:\.\d+)?|\.\d+)")


def value_of(option: str) -> Fraction | None:
    """The first number that an option names: "Rs. 1,200", "2 1/2 %", "-3/4 m"; None where it names none."""
    text = option.replace("\N{MINUS SIGN}", "-")
    if (match := _MIXED.search(text)) and int(match[4]):
        size = int(match[2]) + Fraction(int(match[3]), int(match[4]))
    elif (match := _RATIO.search(text)) and Fraction(match[3]):
        size = Fraction(match[2].replace(",", "")) / Fraction(match[3])
    elif match := _PLAIN.search(text):
        size = Fraction(match[2].replace(",", ""))
    else:
        return None
    return -size if match[1] else size


def close(value: Fraction | None, wanted: Fraction | None) -> bool:
    """Whether a computed value is the one wanted, rounding allowed."""
    return value is not None and wanted is not None and abs(value - wanted) <= TOLERANCE * abs(wanted)


# ---- reading -------------------------------------------------------------------------------------------------------

_SYMBOLS: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
}  # fmt: skip


def read_expression(text: str, numbers: Sequence[str], known: Mapping[Fraction, Tree] | None = None) -> Tree:
    """
    The tree of an arithmetic expression, its numbers found in the question, in `known` (results of earlier steps, which
    become part of the tree) or among the constants. Raises Unreadable for any other number and for what is not arithmetic.
    """
    of_question = {Fraction(number): place for place, number in reversed(list(enumerate(numbers)))}
    known = known or {}

    def leaf(value: Fraction) -> Tree:
        if value in known:
            return known[value]
        if value in of_question:
            return Number(of_question[value])
        if value in CONSTANTS or (value.denominator == 1 and value <= LARGEST_CONSTANT):
            return Constant(_plain(value))
        raise Unreadable(f"{_plain(value)} comes from nowhere")

    return _read_node(_parse(text), leaf, {})


def read_program(text: str) -> Tree:
    """
    The tree of a program such as "n0 = 25.0; t0 = n0 * n0; answer = t0 / 100.0", a statement a line, n0 the first number of the
    question. Raises Unreadable.
    """
    names: dict[str, Tree] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        name = name.strip()
        if not equals:
            continue
        if re.fullmatch(r"n\d+", name):
            names[name] = Number(int(name[1:]))
        else:
            names[name] = _read_node(_parse(value), lambda number: Constant(_plain(number)), names)
    if "answer" not in names:
        raise Unreadable("the program has no answer")
    return names["answer"]


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise Unreadable(f"{text.strip()!r:.60} is not arithmetic") from None


def _read_node(node: ast.expr, leaf: Callable[[Fraction], Tree], names: Mapping[str, Tree]) -> Tree:
    if isinstance(node, ast.BinOp) and type(node.op) in _SYMBOLS:
        return Operation(
            _SYMBOLS[type(node.op)], _read_node(node.left, leaf, names), _read_node(node.right, leaf, names)
        )
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return Operation("-", Constant("0"), _read_node(node.operand, leaf, names))
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return leaf(Fraction(str(node.value)))
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.Call) and not node.keywords:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        make, count = _FUNCTIONS.get(function, (None, 0))
        if make and count == len(node.args):
            return make(*(_read_node(argument, leaf, names) for argument in node.args))
    raise Unreadable(f"{ast.unparse(node):.60} is not arithmetic that the calculator knows")


def _plain(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else format(float(value), "f").rstrip("0")


def read_formula(text: str) -> Tree:
    """
    The tree of a formula of MathQA: "multiply(n0,const_3)|subtract(#0,n1)|", n0 the first number of the question, #0 the result of
    the first step. The last step is the answer. Raises Unreadable for an operation that the calculator does not know.
    """
    steps: list[Tree] = []
    for name, arguments in re.findall(r"(\w+)\(([^)]*)\)", text):
        make, count = _FORMULA.get(name, (None, 0))
        operands = [_operand(word.strip(), steps) for word in arguments.split(",")]
        if make is None or len(operands) != count:
            raise Unreadable(f"{name}({arguments}) is not an operation that the calculator knows")
        steps.append(make(*operands))
    if not steps:
        raise Unreadable("the formula is empty")
    return steps[-1]


def _operand(word: str, steps: Sequence[Tree]) -> Tree:
    if match := re.fullmatch(r"n(\d+)", word):
        return Number(int(match[1]))
    if (match := re.fullmatch(r"#(\d+)", word)) and int(match[1]) < len(steps):
        return steps[int(match[1])]
    if word == "const_pi":
        return Constant(PI)
    if match := re.fullmatch(r"const_(\d+)(?:_(\d+))?", word):
        return Constant(_plain(Fraction(f"{match[1]}.{match[2] or 0}")))
    raise Unreadable(f"{word} is not a number of the question, a step or a constant")


def _op(symbol: str) -> Callable[..., Tree]:
    return lambda left, right: Operation(symbol, left, right)


_plus, _minus, _times, _over, _power = map(_op, ("+", "-", "*", "/", "**"))
_ZERO, _ONE, _TWO, _HUNDRED = (Constant(text) for text in ("0", "1", "2", "100"))
_HALF = Constant("0.5")

_FUNCTIONS: dict[str, tuple[Callable[..., Tree] | None, int]] = {
    "sqrt": (lambda a: _power(a, _HALF), 1),
    "floor": (lambda a: Operation("//", a, _ONE), 1),
    "int": (lambda a: Operation("//", a, _ONE), 1),
    "pow": (_power, 2),
}
_FORMULA: dict[str, tuple[Callable[..., Tree] | None, int]] = {
    "add": (_plus, 2), "subtract": (_minus, 2), "multiply": (_times, 2), "divide": (_over, 2), "power": (_power, 2),
    "reminder": (_op("%"), 2), "speed": (_over, 2), "floor": _FUNCTIONS["floor"], "sqrt": _FUNCTIONS["sqrt"],
    "negate": (lambda a: _minus(_ZERO, a), 1), "inverse": (lambda a: _over(_ONE, a), 1),
    "negate_prob": (lambda a: _minus(_ONE, a), 1), "stream_speed": (lambda a, b: _over(_plus(a, b), _TWO), 2),
    "square_area": (lambda a: _times(a, a), 1), "rectangle_area": (_times, 2),
    "square_edge_by_area": _FUNCTIONS["sqrt"], "square_edge_by_perimeter": (lambda a: _over(a, Constant("4")), 1),
    "square_perimeter": (lambda a: _times(Constant("4"), a), 1),
    "rectangle_perimeter": (lambda a, b: _times(_TWO, _plus(a, b)), 2),
    "triangle_area": (lambda a, b: _over(_times(a, b), _TWO), 2), "rhombus_area": (lambda a, b: _over(_times(a, b), _TWO), 2),
    "quadrilateral_area": (lambda a, b, c: _over(_times(a, _plus(b, c)), _TWO), 3),
    "circle_area": (lambda a: _times(Constant(PI), _power(a, _TWO)), 1),
    "circumface": (lambda a: _times(_times(_TWO, Constant(PI)), a), 1),
    "diagonal": (lambda a, b: _power(_plus(_power(a, _TWO), _power(b, _TWO)), _HALF), 2),
    "volume_cube": (lambda a: _power(a, Constant("3")), 1), "surface_cube": (lambda a: _times(Constant("6"), _power(a, _TWO)), 1),
    "volume_rectangular_prism": (lambda a, b, c: _times(_times(a, b), c), 3),
    "volume_cylinder": (lambda a, b: _times(_times(Constant(PI), _power(a, _TWO)), b), 2),
    "p_after_gain": (lambda a, b: _times(_plus(_ONE, _over(a, _HUNDRED)), b), 2),
    "original_price_before_loss": (lambda a, b: _over(_times(b, _HUNDRED), _minus(_HUNDRED, a)), 2),
    "original_price_before_gain": (lambda a, b: _over(_times(b, _HUNDRED), _plus(_HUNDRED, a)), 2),
}  # fmt: skip


# ---- the arithmetic of a rationale ---------------------------------------------------------------------------------

_TYPOGRAPHY = str.maketrans(
    {"×": "*", "÷": "/", "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{MULTIPLICATION X}": "*"}
)
_SEGMENT = re.compile(r"[\d(](?:[\d\s.()+\-*/x^%]|,(?=\d{3}(?!\d)))*[\d)%]")


def arithmetic_in(rationale: str) -> Iterator[str]:
    """Everything in a rationale that is arithmetic with an operation in it, spelled for the calculator, in order."""
    for match in _SEGMENT.finditer(rationale.translate(_TYPOGRAPHY)):
        text = re.sub(r"(?<=[\d)])\s*x\s*(?=[\d(])", "*", match[0])
        text = re.sub(r"(\d+(?:\.\d+)?)\s*%", r"(\1/100)", text.replace("^", "**"))
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
        text = re.sub(r"([\d)])\s*\(", r"\1*(", text)
        text = re.sub(r"\)\s*(?=\d)", ")*", text)
        if re.search(r"\d\s+\.?\d", text) or text.count("(") != text.count(")"):
            continue
        if re.search(r"[\d)]\s*[-+*/]", text):
            yield "".join(text.split())


def read_rationale(rationale: str, numbers: Sequence[str], answer: Fraction) -> Tree:
    """
    The tree by which a rationale comes from the numbers of the question to `answer`, through its own intermediate
    results. The one that uses most of the numbers, where there are several. Raises Unreadable.
    """
    known: dict[Fraction, Tree] = {}
    best: Tree | None = None
    for text in arithmetic_in(rationale):
        result = evaluate(text)
        if result is None:
            continue
        try:
            tree = read_expression(text, numbers, known)
        except Unreadable:
            continue
        if close(Fraction(result), answer):
            if places(tree) and (best is None or len(places(tree)) > len(places(best))):
                best = tree
        elif places(tree):
            known.setdefault(Fraction(result), tree)
    if best is None:
        raise Unreadable("no arithmetic in the rationale comes to the answer")
    return best

"""Arithmetic over the numbers of a question: what is read, what is shown, what is refused."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from nanochat.calculator import evaluate
from tasks.expressions import (
    Constant,
    Number,
    Operation,
    Tree,
    Unreadable,
    arithmetic_in,
    close,
    numbers_of,
    places,
    read_expression,
    read_formula,
    read_program,
    read_rationale,
    show,
    value_of,
)


def shown(tree: Tree, *numbers: str) -> str:
    return show(tree, numbers)


def some_tree(chance: random.Random, depth: int) -> Tree:
    if depth == 0 or chance.random() < 0.2:
        return Number(chance.randrange(3)) if chance.random() < 0.7 else Constant(chance.choice("1259"))
    symbol = chance.choice(("+", "-", "*", "/", "**", "%", "//"))
    right = Constant("2") if symbol == "**" else some_tree(chance, depth - 1)
    return Operation(symbol, some_tree(chance, depth - 1), right)


def by_hand(tree: Tree, numbers: list[Fraction]) -> Fraction:
    """The value of a tree by walking it, no text in between."""
    if isinstance(tree, Number):
        return numbers[tree.place]
    if isinstance(tree, Constant):
        return Fraction(tree.text)
    a, b = by_hand(tree.left, numbers), by_hand(tree.right, numbers)
    return {
        "+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b,
        "**": lambda: a**b, "%": lambda: a % b, "//": lambda: Fraction(a // b),
    }[tree.symbol]()  # fmt: skip


def test_the_shown_expression_has_the_value_of_the_tree() -> None:
    chance, compared = random.Random(3), 0
    for _ in range(2_000):
        tree, numbers = some_tree(chance, 3), [str(chance.randint(1, 30)) for _ in range(3)]
        try:
            value = by_hand(tree, [Fraction(number) for number in numbers])
        except ZeroDivisionError:
            assert evaluate(show(tree, numbers)) is None
            continue
        result = evaluate(show(tree, numbers))
        if result is not None and value.denominator == 1:
            assert Fraction(result) == value, show(tree, numbers)
            compared += 1
    assert compared > 500


def test_what_is_shown_is_read_back_as_the_same_arithmetic() -> None:
    numbers = ["820", "3", "850", "705"]
    tree = read_expression("820 * 3 - (850 + 705)", numbers)
    assert tree == Operation("-", Operation("*", Number(0), Number(1)), Operation("+", Number(2), Number(3)))
    assert show(tree, numbers) == "820*3-(850+705)"
    assert show(tree, ["1", "2", "3", "4"]) == "1*2-(3+4)"
    assert places(tree) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("tree", "expression"),
    [
        (Operation("-", Number(0), Operation("-", Number(1), Number(2))), "7-(5-3)"),
        (Operation("-", Operation("-", Number(0), Number(1)), Number(2)), "7-5-3"),
        (Operation("+", Number(0), Operation("+", Number(1), Number(2))), "7+5+3"),
        (Operation("/", Number(0), Operation("*", Number(1), Number(2))), "7/(5*3)"),
        (Operation("**", Operation("**", Number(0), Number(1)), Number(2)), "(7**5)**3"),
        (Operation("**", Number(0), Operation("**", Number(1), Number(2))), "7**5**3"),
    ],
)
def test_parentheses_stand_where_they_are_needed(tree: Tree, expression: str) -> None:
    assert shown(tree, "7", "5", "3") == expression


def test_a_formula_of_mathqa() -> None:
    tree = read_formula("divide(const_1,n1)|divide(const_1,n0)|add(#0,#1)|divide(const_1,#2)|")
    assert shown(tree, "4", "12") == "1/(1/12+1/4)"
    assert shown(read_formula("circle_area(n0)|"), "5") == "3.1416*5**2"
    assert shown(read_formula("multiply(n0,const_0_2778)"), "36") == "36*0.2778"


@pytest.mark.parametrize(
    "formula",
    [
        "",
        "gcd(n0,n1)|",
        "add(n0)|",
        "add(n0,#0)|",
        "add(n0,n1,n2)|",
        "add(n0,const_deg_to_rad)|",
        "add(n0,x)",
    ],
)
def test_a_formula_that_the_calculator_cannot_do_is_refused(formula: str) -> None:
    with pytest.raises(Unreadable):
        read_formula(formula)


def test_a_program_in_python() -> None:
    program = "n0 = 25.0\nn1 = 20.0\nt0 = n0 * n1\nt1 = math.sqrt(t0)\nanswer = t1 / 100.0\nprint(answer)"
    assert shown(read_program(program), "25", "20") == "(25*20)**0.5/100"
    with pytest.raises(Unreadable, match="no answer"):
        read_program("n0 = 3.0")
    for bad in ("answer = open('x')", "answer = n9", "answer = 1 +", "answer = 'a'"):
        with pytest.raises(Unreadable):
            read_program(bad)


def test_a_number_from_nowhere_is_refused() -> None:
    with pytest.raises(Unreadable, match="737 comes from nowhere"):
        read_expression("737*2", ["5"])
    known = {Fraction(737): Operation("*", Number(0), Number(0))}
    assert shown(read_expression("737*2", ["5"], known), "5") == "5*5*2"


def test_the_arithmetic_of_a_rationale_is_followed_through_its_own_results() -> None:
    question = "A shirt costs $1,200 and is sold at 25% off. What do 3 cost?"
    numbers = numbers_of(question)
    assert numbers == ["1200", "25", "3"]
    rationale = (
        "Discount = 1,200 × 25% = 300\nso one is 1200 − 300 = 900, and three are 900 x 3 = 2700. Answer: D"
    )
    tree = read_rationale(rationale, numbers, Fraction(2700))
    assert show(tree, numbers) == "(1200-1200*(25/100))*3"
    assert evaluate(show(tree, numbers)) == "2700"
    with pytest.raises(Unreadable, match="comes to the answer"):
        read_rationale(rationale, numbers, Fraction(2701 * 2))


def test_words_with_an_x_are_no_multiplication() -> None:
    assert list(arithmetic_in("x = 12 and 3x + 5 = 20, so max 4x5=20")) == ["4*5"]
    assert list(arithmetic_in("(3+4 = 7")) == []


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("In 1,200 days", ["1200"]),
        ("1,2,3 and 4", ["1", "2", "3", "4"]),
        ("$5.50 or .25 m, 3/4", ["5.50", ".25", "3", "4"]),
        ("7%.", ["7"]),
        ("no number", []),
    ],
)
def test_the_numbers_of_a_question(text: str, numbers: list[str]) -> None:
    assert numbers_of(text) == numbers


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("Rs. 1,200", 1200), ("2 1/2 %", Fraction(5, 2)), ("-3/4 m", Fraction(-3, 4)), ("$-12.50", Fraction(-25, 2)),
        ("\N{MINUS SIGN}4", -4), (".25", Fraction(1, 4)), ("None of these", None), ("3:4", 3), ("5/0", 5),
    ],
)  # fmt: skip
def test_the_value_of_an_option(option: str, value: Fraction | None) -> None:
    assert value_of(option) == value


def test_an_option_may_be_rounded() -> None:
    assert close(Fraction("0.4375"), Fraction("0.44")) and close(Fraction(-4), Fraction(-4))
    assert not close(Fraction("0.43"), Fraction("0.44")) and not close(None, Fraction(1))
    assert not close(Fraction(1, 100), Fraction(0))

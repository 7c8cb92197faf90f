"""
The same problem with other numbers, with fewer words, and wrong options where a source has none.

A question of which no two copies have the same numbers can only be learnt by how it is solved. What changes stays of its kind:
a price keeps its cents, a percentage stays below 100, a whole answer stays whole, and the options move along with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from random import Random

from tasks.expressions import NUMBER, Constant, Number, Operation, Tree, places, subtrees
from tasks.problem import LETTERS
from tasks.solved import Solved, compute

MAX_TRIES = 12  # to find other numbers that leave the answer a sensible one
UNITS = (("", ""),) * 4 + (
    ("$", ""),
    ("Rs. ", ""),
    ("", "%"),
    ("", " km"),
    ("", " days"),
    ("", " hours"),
    ("", " years"),
)


def changed_number(text: str, random: Random) -> str:
    """
    Another number of the same kind: as many decimals, mostly as round, below 100 where it was, a year near a year.
    0 and 1 stay, and so do numbers beyond ten million.
    """
    if "." in text:
        decimals = len(text.partition(".")[2])
        value = round(float(text) * random.uniform(0.4, 2.2), decimals)
        return f"{value:.{decimals}f}" if value > 0 else text
    value = int(text)
    if value <= 1 or value > 10_000_000:
        return text
    if 1900 < value < 2100:
        return str(value + random.randint(-9, 9))
    zeros = len(text) - len(text.rstrip("0"))
    head = value // 10**zeros
    digit = random.randint(1 if zeros else 2, 9)
    head = digit if head < 10 else max(2, int(head * random.uniform(0.4, 2.2)))
    if zeros and random.random() < 0.2:  # 300 becomes 450 as well as 400
        head, zeros = 10 * head + random.choice((0, 5)), zeros - 1
    other = head * 10**zeros
    return str(min(other, 99) if value < 100 else other)


def with_other_numbers(one: Solved, random: Random) -> Solved:
    """
    The same question with other numbers; the same as it was where a few tries give no sensible answer.

    Equal numbers stay equal and different ones different. The answer stays whole if it was, and positive if it was.
    """
    before = compute(one.tree, one.numbers)
    assert before is not None
    for _ in range(MAX_TRIES):
        other = {number: changed_number(number, random) for number in sorted(set(one.numbers))}
        if len(set(other.values())) < len(other):
            continue
        numbers = tuple(other[number] for number in one.numbers)
        result = compute(one.tree, numbers)
        if result is None or not _like(Fraction(result), Fraction(before)):
            continue
        options = _other_options(one, Fraction(before), Fraction(result), random)
        if options is None:
            continue
        return Solved(_replaced(one.question, numbers), numbers, one.tree, options, one.gold)
    return one


_PLAIN_WORD = re.compile(
    r"(?!(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|half|third|quarter|twice|thrice|double|triple)\b)"
    r"[^\W\d_][^\d]*",
    re.IGNORECASE,
)


def with_fewer_words(one: Solved, share: float, random: Random) -> Solved:
    """The same question without that share of its words, drawn by lot; numbers and signs all stay, and words for numbers."""
    words = one.question.split(" ")
    kept = [word for word in words if not _PLAIN_WORD.fullmatch(word) or random.random() >= share]
    return replace(one, question=" ".join(kept))


def _like(value: Fraction, before: Fraction) -> bool:
    if before > 0 >= value or abs(value) > 50 * abs(before) + 100:
        return False
    return value.denominator == 1 if before.denominator == 1 else abs(value) > Fraction(1, 100)


def _replaced(text: str, numbers: Sequence[str]) -> str:
    """`text` with its numbers in the order given."""
    supply = iter(numbers)
    return NUMBER.sub(lambda match: next(supply), text)


def _other_options(one: Solved, before: Fraction, after: Fraction, random: Random) -> tuple[str, ...] | None:
    """The options moved along with the answer: as far from it as they were, or in the same proportion."""
    moved = []
    for place, option in enumerate(one.options):
        found = list(NUMBER.finditer(option))
        if len(found) != 1:  # "3:4", "2 1/2": which number is the answer's cannot be told
            return None
        old = Fraction(found[0][0].replace(",", ""))
        whole = before.denominator == 1 and old.denominator == 1
        if place == one.gold:
            value = after
        elif whole and random.random() < 0.5:
            value = after + old - before
        else:
            value = after * old / before if before else after + old
            value = Fraction(round(value)) if whole else value
        decimals = len(found[0][0].partition(".")[2]) or (0 if value.denominator == 1 else 2)
        grouped = "," if "," in found[0][0] else ""
        number = f"{float(value):{grouped}.{decimals}f}"
        moved.append(option[: found[0].start()] + number + option[found[0].end() :])
    return tuple(moved) if len(set(moved)) == len(moved) else None


def mistakes(tree: Tree, random: Random) -> Tree:
    """The tree with one thing in it wrong: another operation, the sides exchanged, a step left out, a number taken twice."""
    inner = [node for node in subtrees(tree) if isinstance(node, Operation)]
    if not inner:
        return tree
    target = random.choice(inner)
    used = sorted(places(tree))
    wrong = random.choice(
        (
            Operation(random.choice("+-*/"), target.left, target.right),
            Operation(target.symbol, target.right, target.left),
            target.left,
            Operation(target.symbol, target.left, Number(random.choice(used)) if used else Constant("2")),
        )
    )
    return _exchanged(tree, target, wrong)


def _exchanged(tree: Tree, target: Tree, by: Tree) -> Tree:
    if tree is target:
        return by
    if isinstance(tree, Operation):
        return Operation(tree.symbol, _exchanged(tree.left, target, by), _exchanged(tree.right, target, by))
    return tree


def made_options(one: Solved, random: Random) -> tuple[str, ...]:
    """The answer and four wrong ones, for a question that has none: mistakes of the solution, and values near the answer."""
    value = Fraction(compute(one.tree, one.numbers) or 0)
    decimals = 0 if value.denominator == 1 else 2
    before, after = random.choice(UNITS)
    shown = [f"{float(value):.{decimals}f}"]
    scale = max(1, int(abs(value) / 50)) if abs(value) >= 200 else 1
    while len(shown) < len(LETTERS):
        kind = random.random()
        if kind < 0.35:
            result = compute(mistakes(one.tree, random), one.numbers)
            other = Fraction(result) if result else value
        elif kind < 0.75:
            other = value + random.choice((-1, 1)) * random.choice((1, 2, 3, 4, 5, 10, 12, 20)) * scale
        else:
            other = value * Fraction(random.choice((50, 75, 80, 90, 110, 120, 125, 150, 200)), 100)
        text = f"{float(round(other) if not decimals else other):.{decimals}f}"
        if text not in shown and abs(other) <= 10 * abs(value) + 100 and (other > 0 or value <= 0):
            shown.append(text)
    return tuple(f"{before}{text}{after}" for text in shown)

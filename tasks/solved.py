"""
Questions whose solution is known as a tree over their numbers, and the data sets that they are read from.

MathQA's formulas and programs, the calls of GSM8K, the equations of MAWPS and the arithmetic in AQuA's rationales. Whatever a row
claims, its solution is computed: one that does not come to the answer that the row gives is refused, which is a third of MathQA.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from nanochat.calculator import evaluate
from nanochat.common import base_dir
from tasks.aqua import AQUA, aqua_folders
from tasks.common import Conversation, Hub, hub_rows, load_rows
from tasks.expressions import (
    Tree,
    Unreadable,
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
from tasks.gsm8k import GSM8K
from tasks.problem import LETTERS, Problem, parse_problem
from tasks.rows import BadRow, DataUnavailable, find_file, keep_rows, parse_rows, read_lines

MAX_CHARACTERS = 70  # of an expression


@dataclass(frozen=True, slots=True)
class Solved:
    """A question, how it is solved, and its options where the source has them."""

    question: str
    numbers: tuple[str, ...]
    tree: Tree
    options: tuple[str, ...] = ()
    gold: int = 0
    """place of the right option"""


def solved(
    question: str, tree: Tree, answer: Fraction | None, options: Sequence[str] = (), gold: int = 0
) -> Solved:
    """Checks that the tree comes to the answer. Raises BadRow where it does not."""
    numbers = tuple(numbers_of(question))
    result = compute(tree, numbers)
    if result is None or not close(Fraction(result), answer):
        raise BadRow("the solution does not come to the answer")
    if not places(tree):
        raise BadRow("the solution uses no number of the question")
    return Solved(question, numbers, tree, tuple(options), gold)


def compute(tree: Tree, numbers: Sequence[str]) -> str | None:
    """What the calculator says of the tree; None where a number is missing, or the expression is long or has no value."""
    try:
        expression = show(tree, numbers)
    except IndexError:
        return None
    return evaluate(expression) if len(expression) <= MAX_CHARACTERS else None


# ---- from a row --------------------------------------------------------------------------------------------------


def natural(text: str) -> str:
    """MathQA's tokenised lower case ("rs . 36 , a gains 10 % .") as people write it ("Rs. 36, A gains 10%.")."""
    text = re.sub(r"\brs \.? ?(?=\d)", "Rs. ", text)
    text = re.sub(r"([$(]) (?=\S)", r"\1", text)
    text = re.sub(r" ([.,?!;:%)])", r"\1", text)
    text = re.sub(r"(\w) ['\u2019] ?s\b", r"\1's", text)
    text = re.sub(r"(\d) ([-/*^]) (?=\d)", r"\1\2", text)
    text = re.sub(r" / ", "/", text)
    text = re.sub(r"(?:^|(?<=[.?!] ))[a-z]", lambda match: match[0].upper(), text)
    # A letter that stands alone is a name; "a" is mostly an article.
    return re.sub(r"(?<![\w'])[b-hj-z](?![\w'])", lambda match: match[0].upper(), text).strip()


def _naturally(text: str) -> str:
    """`natural`, unless that would change a number."""
    found = natural(text)
    return found if numbers_of(found) == numbers_of(text) else text


def _of_problem(problem: Problem, tree: Tree) -> Solved:
    gold = LETTERS.index(problem.gold)
    return solved(problem.question, tree, value_of(problem.gold_option), problem.options, gold)


def from_mathqa(row: dict[str, Any]) -> Solved:
    """A row of MathQA in AQuA's shape, `formula` beside it: by its formula, or by its rationale where that does not hold."""
    problem = parse_problem(row)
    problem = Problem(
        _naturally(problem.question), tuple(map(_naturally, problem.options)), problem.gold, problem.rationale
    )
    try:
        return _of_problem(problem, read_formula(str(row.get("formula", ""))))
    except (Unreadable, BadRow):
        return from_rationale(problem)


def from_rationale(problem: Problem) -> Solved:
    """A row of AQuA whose rationale holds its arithmetic."""
    answer = value_of(problem.gold_option)
    if answer is None:
        raise BadRow("the right option names no number")
    try:
        return _of_problem(problem, read_rationale(problem.rationale, numbers_of(problem.question), answer))
    except Unreadable as error:
        raise BadRow(str(error)) from None


def from_program(row: dict[str, Any]) -> Solved:
    """{"question", "program", "answer"}: MathQA's numeric questions with a program in Python."""
    try:
        question, answer = _naturally(row["question"]), value_of(row["answer"])
        return solved(question, read_program(row["program"]), answer)
    except (KeyError, TypeError):
        raise BadRow("question, program or answer is missing") from None
    except Unreadable as error:
        raise BadRow(str(error)) from None


def from_equation(row: dict[str, Any]) -> Solved:
    """{"question", "equation", "answer"}: MAWPS (Koncel-Kedziorski et al. 2016), x alone on the left."""
    try:
        question, equation, answer = (
            _naturally(row["question"]),
            row["equation"],
            value_of(str(row["answer"])),
        )
    except (KeyError, TypeError):
        raise BadRow("question, equation or answer is missing") from None
    unknown, _, right = equation.partition("=")
    if unknown.strip().lower() != "x":
        raise BadRow("the equation is not solved for x")
    try:
        return solved(question, read_expression(right, numbers_of(question)), answer)
    except Unreadable as error:
        raise BadRow(str(error)) from None


def from_calls(question: str, calls: Sequence[str], answer: str) -> Solved:
    """A question of GSM8K, its calculator calls in order, each using the results of those before."""
    known: dict[Fraction, Tree] = {}
    tree: Tree | None = None
    numbers = numbers_of(question)
    try:
        for call in calls:
            tree = read_expression(re.sub(r"([\d.]+)%", r"(\1/100)", call), numbers, known)
            if result := evaluate(call):
                known[Fraction(result)] = tree
    except Unreadable as error:
        raise BadRow(str(error)) from None
    if tree is None:
        raise BadRow("no calculator call")
    return solved(question, tree, value_of(answer))


@dataclass(frozen=True, slots=True)
class Source:
    """A set of questions with solutions, and how often one of them is drawn against one of another set."""

    name: str
    weight: float
    read: Callable[[str | Path | None], tuple[list[Solved], int]]
    """(--aqua_path) -> what can be used, and how many rows were read"""


def _kept(rows: Sequence[Any], read: Callable[[Any], Solved]) -> tuple[list[Solved], int]:
    found = []
    for row in rows:
        try:
            found.append(read(row))
        except BadRow:  # of a noisy source most rows may fail; how many did is said once
            continue
    return found, len(rows)


def _aqua(path: str | Path | None) -> tuple[list[Solved], int]:
    return _kept(AQUA("train", path=path, seed=None).problems, from_rationale)


def _beside_aqua(
    name: str, path: str | Path | None, published: Callable[[list[str]], list[dict[str, Any]]] | None = None
) -> list[dict[str, Any]]:
    """The rows of a file that lies where AQuA's do, or what is `published` in its place, which is then kept there."""
    folders = aqua_folders(path)
    for folder in folders:
        if file := find_file(folder if folder.is_dir() else folder.parent, [name]):
            return parse_rows(read_lines(file), dict, source=str(file)).items
    tried = [str(folder / f"{name}.jsonl.gz") for folder in folders]
    if published is None:
        raise DataUnavailable(name, tried)
    rows = published(tried)
    keep_rows(base_dir() / "aqua" / f"{name}.jsonl.gz", rows)
    return rows


def published_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of MathQA as it is published ("a ) 38 , b ) 27 , ...", letters in lower case) in AQuA's shape."""
    options = re.split(r"(?:^|,)\s*(?=[a-e] \) )", row["options"].strip("[]'\" "))
    return {
        "question": row["Problem"],
        "options": [f"{option[0].upper()}){option[4:]}" for option in options if option],
        "rationale": row["Rationale"].strip('" '),
        "correct": row["correct"].upper(),
        "formula": row["linear_formula"],
    }


def _mathqa(path: str | Path | None) -> tuple[list[Solved], int]:
    def published(tried: list[str]) -> list[dict[str, Any]]:
        return [
            published_row(row) for row in hub_rows(Hub("regisss/math_qa", None, "train"), "MathQA", tried)
        ]

    return _kept(_beside_aqua("train_mathqa", path, published), from_mathqa)


def _mathqa_programs(path: str | Path | None) -> tuple[list[Solved], int]:
    return _kept(_beside_aqua("mathqa_gain_numeric", path), from_program)


def _gsm8k(path: str | Path | None) -> tuple[list[Solved], int]:
    def read(conversation: Conversation) -> Solved:
        user, assistant = conversation["messages"]
        calls = [part["text"] for part in assistant["content"] if part["type"] == "python"]
        return from_calls(user["content"], calls, conversation["answer_number"])

    return _kept(list(GSM8K("train")), read)


def _mawps(path: str | Path | None) -> tuple[list[Solved], int]:
    return _kept(load_rows("mawps", dict, hub=None).items, from_equation)


SOURCES = (
    Source("AQuA rationales", 3, _aqua),
    Source("MathQA formulas", 3, _mathqa),
    Source("MathQA programs", 2, _mathqa_programs),
    Source("GSM8K calls", 0.5, _gsm8k),
    Source("MAWPS equations", 1, _mawps),
)

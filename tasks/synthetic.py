"""
The built-in problem set: AQuA-shaped questions of our own, endless and seeded, for a machine without network or data.

The families stand in tasks/families.py; here a family's numbers are divided among the splits, a row gets its options, and
it is decided how good its rationale is. Row i follows from (split, seed, i) alone and families and levels take turns, so
any prefix of a split is balanced. A hash of (family, numbers) gives each problem its split, whatever the order of the
numbers: a held-out problem cannot have been trained on, however long the stream.

The surprising choice is that rationales are of MIXED quality, as AQuA's are: some families are mostly worked, the others
mostly give the bare letter. A model trained on that has both styles, and reinforcement learning has something to find.
How much of its gain is merely that choice of style is measured by decoding with `opens_bare` tokens forbidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from random import Random
from typing import Any, Literal

from nanochat.common import UserError, derive_seed
from tasks.common import Conversation, MultipleChoice
from tasks.families import FAMILIES, MAX_VALUE, Numbers, Story
from tasks.problem import LETTERS, Problem

Split = Literal["train", "validation", "test"]
Quality = Literal["mixed", "worked"]
Difficulty = int | tuple[int, int] | None

SPLIT_PERCENT: dict[str, int] = {"train": 70, "validation": 15, "test": 15}
SIZES: dict[str, int] = {"train": 100_000, "validation": 1_024, "test": 1_024}
MIXED_QUALITY: dict[str, float] = {name: 0.2 for name in FAMILIES} | {
    "linear": 0.95,
    "average": 0.95,
    "cost": 0.95,
    "interest": 0.95,
}
"""share of a family's rows whose rationale is worked when quality is "mixed"; the others are bare"""
BARE_OPENING = "Answer"
"""how a bare reply begins; a worked one begins with a digit"""
MAX_MISTAKES = 3
MAX_REDRAWS = 8
OFFSETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 20)

_EQUATION = re.compile(r"([\d+\-*/]+)=(\d+)")
_TERM = re.compile(r"([+\-*/]?)(\d+)")


def opens_bare(token: bytes) -> bool:
    """Whether a reply that begins with `token` is in the bare style; forbid such tokens at the first place."""
    opening = BARE_OPENING.encode()
    return bool(token) and (opening.startswith(token) or token.startswith(opening))


def check_arithmetic(text: str) -> int:
    """Evaluate each `expression=value` of `text` exactly; how many there were. AssertionError where one is wrong."""
    equations = _EQUATION.findall(text)
    for expression, value in equations:
        assert _evaluate(expression) == int(value), f"{expression}={value} is wrong in {text!r}"
    return len(equations)


def _evaluate(expression: str) -> Fraction:
    """A sum of products of whole numbers: "7*11", "12+18-3"."""
    total, product = Fraction(0), Fraction(0)
    for operator, digits in _TERM.findall(expression):
        number = Fraction(int(digits))
        if operator == "*":
            product *= number
        elif operator == "/":
            product /= number
        else:
            total, product = total + product, -number if operator == "-" else number
    return total + product


def split_of(family: str, numbers: Numbers) -> str:
    """The split that owns these numbers of this family, in whatever order they stand."""
    place = derive_seed("synthetic split", family, *sorted(numbers)) % 100
    for split, percent in SPLIT_PERCENT.items():
        if place < percent:
            return split
        place -= percent
    raise AssertionError("SPLIT_PERCENT does not add up to 100")


@cache
def operands(family: str, level: int, split: str) -> tuple[Numbers, ...]:
    """The numbers of one family and level that belong to `split`."""
    return tuple(
        numbers for numbers in FAMILIES[family][level].operands() if split_of(family, numbers) == split
    )


def choose_options(answer: int, mistakes: Sequence[int], random: Random) -> list[int]:
    """
    Five distinct values in random order, `answer` among them.

    The rank of the answer is drawn first, uniformly, and the wrong values are made to fit. An answer in the middle ranks
    would too often be the value nearest the mean of all, so that is drawn too, and the wrong values redrawn to fit.
    """
    rank = random.randrange(len(LETTERS))
    central = 0 < rank < len(LETTERS) - 1 and random.random() < 1 / (len(LETTERS) - 2)
    for _ in range(MAX_REDRAWS):
        values = _values_around(answer, mistakes, rank, random)
        mean = sum(values) / len(values)
        if (min(values, key=lambda value: abs(value - mean)) == answer) == central:
            break
    random.shuffle(values)
    return values


def _values_around(answer: int, mistakes: Sequence[int], rank: int, random: Random) -> list[int]:
    """`answer` and four wrong values, `rank` of them smaller: the pupil's mistakes, then neighbours of what is there."""
    values = [answer]
    room = {False: rank, True: len(LETTERS) - 1 - rank}  # by whether a value is larger than the answer

    def add(value: int) -> None:
        if value not in values and 0 < value <= MAX_VALUE and room[value > answer]:
            room[value > answer] -= 1
            values.append(value)

    for mistake in random.sample(mistakes, len(mistakes)):
        if len(values) <= MAX_MISTAKES:
            add(mistake)
    while len(values) < len(LETTERS):
        add(random.choice(values) + random.choice(OFFSETS) * random.choice((-1, 1)))
    return values


def make_problem(story: Story, random: Random, *, worked: bool) -> Problem:
    """The story with options, its rationale written out or left away; checks its own arithmetic."""
    rationale = f"{story.steps}. {story.answer}"
    assert check_arithmetic(rationale) and story.steps.endswith(f"={story.answer}"), story
    values = choose_options(story.answer, story.mistakes, random)
    gold = LETTERS[values.index(story.answer)]
    return Problem(story.question, tuple(map(str, values)), gold, rationale if worked else "")


class Synthetic(MultipleChoice):
    """
    The synthetic set as a task: `Synthetic("validation")`, `Synthetic("train", size=20_000, quality="worked")`.

    `difficulty` is 0, 1 or 2 (a problem of one, two or three steps), an inclusive pair of them, or None for all.
    The questions of a split do not depend on `quality`.
    """

    name = "SYNTHETIC"
    baseline = 0.2

    def __init__(
        self,
        split: Split = "train",
        *,
        size: int | None = None,
        seed: int = 42,
        difficulty: Difficulty = None,
        quality: Quality = "mixed",
        families: Sequence[str] | None = None,
        permute_seed: int | None = None,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        if split not in SPLIT_PERCENT:
            raise UserError(f"SYNTHETIC has no split {split!r}; use {', '.join(SPLIT_PERCENT)}")
        if quality not in ("mixed", "worked"):
            raise UserError(f"SYNTHETIC has no quality {quality!r}; use mixed or worked")
        self.split, self.quality, self.seed = split, quality, seed
        self.size = SIZES[split] if size is None else size
        if self.size < 0:
            raise UserError(f"SYNTHETIC: size={size} is below 0; give a number of problems")
        levels, names = _levels(difficulty), _names(families)
        self._cells = [(name, level) for name in names for level in levels]
        Random(derive_seed("synthetic cells", seed)).shuffle(self._cells)
        self._numbers = [self._shuffled_operands(*cell) for cell in self._cells]
        self._permute_seed = permute_seed
        self.source = (
            f"built-in synthetic problems, {split}: {len(names)} families, levels {levels[0]} to {levels[-1]}, "
            f"{sum(map(len, self._numbers)):,} tuples of numbers, {quality} rationales"
        )

    def _shuffled_operands(self, family: str, level: int) -> list[Numbers]:
        numbers = list(operands(family, level, self.split))
        Random(derive_seed("synthetic numbers", self.seed, family, level)).shuffle(numbers)
        return numbers

    def num_examples(self) -> int:
        return self.size

    def num_distinct(self) -> int:
        """How many rows there are before any family's numbers come a second time."""
        return min(map(len, self._numbers)) * len(self._cells)

    def problem(self, index: int) -> Problem:
        """The Problem at `index` of this slice, in the order of options that the conversation shows."""
        return self._make(self.indices()[index])[0]

    def get_example(self, index: int) -> Conversation:
        problem, extras = self._make(index)
        return problem.conversation() | extras

    def gold(self, index: int) -> str:
        return self._make(index)[0].gold

    def _make(self, index: int) -> tuple[Problem, dict[str, Any]]:
        turn, place = divmod(index, len(self._cells))
        family, level = self._cells[place]
        numbers = self._numbers[place][turn % len(self._numbers[place])]
        random = Random(derive_seed("synthetic", self.split, self.seed, index))
        worked = random.random() < MIXED_QUALITY[family] or self.quality == "worked"
        story = FAMILIES[family][level].tell(numbers, random)
        problem = make_problem(story, random, worked=worked)
        if self._permute_seed is not None:
            problem = problem.shuffled(derive_seed("options", self._permute_seed, index))
        style = "worked" if worked else "bare"
        return problem, {"family": family, "difficulty": level, "style": style, "numbers": list(numbers)}


def _levels(difficulty: Difficulty) -> list[int]:
    low, high = (
        (0, 2) if difficulty is None else (difficulty,) * 2 if isinstance(difficulty, int) else difficulty
    )
    if not 0 <= low <= high <= 2:
        raise UserError(f"SYNTHETIC: difficulty={difficulty} is not 0, 1, 2 or an ascending pair of them")
    return list(range(low, high + 1))


def _names(families: Sequence[str] | None) -> list[str]:
    names = list(FAMILIES) if families is None else list(families)
    if unknown := [name for name in names if name not in FAMILIES]:
        raise UserError(f"SYNTHETIC: no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    if not names:
        raise UserError("SYNTHETIC: families is empty; leave it out for all of them")
    return names

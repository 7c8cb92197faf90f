"""
Word problems whose whole solution is one calculator call, with numbers of their own in every copy.

    What is the average of 12, 18 and 36?  - 20=A - 22=B ...
    <|python_start|>(12+18+36)/3<|python_end|><|output_start|>22<|output_end|>Answer: B

A small model cannot carry a long calculation; it can learn which operation a wording asks for, and to find a result among
the options. So the arithmetic of real questions (MathQA's formulas, GSM8K's calls, the equations of rationales) is read as
a tree over the numbers of the question; a solution that does not come to the answer that its row gives is thrown away. The
surprising choices: no two copies of a question have the same numbers or all of its words, so that less can be learnt by heart;
and in three of ten examples the call is wrong, is not trained, and "No option." is the right thing to say of its result.

This is program induction (Ling et al. 2017, arXiv 1705.04146; Amini et al. 2019, arXiv 1905.13319) in a GPT's clothes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Literal

from nanochat.common import UserError, base_dir, data_dir, derive_seed
from tasks.aqua import AQUA
from tasks.common import Conversation, MultipleChoice, render_multiple_choice
from tasks.expressions import Tree, show, value_of
from tasks.problem import LETTERS, Problem, masked_key, shares_words
from tasks.rows import DataUnavailable
from tasks.solved import SOURCES, Solved, Source, compute
from tasks.variation import MAX_TRIES, made_options, mistakes, with_fewer_words, with_other_numbers

Split = Literal["train", "validation"]

CHANGED = 0.75  # share of the examples that get numbers of their own
DROPPED = 0.3  # of the words of an example, at most: what is left of a wording must do
MISSED = 0.3  # share of the examples in which the call is a mistake, and no option has its result
NO_OPTION = "No option."
FAR = Fraction(3, 100)  # of an option: a result so far from all of them is none of them
HELD_OUT = 40  # one question in so many is for validation, with all that differ from it in numbers alone


@dataclass(frozen=True, slots=True)
class Collected:
    """What one source has: its questions by split, how many rows it has in all; nothing where it cannot be had."""

    source: Source
    questions: Mapping[Split, Sequence[Solved]]
    total: int | None = None

    def note(self, split: Split) -> str:
        """For the stage to print: how many questions of the source are used."""
        if self.total is None:
            return f"no {self.source.name}"
        return f"{self.source.name}: {len(self.questions[split]):,} of {self.total:,}"


@functools.lru_cache(maxsize=2)
def read_sources(path: str | None, places: tuple[str, ...]) -> tuple[Collected, ...]:
    """
    Every source, less the questions that AQuA's held-out splits know. `places` keys the cache.

    Raises DataUnavailable where no source has a question.
    """
    held_out = [problem for split in ("validation", "test") for problem in _held_out(split, path)]
    masked = {masked_key(problem) for problem in held_out}
    found: list[Collected] = []
    missing: list[str] = []
    for source in SOURCES:
        questions: dict[Split, list[Solved]] = {"train": [], "validation": []}
        try:
            rows, total = source.read(path)
        except DataUnavailable as error:
            found.append(Collected(source, questions))
            missing += error.tried
            continue
        overlaps = shares_words((row.question for row in rows), (problem.question for problem in held_out))
        for row, overlap in zip(rows, overlaps, strict=True):
            key = masked_key(Problem(row.question, (), ""))
            if not overlap and key not in masked:
                questions[split_of(key)].append(row)
        found.append(Collected(source, questions, total))
    if not any(any(one.questions.values()) for one in found):
        raise DataUnavailable(Programs.name, missing)
    return tuple(found)


def split_of(key: str) -> Split:
    """Where the questions of a masked key belong: the wording decides, so no validation question is trained on renumbered."""
    return "train" if derive_seed("programs held out", key) % HELD_OUT else "validation"


def _held_out(split: str, path: str | None) -> list[Problem]:
    try:
        return AQUA(split, path=path).problems
    except DataUnavailable:
        return []


class Programs(MultipleChoice):
    """
    `size` questions with solutions, drawn from all sources that can be had: `Programs("train", size=20_000)`.

    Example n depends on split, seed and n alone. Those of validation are as their source has them, options in any order. None is
    a question of AQuA's validation or test with other numbers, or shares thirteen words in a row with one.
    Raises DataUnavailable where no source can be had, UserError for a size below 1.
    """

    name = "PROGRAMS"
    baseline = 0.2

    def __init__(
        self,
        split: Split = "train",
        *,
        size: int,
        seed: int = 42,
        path: str | Path | None = None,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        if size < 1:
            raise UserError(f"{self.name}: size={size} must be at least 1")
        places = (str(data_dir()), str(base_dir()))
        found = read_sources(None if path is None else str(path), places)
        self.source = "; ".join(one.note(split) for one in found)
        self._found = [one.questions[split] for one in found]
        self._weights = [one.source.weight * len(one.questions[split]) for one in found]
        if not any(self._weights):
            raise DataUnavailable(self.name, [f"no question of the {split} split"])
        self._size, self._seed, self._split = size, seed, split

    def num_examples(self) -> int:
        return self._size

    def get_example(self, index: int) -> Conversation:
        random = Random(derive_seed("programs", self._split, self._seed, index))
        rows = random.choices(self._found, self._weights)[0]
        one = random.choice(rows)
        if self._split == "validation":
            return conversation_of(one, random)
        if random.random() < CHANGED:
            one = with_other_numbers(one, random)
        one = with_fewer_words(one, random.uniform(0, DROPPED), random)
        return conversation_of(one, random, missed=random.random() < MISSED)


def conversation_of(one: Solved, random: Random, *, missed: bool = False) -> Conversation:
    """
    The question with its options in any order; the call, its result, the letter.

    With `missed` the call is a mistake, if one can be found whose result no option has, and what is trained is to say so.
    """
    options = one.options or made_options(one, random)
    wrong = _miss(one, options, random) if missed else None
    order = random.sample(range(len(options)), len(options))
    letter = LETTERS[order.index(one.gold)]
    question = render_multiple_choice(one.question, LETTERS, [options[place] for place in order])
    tree = wrong or one.tree
    answer = [
        {"type": "python", "text": show(tree, one.numbers), "trained": wrong is None},
        {"type": "python_output", "text": compute(tree, one.numbers) or ""},
        {"type": "text", "text": f"Answer: {letter}" if wrong is None else NO_OPTION},
    ]
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "letters": list(LETTERS),
        "answer_letter": letter,
    }


def _miss(one: Solved, options: Sequence[str], random: Random) -> Tree | None:
    """A mistake whose result is none of the options; None where a few tries find none."""
    values = [value for option in options if (value := value_of(option)) is not None]
    for _ in range(MAX_TRIES):
        tree = one.tree
        for _ in range(random.randint(1, 3)):
            tree = mistakes(tree, random)
        result = compute(tree, one.numbers)
        if result and all(abs(abs(Fraction(result)) - abs(value)) > FAR * abs(value) for value in values):
            return tree
    return None

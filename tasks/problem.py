"""
A Problem: one question, its options, the letter of the right one, a rationale. Prompt, training target, other orders of
the options and the question of whether two problems are the same one follow from it.

Rows come in three forms (DeepMind's, Hugging Face's, prepared conversations, the fork's included) and leave as one.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.answers import relabel_references, strip_answer
from tasks.common import Conversation, render_multiple_choice
from tasks.rows import BadRow

LETTERS = ("A", "B", "C", "D", "E")


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its options. Everything else, prompt, target, other orders, follows from it."""

    question: str
    options: tuple[str, ...]
    """texts without their letters"""
    gold: str
    """the letter of the right option"""
    rationale: str = ""
    """as the source has it, its own closing statement included"""

    @property
    def letters(self) -> list[str]:
        return [chr(ord("A") + number) for number in range(len(self.options))]

    @property
    def gold_option(self) -> str:
        return self.options[ord(self.gold) - ord("A")]

    @property
    def ambiguous(self) -> bool:
        """True when the gold text stands at two letters, so that a right answer can be marked wrong."""
        return [_plain(option) for option in self.options].count(_plain(self.gold_option)) > 1

    @property
    def permutable(self) -> bool:
        """False when an option names another by its letter ("A and B only"), so that order is part of the meaning."""
        return not any(_NAMES_LETTERS.fullmatch(option) for option in self.options)

    def permuted(self, order: Sequence[int]) -> Problem:
        """
        The problem with option `order[i]` at place i, gold letter and rationale relabelled.

        The rationale's closing statement goes; "option B" inside it is renamed; other single letters stay, because they
        are people and trains far more often than options. A problem that is not permutable comes back as it is.
        """
        if sorted(order) != list(range(len(self.options))):
            raise ValueError(f"{list(order)} is not an order of {len(self.options)} options")
        if not self.permutable:
            return self
        new_letter = {self.letters[old]: self.letters[new] for new, old in enumerate(order)}
        return dataclasses.replace(
            self,
            options=tuple(self.options[old] for old in order),
            gold=new_letter[self.gold],
            rationale=relabel_references(strip_answer(self.rationale, self.gold), new_letter),
        )

    def shuffled(self, seed: int) -> Problem:
        """The problem with its options in an order that follows from `seed`."""
        order = list(range(len(self.options)))
        random.Random(seed).shuffle(order)
        return self.permuted(order)

    def rotations(self) -> list[Problem]:
        """The cyclic orders, the given one first: every option stands once at every letter."""
        count = len(self.options)
        return [self.permuted([(place + turn) % count for place in range(count)]) for turn in range(count)]

    def conversation(self) -> Conversation:
        """Prompt and training target, with what marking and permuting need beside them."""
        worked = strip_answer(self.rationale, self.gold)
        texts = [worked, f"Answer: {self.gold}"] if worked else [f"Answer: {self.gold}"]
        prompt = render_multiple_choice(self.question, self.letters, self.options)
        return {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": [{"type": "text", "text": text} for text in texts]},
            ],
            "letters": self.letters,
            "answer_letter": self.gold,
            "question": self.question,
            "options": list(self.options),
        }


# "A and B", "Both A & C", "B, C and D only", but not the plain "A", which may be a person.
_NAMES_LETTERS = re.compile(
    r"\s*(?:only|both|neither|either|all of)?\s*\(?[A-E]\)?(?:\s*(?:,|and|or|&|nor)+\s*\(?[A-E]\)?)+\s*(?:only)?[\s.]*",
    re.IGNORECASE,
)


def _plain(text: str) -> str:
    return "".join(text.split()).casefold()


# ---- reading a row -------------------------------------------------------------------------------------------------


def parse_problem(row: dict[str, Any]) -> Problem:
    """A raw row or a prepared conversation as a Problem. Raises BadRow with the reason."""
    return _from_conversation(row) if "messages" in row else _from_raw(row)


def _from_raw(row: dict[str, Any]) -> Problem:
    question = _text(row, "question")
    options, gold = row.get("options"), row.get("correct")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise BadRow("options is not a list of strings")
    rationale = row.get("rationale")
    return _checked(question, _without_labels(options), gold, rationale if isinstance(rationale, str) else "")


def _without_labels(options: list[str]) -> list[str]:
    """ "A)21" -> "21" when every option bears its own letter, as often as it does ("A)A)14"); otherwise unchanged."""
    for _ in range(2):
        found = [re.match(rf"\s*\(?{chr(65 + n)}\s*[).:]\s*", option) for n, option in enumerate(options)]
        if not all(found):
            break
        options = [option[match.end() :] for option, match in zip(options, found, strict=True) if match]
    return [option.strip() for option in options]


def _from_conversation(row: dict[str, Any]) -> Problem:
    try:
        messages = row["messages"]
        prompt, reply = messages[0]["content"], messages[-1]["content"]
        texts = (
            [reply] if isinstance(reply, str) else [part["text"] for part in reply if part["type"] == "text"]
        )
        gold, rationale = row["answer_letter"], "\n".join(texts[:-1] or texts)
    except (KeyError, TypeError, IndexError):
        raise BadRow("not a conversation with answer_letter") from None
    if isinstance(row.get("options"), list) and isinstance(row.get("question"), str):
        return _checked(row["question"], [str(option) for option in row["options"]], gold, rationale)
    if not isinstance(prompt, str):
        raise BadRow("the prompt is not text")
    head = re.split(r"(?m)^- .*=[A-Z]$", prompt, maxsplit=1)[0]
    options = [match[1] for match in re.finditer(r"(?m)^- (.*)=([A-Z])$", prompt)]
    question = head.rpartition("Multiple Choice question:")[2]
    return _checked(question, options, gold, rationale)


def _checked(question: str, options: Sequence[str], gold: Any, rationale: str) -> Problem:
    if len(options) != len(LETTERS):
        raise BadRow(f"number of options is not five: {len(options)}")
    if not all(option.strip() for option in options):
        raise BadRow("an option is empty")
    letter = gold.strip().upper() if isinstance(gold, str) else gold
    if letter not in LETTERS:
        raise BadRow(f"gold letter is not one of A to E: {gold!r}")
    if not question.strip():
        raise BadRow("question is empty")
    return Problem(
        question.strip(), tuple(option.strip() for option in options), str(letter), rationale.strip()
    )


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"{key} is missing or not text")
    return value


# ---- the same question twice ---------------------------------------------------------------------------------------


def exact_key(problem: Problem) -> str:
    """The question reduced to letters and digits."""
    return re.sub(r"[\W_]+", "", problem.question).casefold()


def masked_key(problem: Problem) -> str:
    """The question with every number masked: AQuA was grown by swapping numbers."""
    return re.sub(r"[^\w#]+|_", "", re.sub(r"\d+(?:[.,]\d+)*", "#", problem.question)).casefold()


SHARED_WORDS = 13  # as GPT-3 (arXiv 2005.14165, appendix C) told its training text from its test sets


def shares_words(texts: Iterable[str], held_out: Iterable[str]) -> list[bool]:
    """For each text, whether thirteen words in a row of it stand in one of `held_out`; numbers are words, case is not seen."""
    known = {run for text in held_out for run in _runs(text)}
    return [not known.isdisjoint(_runs(text)) for text in texts]


def _runs(text: str) -> Iterable[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.casefold())
    return zip(*(words[start:] for start in range(SHARED_WORDS)), strict=False)


def deduplicate(
    train: Iterable[Problem], held_out: Iterable[Problem]
) -> tuple[list[Problem], dict[str, int]]:
    """
    `train` without repetitions of itself and of `held_out`, and what was dropped. A held-out question is repeated exactly, with
    other numbers, or by thirteen words in a row.
    """
    held = list(held_out)
    exact, masked = {exact_key(problem) for problem in held}, {masked_key(problem) for problem in held}
    seen: set[tuple[Any, ...]] = set()
    kept: list[Problem] = []
    dropped = dict.fromkeys(
        (
            "repeats a held-out question", "a held-out question with other numbers",
            "thirteen words in a row of a held-out question", "repeats an earlier row",
        ), 0,
    )  # fmt: skip
    problems = list(train)
    overlaps = shares_words(
        (problem.question for problem in problems), (problem.question for problem in held)
    )
    for problem, overlap in zip(problems, overlaps, strict=True):
        row = (exact_key(problem), problem.options, problem.gold, problem.rationale)
        if row[0] in exact:
            dropped["repeats a held-out question"] += 1
        elif masked_key(problem) in masked:
            dropped["a held-out question with other numbers"] += 1
        elif overlap:
            dropped["thirteen words in a row of a held-out question"] += 1
        elif row in seen:
            dropped["repeats an earlier row"] += 1
        else:
            seen.add(row)
            kept.append(problem)
    return kept, {why: count for why, count in dropped.items() if count}

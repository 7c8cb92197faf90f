"""
A multiple-choice question as a person types it, put as the models are trained to be asked.

    If 3 pens cost $6, what do 5 cost? A) 8 B) 9 C) 10 D) 12 E) 15

Options may stand on lines of their own or behind each other, with `A)`, `(A)`, `A.`, `A:` or as `- 8=A`. Letters count
from A without a gap; two options are enough where brackets mark them, three elsewhere, because "A." is also a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tasks.common import render_multiple_choice

LETTERS = "ABCDE"
_STYLES = (  # how an option is marked, and how many options make a question
    (re.compile(r"(?<![\w(])\(?([A-Z])\)\s*"), 2),
    (re.compile(r"(?m)^[ \t]*(?:[-*][ \t]*)?([A-Z])[.:][ \t]+"), 3),
    (re.compile(r"(?<!\S)([A-Z])[.:][ \t]+"), 3),
)
_RENDERED = re.compile(r"(?m)^- (.+)=([A-Z])[ \t]*$")


@dataclass(frozen=True, slots=True)
class Asked:
    """One question and its options."""

    question: str
    letters: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """As the user puts it in training."""
        return render_multiple_choice(self.question, self.letters, self.options)


def read_question(text: str) -> Asked | None:
    """The question in `text`, or None where there are no options in it."""
    rendered = list(_RENDERED.finditer(text))
    if rendered:
        question = text[: rendered[0].start()]
        return _asked(question, [(match[2], match[1]) for match in rendered], least=2)
    for style, least in _STYLES:
        run = _run(list(style.finditer(text)))
        if len(run) >= least:
            ends = [match.start() for match in run[1:]] + [len(text)]
            options = [(m[1], text[m.end() : end]) for m, end in zip(run, ends, strict=True)]
            # What stands on lines below the last option is not part of it.
            options[-1] = (options[-1][0], options[-1][1].strip().partition("\n")[0])
            if found := _asked(text[: run[0].start()], options, least=least):
                return found
    return None


def _run(marks: list[re.Match[str]]) -> list[re.Match[str]]:
    """The last run of marks A, B, C and so on, each directly after the one before."""
    starts = [number for number, mark in enumerate(marks) if mark[1] == "A"]
    if not starts:
        return []
    run = marks[starts[-1] :]
    count = next((n for n, mark in enumerate(run) if ord(mark[1]) != ord("A") + n), len(run))
    return run[:count]


def _asked(question: str, options: list[tuple[str, str]], *, least: int) -> Asked | None:
    letters = tuple(letter for letter, _ in options)
    texts = tuple(" ".join(text.split()).strip(" ,;") for _, text in options)
    in_order = letters == tuple(LETTERS[: len(letters)])
    if not in_order or len(letters) < least or not all(map(_says_something, texts)) or not question.strip():
        return None
    return Asked(question.strip(), letters, texts)


def _says_something(option: str) -> bool:
    return any(character.isalnum() for character in option)

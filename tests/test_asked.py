"""A question as a person types it: found in each usual form, and not where there is none."""

from __future__ import annotations

import pytest

from tasks.asked import read_question
from tasks.problem import Problem

OPTIONS = ("8", "9.5", "$10", "12 km", "15")


@pytest.mark.parametrize(
    "text",
    [
        "What do 5 cost?\nA) 8\nB) 9.5\nC) $10\nD) 12 km\nE) 15",
        "What do 5 cost? A)8 , B)9.5 , C)$10 , D)12 km , E)15",
        "What do 5 cost? (A) 8 (B) 9.5 (C) $10 (D) 12 km (E) 15",
        "What do 5 cost?\nA. 8\nB. 9.5\nC. $10\nD. 12 km\nE. 15\n\nThink step by step.",
        "What do 5 cost? A: 8 B: 9.5 C: $10 D: 12 km E: 15",
        "What do 5 cost?\n- 8=A\n- 9.5=B\n- $10=C\n- 12 km=D\n- 15=E\nReason first.",
    ],
)
def test_every_usual_form_is_read_as_the_same_question(text: str) -> None:
    asked = read_question(text)
    assert asked is not None
    assert (asked.question, asked.letters, asked.options) == ("What do 5 cost?", tuple("ABCDE"), OPTIONS)


def test_the_prompt_is_the_one_of_training() -> None:
    problem = Problem("What do 5 cost?", OPTIONS, "C")
    prompt = problem.conversation()["messages"][0]["content"]
    asked = read_question("What do 5 cost? A)8 B)9.5 C)$10 D)12 km E)15")
    assert asked is not None and asked.prompt == prompt
    again = read_question(prompt)
    assert again is not None and again.prompt == prompt


@pytest.mark.parametrize(
    "text",
    [
        "", "A) 1 B) 2", "What is 2+2?", "Mr. A. and Mr. B. walk.", "Is it A) or B)?", "Which? B) 1 C) 2 D) 3",
        "Solve (A) alone.", "Choose. A) 1 B) 2 C) 3 D) 4 E) 5 F) 6",
    ],
)  # fmt: skip
def test_what_is_no_question_with_options_is_none(text: str) -> None:
    assert read_question(text) is None


def test_the_last_run_of_options_counts_and_four_are_enough() -> None:
    asked = read_question("Of A) and B), which?\n\nA) one\nB) two\nC) three\nD) four")
    assert asked is not None and asked.options == ("one", "two", "three", "four")

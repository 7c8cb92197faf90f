"""What counts as an answer, and what is taken away from a rationale, on tables of strings."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.answers import parse_answer, relabel_references, strip_answer
from tasks.common import MultipleChoice

LETTERS = ("A", "B", "C", "D", "E")

ANSWERED = [
    ("Answer: C", "C"),
    ("Answer:C", "C"),
    ("Answer : C", "C"),
    ("Answer:\tC", "C"),
    ("answer: C", "C"),
    ("ANSWER: C", "C"),
    ("Final Answer: C", "C"),
    ("final answer: C", "C"),
    ("Answer: C.", "C"),
    ("Answer: C!", "C"),
    ("Answer: C)", "C"),
    ("Answer: (C)", "C"),
    ("Answer: (D).", "D"),
    ("Answer: **C**", "C"),
    ("**Answer: C**", "C"),
    ("**Answer:** C", "C"),
    ("**Answer**: C", "C"),
    ("Answer: **(C)**", "C"),
    ("Answer: (**C**)", "C"),
    ("**Final Answer: C**.", "C"),
    ("Answer: C   ", "C"),
    ("Answer: C\n", "C"),
    ("Answer: C\r\n", "C"),
    ("2+2=4, a sum.\nAnswer: E", "E"),
    ("So x = 250 m. Answer: D", "D"),
    ("Answer: A\nNo, 3*4=12.\nAnswer: B", "B"),
    ("Answer: B\nbecause B=12 and A is a train", "B"),
    ("Answer: A. Final Answer: A", "A"),
    ("Answer: A Answer: A", "A"),
    ("We let e = 2 so\nAnswer: C", "C"),
    ("Answer: data shows 5\nAnswer: B", "B"),
    ("<|python_start|>1+1<|python_end|>\nAnswer: E", "E"),
]

UNANSWERED = [
    "",
    "C",
    "(C)",
    "Answer",
    "Answer:",
    "Answer: ",
    "Answer: \nC",
    "Answer:\nC",
    "Answer: c",
    "Answer: a",
    "answer: a train",
    "a train travels 60 km",
    "a car goes 5 km so B",
    "Answer: data shows 5",
    "We let e = 2 so answer is C",
    "Profit is a lot. Answer is C",
    "The answer is C.",
    "Answer C",
    "Answer - C",
    "Answer = C",
    "Ans: C",
    "Answers: C",
    "Option C",
    "Answer: F",
    "Answer: X",
    "Answer: <letter>",
    "Answer: AB",
    "Answer: A B",
    "Answer: A or B",
    "Answer: A, B",
    "Answer: A/B",
    "Answer: A & B",
    "Answer: A and B",
    "Answer: (A)(B)",
    "Answer: A. Answer: B",
    "Answer: A Answer: B",
    "Answer: A or B. Answer: A",
    "Answer: A, Final Answer: B",
    "Answer: A-E",
    "Answer: A,",
    "Answer: A?",
    "Answer: C) 30",
    "Answer: C = 30",
    "Answer: C because it is",
    "Answer: Cat",
    "Answer: C5",
    "Answer: C_",
    "Answer: (C",
    "Answer: [C]",
    "Answer: 'C'",
    'Answer: "C"',
    "Answer: \\boxed{C}",
    "Answer: $C$",
    "Answer: not C",
    "Answer: 12",
    "Answer: С",
    "Answer: Ｃ",
    "Answer: C\u0301",
    "Answer: C\u200b",
    "Answer: C\x0bD",
    "Answer: C\u2028D",
    "Answer: C\rD",
    "Answer： C",
    "myAnswer: C",
    "my_Answer: C",
    "Answer: C\nThe answer: unsure",
    "Answer: C\nAnswer:",
    "Answer: C\nAnswer: A or B",
    "The distance is 60 km and the time a",
    "Answer: C<|assistant_end|>",
    "Final: C",
]


@pytest.mark.parametrize(("text", "letter"), ANSWERED)
def test_a_well_formed_final_answer_is_found(text: str, letter: str) -> None:
    assert parse_answer(text, LETTERS) == letter


@pytest.mark.parametrize("text", UNANSWERED)
def test_anything_else_is_no_answer(text: str) -> None:
    assert parse_answer(text, LETTERS) is None


def test_only_the_letters_of_the_question_count() -> None:
    assert parse_answer("Answer: D", ("A", "B", "C")) is None
    assert parse_answer("Answer: D", ("A", "B", "C", "D")) == "D"
    assert parse_answer("Answer: E", "ABCDE") == "E"


FRAGMENTS = [
    "Answer:",
    "answer :",
    "Final Answer:",
    "**",
    "(",
    ")",
    " ",
    "\n",
    ".",
    ",",
    " or ",
    "x=3",
    "\r",
    "a",
    *LETTERS,
]


class Question(MultipleChoice):
    """Marks replies to a question whose gold letter the test chooses."""


def rewards(text: str) -> dict[str, float]:
    task = Question()
    return {
        gold: task.reward({"letters": list(LETTERS), "answer_letter": gold}, text).total for gold in LETTERS
    }


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join) | st.text(max_size=60))
def test_no_text_earns_reward_for_two_letters(text: str) -> None:
    totals = sorted(rewards(text).values())
    assert totals in ([0.0] * 5, [0.1] * 4 + [1.1])


@given(st.text(max_size=200).filter(lambda text: "nswer" not in text.lower()), st.sampled_from(LETTERS))
def test_reasoning_that_says_no_answer_changes_nothing(reasoning: str, letter: str) -> None:
    assert parse_answer(reasoning, LETTERS) is None
    assert parse_answer(f"{reasoning}\nAnswer: {letter}", LETTERS) == letter


@given(st.text(max_size=300))
def test_cleaning_never_leaves_an_answer_behind(rationale: str) -> None:
    assert parse_answer(strip_answer(rationale, "A"), LETTERS) is None


STRIPPED = [  # rationale, gold letter, what is left; wordings of AQuA and MathQA
    ("x = 3\nAnswer: C", "C", "x = 3"),
    ("x = 3\nANSWER:C", "C", "x = 3"),
    ("x = 3\nC", "C", "x = 3"),
    ("x = 3\nAnswer C", "C", "x = 3"),
    ("x = 3\nThe answer is C.", "C", "x = 3"),
    ("x = 3\nAnswer is C", "C", "x = 3"),
    ("x = 3\nAnswer: Option C", "C", "x = 3"),
    ("x = 3\nOption C", "C", "x = 3"),
    ("x = 3\ncorrect answer C", "C", "x = 3"),
    ("x = 3\nCorrect answer - C", "C", "x = 3"),
    ("x = 3\nC)", "C", "x = 3"),
    ("x = 3\nANSWER IS C", "C", "x = 3"),
    ("x = 3\nCorrect Option: C", "C", "x = 3"),
    ("x = 3\nAns: C", "C", "x = 3"),
    ("x = 3\nAnswer (C)", "C", "x = 3"),
    ("x = 3\nAnswer = C", "C", "x = 3"),
    ("x = 3\nAnswer: C) 30", "C", "x = 3"),
    ("x = 3\nANSWER C 24 cm", "C", "x = 3"),
    ("x = 3\ncorrect option is C", "C", "x = 3"),
    ("x = 3\nSo, Answer must be (C)....", "C", "x = 3"),
    ("x = 3\nIMO option C is correct answer..", "C", "x = 3"),
    ("x = 3\nHence C", "C", "x = 3"),
    ("x = 250 m. Answer D", "D", "x = 250 m."),
    ("= 76. Hence, the correct answer is D.", "D", "= 76."),
    ("answer is 14 x = 252 answer : c", "C", "answer is 14 x = 252"),
    ("the total is 55 correct answer c ) 55", "C", "the total is 55"),
    ("42 is the answer i.e.B", "B", "42 is the answer"),
    ("Answer = 4 = D", "D", "Answer = 4"),
    ("Answer: Option B\nExplanation:\nx = 3", "B", "x = 3"),
    ("x = 3\nAnswer: 30 km", "C", "x = 3\n30 km"),
    ("Answer: A.", "A", ""),
    ("B", "B", ""),
    ("", "A", ""),
]

KEPT = [  # a letter at the end that is no answer
    ("B gives C 10 points", "C"),
    ("So Train A reaches 30 minutes before Train B", "A"),
    ("the can contained 21 litres of A.", "C"),
    ("we need the single answer that is a multiple of 3.", "A"),
    ("O and P should serve on A", "D"),
    ("Ans should be 2.125", "A"),
]


@pytest.mark.parametrize(("rationale", "gold", "left"), STRIPPED)
def test_a_rationale_loses_its_own_answer_statement(rationale: str, gold: str, left: str) -> None:
    assert strip_answer(rationale, gold) == left


@pytest.mark.parametrize(("rationale", "gold"), KEPT)
def test_a_letter_that_names_something_stays(rationale: str, gold: str) -> None:
    assert strip_answer(rationale, gold) == rationale


@pytest.mark.parametrize("filler", ["- ", "is the ", "answer ", "(", "A ", "so ", "**", "Answer: "])
def test_hostile_lines_are_read_in_linear_time(filler: str) -> None:
    began = time.process_time()  # what we computed, whatever else the machine does
    text = filler * 20_000 + "Answer: C"
    parse_answer(text, LETTERS)
    assert parse_answer(strip_answer(text, "C"), LETTERS) is None
    assert time.process_time() - began < 3.0, "in quadratic time it takes minutes"


def test_option_references_follow_their_option_and_other_letters_do_not() -> None:
    new = {"A": "C", "B": "A", "C": "B"}
    assert (
        relabel_references("Only option B fits, not choice (C).", new)
        == "Only option A fits, not choice (B)."
    )
    assert relabel_references("A and B finish; a choice a day", new) == "A and B finish; a choice a day"
    assert relabel_references("options Boston", new) == "options Boston"

"""A row of any form becomes a problem, a problem becomes a conversation, its gold reply earns full reward."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_rows import PROBLEM, RAW, bare_machine  # noqa: F401

from tasks.aqua import Problem, parse_problem
from tasks.common import MultipleChoice, Reward, render_multiple_choice
from tasks.rows import BadRow
from tasks.smoltalk import parse_chat


def test_prompt_and_target_of_a_problem_are_as_documented() -> None:
    conversation = PROBLEM.conversation()
    assert conversation["messages"] == [
        {
            "role": "user",
            "content": 'What is 3 * 7?\n- 21=A\n- 24=B\n- 10=C\n- 37=D\n- 2=E\nReason first. Last line: "Answer: X".',
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "3 * 7 = 21"}, {"type": "text", "text": "Answer: A"}],
        },
    ]
    assert conversation["letters"] == list("ABCDE") and conversation["answer_letter"] == "A"


def test_without_a_rationale_the_target_is_the_answer_line_alone() -> None:
    reply = Problem("q", tuple("12345"), "C", "Answer: C").conversation()["messages"][1]["content"]
    assert reply == [{"type": "text", "text": "Answer: C"}]


def test_a_choice_never_breaks_its_line() -> None:
    assert render_multiple_choice("q\n", "AB", ["1\n2", " 3 "], instruction="i") == "q\n- 1 2=A\n- 3=B\ni"


@pytest.mark.parametrize(
    "row",
    [
        RAW,
        {**RAW, "options": ["21", "24", "10", "37", "2"]},
        {**RAW, "options": ["A) 21", "B) 24", "C) 10", "D) 37", "E) 2"], "correct": " a "},
        {**RAW, "options": ["(A)21", "(B)24", "(C)10", "(D)37", "(E)2"]},
        {**RAW, "options": ["A)A)21", "B)B)24", "C)C)10", "D)D)37", "E)E)2"]},
        {**PROBLEM.conversation(), "rationale": "unused"},
    ],
)
def test_every_form_of_a_row_gives_the_same_problem(row: dict[str, Any]) -> None:
    problem = parse_problem(row)
    assert (problem.question, problem.options, problem.gold) == (PROBLEM.question, PROBLEM.options, "A")
    assert problem.conversation() == PROBLEM.conversation()


def test_a_conversation_in_the_layout_of_the_fork_is_read() -> None:
    prompt = (
        "Solve it and conclude with 'Answer: <letter>'.\n\nMultiple Choice question: What is 3 * 7?\n"
        "- 21=A\n- 24=B\n- 10=C\n- 37=D\n- 2=E\n\nRespond only with the letter of the correct answer."
    )
    texts = [{"type": "text", "text": "3 * 7 = 21"}, {"type": "text", "text": "Answer: A"}]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": texts}]
    problem = parse_problem({"messages": messages, "letters": list("ABCDE"), "answer_letter": "A"})
    assert problem == Problem("What is 3 * 7?", PROBLEM.options, "A", "3 * 7 = 21")


def test_an_option_that_begins_with_a_letter_is_not_a_label() -> None:
    row = {**RAW, "options": ["A is taller", "B is taller", "equal", "A and B", "unknown"]}
    assert parse_problem(row).options[0] == "A is taller"


BAD_ROWS = [
    {},
    {"question": "q"},
    {**RAW, "question": " "},
    {**RAW, "question": 3},
    {**RAW, "options": "A)1"},
    {**RAW, "options": ["A)1", "B)2"]},
    {**RAW, "options": ["A)1", "B)2", "C)3", "D)4", "E)"]},
    {**RAW, "options": [1, 2, 3, 4, 5]},
    {**RAW, "correct": "F"},
    {**RAW, "correct": None},
    {**RAW, "correct": 2},
    {"messages": []},
    {"messages": "hello"},
    {"messages": [{"role": "user", "content": "q"}], "answer_letter": "A"},
]


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_refused_with_a_reason(row: dict[str, Any]) -> None:
    with pytest.raises(BadRow):
        parse_problem(row)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["question", "options", "correct", "rationale", "messages"]), json_values)
)
def test_any_row_is_a_problem_or_a_bad_row(row: dict[str, Any]) -> None:
    for parse in (parse_problem, parse_chat):
        try:
            parse(row)
        except BadRow as error:
            assert str(error)


@given(st.lists(st.text(max_size=12), min_size=5, max_size=5), st.sampled_from("ABCDE"), st.text(max_size=80))
def test_the_gold_reply_of_any_problem_earns_full_reward(
    options: list[str], gold: str, rationale: str
) -> None:
    problem = Problem("q", tuple(options), gold, rationale)
    for turned in problem.rotations():
        conversation = turned.conversation()
        text = "\n".join(part["text"] for part in conversation["messages"][1]["content"])
        assert MultipleChoice().reward(conversation, text) == Reward(1.0, 0.1)


@given(st.permutations(range(5)), st.sampled_from("ABCDE"))
def test_permuting_keeps_the_gold_option_and_moves_its_letter(order: list[int], gold: str) -> None:
    problem = Problem("q", ("v", "w", "x", "y", "z"), gold, f"Only option {gold} fits.\nANSWER:{gold}")
    other = problem.permuted(order)
    assert other.gold_option == problem.gold_option
    assert sorted(other.options) == sorted(problem.options)
    assert other.rationale == f"Only option {other.gold} fits."


def test_rotations_put_the_gold_option_at_every_letter_once() -> None:
    rotations = PROBLEM.rotations()
    assert rotations[0].options == PROBLEM.options
    assert sorted(turned.gold for turned in rotations) == list("ABCDE")


def test_options_that_name_other_options_keep_their_order() -> None:
    problem = Problem("q", ("A and B", "B only", "C", "none", "all"), "A")
    assert not problem.permutable and problem.permuted([4, 3, 2, 1, 0]) is problem
    assert Problem("Who?", ("A", "B", "C", "D", "E"), "A").permutable


def test_a_wrong_order_is_refused() -> None:
    with pytest.raises(ValueError, match="not an order"):
        PROBLEM.permuted([0, 0, 1, 2, 3])


def test_two_equal_gold_texts_are_ambiguous() -> None:
    assert Problem("q", ("1 m", "2", "3", "4", "1m"), "A").ambiguous
    assert not Problem("q", ("1", "2", "2", "4", "5"), "A").ambiguous

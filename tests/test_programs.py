"""Word problems that one calculator call solves: what is kept of each source, other numbers, options, leaks."""

from __future__ import annotations

import json
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from nanochat.calculator import evaluate
from nanochat.common import UserError
from tasks.expressions import Number, Operation, close, numbers_of, read_expression, value_of
from tasks.problem import Problem
from tasks.programs import Programs, conversation_of
from tasks.rows import BadRow, DataUnavailable
from tasks.solved import (
    Solved,
    compute,
    from_calls,
    from_equation,
    from_mathqa,
    from_program,
    from_rationale,
    natural,
    published_row,
    solved,
)
from tasks.variation import changed_number, made_options, mistakes, with_fewer_words, with_other_numbers

QUESTION = "Kirk received commissions of $850 and $705. What must the third be for an average of $820 on the 3 sales?"
OPTIONS = ("$895", "$905", "$910", "$915", "$945")


def kirk() -> Solved:
    numbers = numbers_of(QUESTION)
    return solved(QUESTION, read_expression("820*3-850-705", numbers), Fraction(905), OPTIONS, 1)


def test_a_solution_that_does_not_come_to_the_answer_is_thrown_away() -> None:
    tree = read_expression("820*3-850", numbers_of(QUESTION))
    with pytest.raises(BadRow, match="does not come to the answer"):
        solved(QUESTION, tree, Fraction(905), OPTIONS, 1)
    with pytest.raises(BadRow, match="uses no number"):
        solved("How many days has a week?", read_expression("7*1", []), Fraction(7))


def test_every_source_is_read() -> None:
    row: dict[str, Any] = {
        "question": "a sells 3 pens for rs . 36 . what does he get for 5 pens ?", "correct": "B", "rationale": "",
        "options": ["A)rs . 50", "B)rs . 60", "C)rs . 70", "D)rs . 80", "E)none"], "formula": "divide(n1,n0)|multiply(#0,n2)|",
    }  # fmt: skip
    one = from_mathqa(row)
    assert one.question == "A sells 3 pens for Rs. 36. What does he get for 5 pens?"
    assert one.options[1] == "Rs. 60" and one.gold == 1 and compute(one.tree, one.numbers) == "60"
    by_rationale = from_mathqa(row | {"formula": "add(n0,n1)|", "rationale": "36 / 3 = 12 , 12 * 5 = 60"})
    assert compute(by_rationale.tree, ("3", "30", "5")) == "50"
    with pytest.raises(BadRow):
        from_mathqa(row | {"formula": "add(n0,n1)|"})
    program = {"question": "half of 25 . 0 ?", "program": "n0 = 25.0\nanswer = n0 / 2.0", "answer": "12.5"}
    assert compute(from_program(program).tree, ("25",)) == "12.5"
    equation = {"question": "He had 9 of 56 . How many ?", "equation": "X=(56.0*9.0)", "answer": 504.0}
    assert compute(from_equation(equation).tree, ("9", "56")) == "504"
    calls = from_calls(
        "She sold 48 clips in April and half as many in May. How many?", ["48/2", "48+24"], "72"
    )
    assert compute(calls.tree, ("10",)) == "15"
    problem = Problem("Half of 48 and 48?", ("1", "72", "3", "4", "5"), "B", "48/2=24, 48+24=72. Answer: B")
    assert compute(from_rationale(problem).tree, ("10", "10")) == "15"


@pytest.mark.parametrize(
    "read",
    [
        lambda: from_program({"question": "q 5", "answer": "5"}),
        lambda: from_program({"question": "q 5", "program": "answer = f(5)", "answer": "5"}),
        lambda: from_equation({"question": "q 5", "equation": "2*x=5", "answer": "5"}),
        lambda: from_equation({"question": "q 5", "equation": "x=731*5", "answer": "5"}),
        lambda: from_equation({"question": "q 5"}),
        lambda: from_calls("q 5", [], "5"),
        lambda: from_calls("q 5", ["731*5"], "3655"),
        lambda: from_rationale(Problem("q 5", ("x", "y", "z", "v", "w"), "B", "5*1=5")),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(read: Any) -> None:
    with pytest.raises(BadRow, match=r"\w"):
        read()


def test_mathqa_as_it_is_published() -> None:
    row = published_row(
        {
            "Problem": "p 1", "Rationale": '"r"', "correct": "c", "linear_formula": "f",
            "options": "a ) 38 , b ) 27.5 , c ) 1 , 000 , d ) rs . 9 , e ) none of these",
        }
    )  # fmt: skip
    assert [option.strip() for option in row["options"]] == [
        "A)38", "B)27.5", "C)1 , 000", "D)rs . 9", "E)none of these",
    ]  # fmt: skip
    assert (row["correct"], row["rationale"], row["formula"]) == ("C", "r", "f")


def test_tokenised_lower_case_becomes_natural() -> None:
    text = "b ' s share is rs . 36 ( 10 % of 1 / 2 ) . what is a ' s , at 5 km / hr ?"
    assert natural(text) == "B's share is Rs. 36 (10% of 1/2). What is a's, at 5 km/hr?"


def test_a_changed_number_is_of_the_same_kind() -> None:
    chance = random.Random(5)
    for text in ("7", "12", "99", "300", "12.50", "0.4", "2008", "1", "0", "20000000"):
        for _ in range(200):
            other = changed_number(text, chance)
            assert len(other.partition(".")[2]) == len(text.partition(".")[2])
            assert float(other) >= 0 and (float(text) >= 100 or float(other) < 100 or "." in text)
    assert {changed_number("1", chance), changed_number("0", chance)} == {"1", "0"}
    assert all(1990 < int(changed_number("2008", chance)) < 2030 for _ in range(50))
    assert len({changed_number("300", chance) for _ in range(200)}) > 8


def test_other_numbers_bring_another_answer_and_options_that_follow_it() -> None:
    chance, seen = random.Random(1), set()
    for _ in range(100):
        other = with_other_numbers(kirk(), chance)
        assert numbers_of(other.question) == list(other.numbers)
        result = compute(other.tree, other.numbers)
        assert result is not None and Fraction(result).denominator == 1 and Fraction(result) > 0
        assert value_of(other.options[other.gold]) == Fraction(result)
        assert len(set(other.options)) == 5 and all(option.startswith("$") for option in other.options)
        seen.add(other.question)
    assert len(seen) > 80


def test_equal_numbers_stay_equal() -> None:
    one = solved("5 men and 5 women and 7 boys?", read_expression("5+7", ["5", "5", "7"]), Fraction(12))
    for seed in range(20):
        numbers = with_other_numbers(one, random.Random(seed)).numbers
        assert numbers[0] == numbers[1] != numbers[2]


def test_where_no_other_numbers_are_sensible_they_stay() -> None:
    ratio = solved(
        "Divide 30 in 2 parts",
        read_expression("30/2", ["30", "2"]),
        Fraction(15),
        ("1:2", "15", "3", "4", "5"),
        1,
    )
    assert with_other_numbers(ratio, random.Random(0)) is ratio


def test_made_options_hold_the_answer_once() -> None:
    for seed in range(100):
        one = with_other_numbers(Solved(QUESTION, kirk().numbers, kirk().tree), random.Random(seed))
        options = made_options(one, random.Random(seed))
        assert len(set(options)) == 5
        assert value_of(options[0]) == Fraction(compute(one.tree, one.numbers) or "")


@pytest.mark.parametrize("expression", ["7-7", "7*7000000000", "7/3", "7/9999999", "0-7", "7"])
def test_there_are_wrong_options_for_any_answer(expression: str) -> None:
    numbers = numbers_of("7 of 7000000000 or 9999999")
    one = Solved("7 of 7000000000 or 9999999", tuple(numbers), read_expression(expression, numbers))
    for seed in range(20):
        assert len(set(made_options(one, random.Random(seed)))) == 5


def test_a_mistake_is_mostly_another_solution() -> None:
    tree, chance = kirk().tree, random.Random(0)
    assert sum(mistakes(tree, chance) != tree for _ in range(100)) > 60
    assert mistakes(Number(0), chance) == Number(0)
    assert isinstance(tree, Operation)


def test_words_are_dropped_and_numbers_signs_and_words_for_numbers_stay() -> None:
    text = "Half of the 12 red pens - three boxes - cost $1,200 and twice as much."
    one = Solved(text, ("12", "1200"), kirk().tree)
    found = {with_fewer_words(one, 0.5, random.Random(seed)) for seed in range(50)}
    assert len(found) > 40
    for fewer in found:
        assert numbers_of(fewer.question) == ["12", "1200"] and fewer.tree is one.tree
        assert {"Half", "three", "twice"} <= set(fewer.question.split()) and fewer.question.count("-") == 2
    words = [len(fewer.question.split()) for fewer in found]
    assert min(words) < 11 < max(words) and with_fewer_words(one, 0.0, random.Random(1)) == one
    assert with_fewer_words(one, 1.0, random.Random(1)).question == "Half 12 - three - $1,200 twice"


def test_the_target_is_one_call_its_result_and_the_letter() -> None:
    letters: Counter[str] = Counter()
    for seed in range(400):
        conversation = conversation_of(kirk(), random.Random(seed))
        call, output, text = conversation["messages"][1]["content"]
        assert evaluate(call["text"]) == output["text"] == "905"
        letter = conversation["answer_letter"]
        assert text["text"] == f"Answer: {letter}"
        assert f"- $905={letter}" in conversation["messages"][0]["content"].splitlines()
        letters[letter] += 1
    assert set(letters) == set("ABCDE")


def test_a_result_that_no_option_has_is_said_to_be_none_and_the_mistake_is_not_trained() -> None:
    missed = 0
    for seed in range(100):
        conversation = conversation_of(kirk(), random.Random(seed), missed=True)
        call, output, text = conversation["messages"][1]["content"]
        assert evaluate(call["text"]) == output["text"]
        if call["trained"]:
            assert text["text"] == f"Answer: {conversation['answer_letter']}" and output["text"] == "905"
            continue
        missed += 1
        assert text["text"] == "No option."
        assert not any(close(Fraction(output["text"]), value_of(option)) for option in OPTIONS)
    assert missed > 90


# ---- the task ------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def aqua_row(question: str, rationale: str, gold: int) -> dict[str, Any]:
    options = [f"{letter}){gold + 3 * place}" for place, letter in enumerate("ABCDE")]
    return {"question": question, "options": options, "rationale": rationale, "correct": "A"}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr("tasks.common.reachable", lambda url: False)
    monkeypatch.setattr("tasks.aqua.fetch_bytes", lambda url: (_ for _ in ()).throw(UserError("no network")))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


WORDS = [chr(97 + n % 26) * (1 + n // 26) for n in range(300)]  # a, b, ... z, aa, bb, ...
THINGS = [f"{word}pens" for word in WORDS[:12]]
SECRET = "a farmer keeps hens and cows and counts together 50 heads and 140 feet in one yard"


def test_examples_come_from_all_sources_and_hold_together(data: Path) -> None:
    write(data / "aqua", "train", [aqua_row("What do 4 pens at 12 cost?", "4*12=48", 48)])
    write(data / "aqua", "validation", [aqua_row(f"{SECRET}, how many hens?", "", 30)])
    mathqa = aqua_row("what is 36 over 9 ?", "", 4) | {"formula": "divide(n0,n1)|"}
    write(data / "aqua", "train_mathqa", [mathqa])
    write(data / "eval", "mawps", [{"question": "Add 5 and 6 .", "equation": "x=5+6", "answer": 11}])
    task = Programs(size=300, seed=3)
    operations: Counter[str] = Counter()
    for conversation in task:
        call, output, text = conversation["messages"][1]["content"]
        assert evaluate(call["text"]) == output["text"]
        if text["text"] == "No option.":
            assert task.answer(conversation, text["text"]) is None
            continue
        prompt = conversation["messages"][0]["content"]
        [gold] = [line for line in prompt.splitlines() if line.endswith(f"={conversation['answer_letter']}")]
        assert close(Fraction(output["text"]), value_of(gold[2:-2]))
        assert task.evaluate(conversation, f"Answer: {conversation['answer_letter']}")
        operations[next(symbol for symbol in "*/+" if symbol in call["text"])] += 1
    assert operations["*"] > operations["+"] > 20 and operations["/"] > operations["+"]
    assert "AQuA rationales: 1 of 1" in task.source and "no GSM8K calls" in task.source


def test_an_example_depends_on_seed_and_number_alone(data: Path) -> None:
    write(data / "eval", "mawps", [{"question": "Add 5 and 6 .", "equation": "x=5+6", "answer": 11}])
    some, more = Programs(size=5, seed=1), Programs(size=50, seed=1)
    assert [some[n] for n in range(5)] == [more[n] for n in range(5)]
    assert some[0] != Programs(size=5, seed=2)[0] or some[1] != Programs(size=5, seed=2)[1]


def test_what_validation_asks_is_not_taught(data: Path) -> None:
    leak = {"question": f"{SECRET} . how many cows ?", "equation": "x=140-50", "answer": 90}
    write(data / "aqua", "validation", [aqua_row(f"{SECRET}, how many hens?", "", 30)])
    write(data / "eval", "mawps", [leak, {"question": "Add 5 and 6 .", "equation": "x=5+6", "answer": 11}])
    task = Programs(size=200)
    assert "MAWPS equations: 1 of 2" in task.source
    assert not any("farmer" in conversation["messages"][0]["content"] for conversation in task)


def test_a_wording_is_for_training_or_for_validation_and_its_numbers_do_not_matter(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.programs.HELD_OUT", 3)
    asked = [f"What do {n} {thing} at {price} cost ?" for n in (3, 4) for price in (7, 9) for thing in THINGS]
    rows = [{"question": q, "equation": f"x={q[8]}*{q[-8]}", "answer": int(q[8]) * int(q[-8])} for q in asked]
    write(data / "eval", "mawps", rows)
    seen = {}
    for split in ("train", "validation"):
        task = Programs(split, size=400)
        asked_for = [conversation["messages"][0]["content"] for conversation in task]
        seen[split] = {thing for thing in THINGS for prompt in asked_for if thing in prompt}
        assert f"MAWPS equations: {4 * len(seen[split])} of {len(rows)}" in task.source
    assert seen["train"] | seen["validation"] == set(THINGS) and not seen["train"] & seen["validation"]
    assert 1 < len(seen["validation"]) < len(seen["train"])
    for conversation in Programs("validation", size=50):
        assert conversation["messages"][1]["content"][2]["text"] == f"Answer: {conversation['answer_letter']}"


def test_without_any_source_it_says_where_it_looked(data: Path) -> None:
    with pytest.raises(DataUnavailable, match="mawps"):
        Programs(size=5)


def test_sft_that_trains_on_programs_validates_on_programs(data: Path) -> None:
    from scripts.chat_sft import Config, validation_tasks

    rows = [{"question": f"Add 5 and 6 {word} .", "equation": "x=5+6", "answer": 11} for word in WORDS]
    write(data / "eval", "mawps", rows)
    assert [task.name for task in validation_tasks(Config(program_examples=9))] == ["PROGRAMS"]
    assert [task.name for task in validation_tasks(Config())] == ["SYNTHETIC"]

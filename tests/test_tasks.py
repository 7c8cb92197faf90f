"""Rows become problems, problems become conversations, gold replies earn full reward; bad rows are counted and named."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from tasks import common
from tasks.aqua import AQUA, Problem, deduplicate, parse_problem
from tasks.arc import ARC
from tasks.common import MultipleChoice, Reward, Task, TaskMixture, limit, render_multiple_choice
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, parse_number, parts_of
from tasks.humaneval import HumanEval, extract_program
from tasks.mmlu import MMLU
from tasks.problem import exact_key, masked_key
from tasks.rows import BadRow, DataUnavailable
from tasks.smoltalk import SmolTalk, parse_chat

REAL = Path(os.environ.get("NANOCHAT_DATA_DIR") or Path(__file__).parents[2] / "shared" / "data")
needs_real_data = pytest.mark.skipif(
    not (REAL / "aqua").is_dir(), reason="no real data beside the repository"
)

RAW = {
    "question": "What is 3 * 7?",
    "options": ["A)21", "B)24", "C)10", "D)37", "E)2"],
    "rationale": "3 * 7 = 21\nAnswer is A",
    "correct": "A",
}
PROBLEM = Problem("What is 3 * 7?", ("21", "24", "10", "37", "2"), "A", "3 * 7 = 21\nAnswer is A")


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty base dir, no local data, no network."""
    for name in ("NANOCHAT_DATA_DIR", "AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(common, "reachable", lambda url: False)
    monkeypatch.setattr("nanochat.dataset.reachable", lambda url: False)
    return tmp_path / "base"


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def numbered(count: int) -> list[dict[str, Any]]:
    words = ["apples", "boats", "cats", "doors", "eggs", "figs", "goats", "hats", "inks", "jars"]
    return [
        {
            **RAW,
            "question": f"{words[n % 10]} {words[n // 10 % 10]} {words[n // 100 % 10]}?",
            "correct": "ABCDE"[n % 5],
        }
        for n in range(count)
    ]


# ---- problems --------------------------------------------------------------------------------------------------------


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


# ---- AQuA in files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dev.jsonl", "dev.jsonl.gz", "dev.json", "validation.jsonl", "val.json.gz"])
def test_aqua_is_found_under_every_usual_name(base: Path, name: str) -> None:
    write_rows(base / "aqua" / name, [RAW])
    task = AQUA("validation")
    assert len(task) == 1 and task.source.endswith(name) and task.skipped == {}


def test_the_order_of_search_is_flag_environment_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, count in (("flag", 1), ("variable", 2), ("data/aqua", 3), ("base/aqua", 4)):
        write_rows(tmp_path / place / "dev.jsonl", numbered(count))
    assert len(AQUA("validation")) == 4
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "data"))
    assert len(AQUA("validation")) == 3
    monkeypatch.setenv("NANOCHAT_AQUA_DIR", str(tmp_path / "variable"))
    assert len(AQUA("validation")) == 2
    assert len(AQUA("validation", path=tmp_path / "flag")) == 1
    assert len(AQUA("validation", path=tmp_path / "flag" / "dev.jsonl")) == 1


def test_a_folder_that_was_named_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUA_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="AQUA_DATA_DIR=.*nowhere does not exist"):
        AQUA("validation")


def test_missing_data_says_where_it_was_looked_for_and_quickly() -> None:
    began = time.perf_counter()
    with pytest.raises(DataUnavailable, match=r"aqua/test\.jsonl.*Hugging Face.*google-deepmind"):
        AQUA("test")
    assert time.perf_counter() - began < 2


def test_one_bad_row_in_two_hundred_is_counted_and_named(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = numbered(200)
    rows[6] = "{torn"
    write_rows(base / "aqua" / "dev.jsonl", rows)
    task = AQUA("validation")
    assert len(task) == 199 and task.skipped == {"not JSON": 1}
    assert task.bad_rows[0].startswith("dev.jsonl:7: not JSON")
    assert "dev.jsonl:7" in capsys.readouterr().out


def test_one_bad_row_in_a_hundred_is_refused(base: Path) -> None:
    write_rows(base / "aqua" / "dev.jsonl", [*numbered(99), {**RAW, "correct": "Z"}])
    with pytest.raises(UserError, match=r"1 of 100 rows .*dev\.jsonl:100: gold letter"):
        AQUA("validation")


def test_wrong_encoding_counts_as_a_bad_row(base: Path) -> None:
    path = write_rows(base / "aqua" / "dev.jsonl", numbered(150))
    path.write_bytes(path.read_bytes() + b'{"question": "\xff\xfe"}\n')
    assert AQUA("validation").skipped == {"not UTF-8": 1}


def test_torn_and_empty_files_are_refused_by_name(base: Path) -> None:
    path = write_rows(base / "aqua" / "dev.jsonl.gz", numbered(50))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"dev\.jsonl\.gz is torn after line"):
        AQUA("validation")
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match="is empty"):
        AQUA("validation")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        AQUA("validation")


def test_train_loses_rows_that_repeat_a_held_out_question(base: Path) -> None:
    write_rows(base / "aqua" / "dev.jsonl", [{**RAW, "question": "What is 3*7 ?"}])
    write_rows(base / "aqua" / "test.jsonl", [{**RAW, "question": "How old is Ann, 40?"}])
    extra = {**RAW, "question": "how old is ann, 1,041?"}
    write_rows(base / "aqua" / "train.jsonl", [RAW, extra, *numbered(20), numbered(1)[0]])
    task = AQUA("train")
    assert len(task) == 20
    assert task.skipped == {
        "repeats a held-out question": 1,
        "a held-out question with other numbers": 1,
        "repeats an earlier row": 1,
    }


def test_mathqa_is_added_on_demand_only(base: Path) -> None:
    write_rows(base / "aqua" / "train.jsonl", numbered(10))
    write_rows(base / "aqua" / "train_mathqa.jsonl.gz", numbered(30)[10:])
    assert len(AQUA("train")) == 10
    both = AQUA("train", include_mathqa=True)
    assert len(both) == 30 and "train_mathqa" in both.source


def test_train_is_shuffled_by_its_seed_and_evaluation_is_not(base: Path) -> None:
    for split in ("train", "dev"):
        write_rows(
            base / "aqua" / f"{split}.jsonl", numbered(500) if split == "dev" else numbered(1000)[500:]
        )
    assert AQUA("train").problems == AQUA("train").problems != AQUA("train", seed=1).problems
    assert [p.question for p in AQUA("validation").problems[:2]] == [row["question"] for row in numbered(2)]


def test_permuted_training_rows_are_stable_and_lose_the_letter_prior(base: Path) -> None:
    write_rows(base / "aqua" / "train.jsonl", [{**row, "correct": "A"} for row in numbered(500)])
    task = AQUA("train", permute_seed=7)
    assert task[3] == task[3] == AQUA("train", permute_seed=7)[3]
    assert task.problem(3).gold == task[3]["answer_letter"]
    assert task.majority().share < 0.3


def test_majority_is_the_score_of_the_commonest_letter(base: Path) -> None:
    write_rows(base / "aqua" / "dev.jsonl", numbered(12))
    majority = AQUA("validation").majority()
    assert (majority.letter, majority.share) == ("A", 0.25)
    assert majority.counts == {"A": 3, "B": 3, "C": 2, "D": 2, "E": 2}
    assert AQUA.baseline == 0.2


def test_what_comes_over_the_network_is_kept(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.aqua.hub_rows", lambda hub, name, tried: numbered(5))
    first = AQUA("test")
    assert first.source == "Hugging Face deepmind/aqua_rat (raw), split test"
    monkeypatch.setattr("tasks.aqua.hub_rows", lambda hub, name, tried: pytest.fail("asked again"))
    second = AQUA("test")
    assert second.problems == first.problems and second.source.endswith("test.jsonl.gz")


def test_keys_see_through_spelling_and_numbers() -> None:
    one, two = Problem("A 3-kg box?", (), "A"), Problem("a 1,200.5 KG box", (), "A")
    assert exact_key(one) == "a3kgbox" and exact_key(one) != exact_key(two)
    assert masked_key(one) == masked_key(two)
    assert deduplicate([one, one, two], []) == ([one, two], {"repeats an earlier row": 1})


# ---- slices and mixtures ---------------------------------------------------------------------------------------------


class Numbers(Task):
    """The numbers below `count` as conversations."""

    def __init__(self, name: str, count: int, **slicing: Any) -> None:
        super().__init__(**slicing)
        self.name, self._count, self.source = name, count, "memory"

    def num_examples(self) -> int:
        return self._count

    def get_example(self, index: int) -> dict[str, Any]:
        return {"number": (self.name, index)}


slices = st.tuples(st.integers(0, 12), st.none() | st.integers(0, 12), st.integers(1, 5))


@given(st.integers(0, 10), slices, slices)
def test_slices_of_slices_are_those_of_a_list(
    count: int, one: tuple[int, int | None, int], two: tuple[int, int | None, int]
) -> None:
    task = Numbers("n", count, start=one[0], stop=one[1], step=one[2]).sliced(*two)
    wanted = list(range(count))[slice(*one)][slice(*two)]
    assert len(task) == len(wanted)
    assert [c["number"][1] for c in task] == [task[i]["number"][1] for i in range(len(task))] == wanted


@pytest.mark.parametrize("slicing", [{"start": -1}, {"stop": -1}, {"step": 0}])
def test_a_slice_that_is_none_is_refused(slicing: dict[str, int]) -> None:
    with pytest.raises(UserError, match="slice"):
        Numbers("n", 3, **slicing)


def test_a_mixture_holds_each_part_as_often_as_asked() -> None:
    mixture = TaskMixture(
        [Numbers("a", 5), (Numbers("b", 4), 10), (Numbers("c", 9), 3), (Numbers("d", 1), 0)]
    )
    numbers = [c["number"] for c in mixture]
    assert len(mixture) == len(numbers) == 18
    assert sorted(n for n in numbers if n[0] == "a") == [("a", i) for i in range(5)]
    counts = [numbers.count(("b", i)) for i in range(4)]
    assert sum(counts) == 10 and set(counts) == {2, 3}
    assert len({n for n in numbers if n[0] == "c"}) == 3


def test_a_mixture_is_shuffled_by_its_seed_and_can_be_sliced() -> None:
    def order(seed: int, **slicing: Any) -> list[Any]:
        return [c["number"] for c in TaskMixture([Numbers("a", 20), Numbers("b", 20)], seed=seed, **slicing)]

    assert order(1) == order(1) != order(2)
    assert order(1, start=5, stop=9) == order(1)[5:9]
    assert [c["number"] for c in limit(TaskMixture([Numbers("a", 20)], seed=1), 3)] == [
        c["number"] for c in TaskMixture([Numbers("a", 20)], seed=1)
    ][:3]


def test_an_empty_part_of_a_mixture_is_refused() -> None:
    with pytest.raises(UserError, match="5 examples wanted of a task that has none"):
        TaskMixture([(Numbers("a", 0), 5)])


# ---- the other tasks -------------------------------------------------------------------------------------------------


def test_a_worked_answer_of_gsm8k_becomes_calculator_calls() -> None:
    assert parts_of("5+6=<<5+6=11>>11 eggs\n#### 11") == [
        {"type": "text", "text": "5+6="},
        {"type": "python", "text": "5+6"},
        {"type": "python_output", "text": "11"},
        {"type": "text", "text": "11 eggs\n#### 11"},
    ]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("so\n#### 1,080", "1080"),
        ("#### $5.50", "5.5"),
        ("#### -3", "-3"),
        ("#### .5", "0.5"),
        ("#### 10.", "10"),
        ("#### 5 eggs", "5"),
        ("#### 1\n#### 2", "2"),
        ("####7", "7"),
        ("18", None),
        ("#### eighteen", None),
        ("#### 1/2", None),
        ("#### 5x", None),
        ("#### 1\n####", None),
        ("", None),
    ],
)
def test_the_number_after_the_last_marker_is_the_answer(text: str, number: str | None) -> None:
    assert parse_number(text) == number


def test_gsm8k_validation_is_taken_from_train(base: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(160)]
    write_rows(base / "eval" / "gsm8k_train.jsonl.gz", rows)
    train, validation = GSM8K("train"), GSM8K("validation")
    assert len(train) == 150 and len(validation) == 10
    questions = [{c["messages"][0]["content"] for c in task} for task in (train, validation)]
    assert not questions[0] & questions[1]
    assert train.reward(train[0], "#### 1").total == 1.1
    assert train.reward(train[0], "#### 2").total == 0.1
    assert train.reward(train[0], "1").total == 0.0


def test_arc_and_mmlu_read_local_rows_and_those_of_the_hub(base: Path) -> None:
    local = {"question": "q", "choices": ["w", "x", "y"], "answerKey": "C"}
    hub = {"question": "q", "choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    mmlu = {"question": "q", "choices": ["w", "x", "y"], "answer": 2}
    write_rows(base / "eval" / "arc_easy_test.jsonl", [local, hub])
    write_rows(base / "eval" / "mmlu_test.jsonl", [mmlu, local, {"train": mmlu}])
    for task in (ARC("ARC-Easy", "test"), MMLU("test")):
        for conversation in task:
            assert conversation["messages"][1]["content"] == "Answer: C"
            assert conversation["letters"] == ["A", "B", "C"]
            assert task.reward(conversation, "Answer: C").total == 1.1
        assert task.eval_type == "categorical"


@pytest.mark.parametrize("key", ["D", "0", "4", "", "AB", None, -1, 3])
def test_a_gold_key_outside_the_choices_is_a_bad_row(base: Path, key: Any) -> None:
    write_rows(
        base / "eval" / "mmlu_test.jsonl", [{"question": "q", "choices": ["w", "x", "y"], "answerKey": key}]
    )
    with pytest.raises(UserError, match="gold answer is none of the choices"):
        MMLU("test")


def test_an_unknown_split_or_subset_is_refused() -> None:
    refused: list[Callable[[], Task]] = [
        lambda: AQUA("dev"),
        lambda: GSM8K("dev"),
        lambda: ARC("ARC-Hard"),
        lambda: MMLU("x"),
        lambda: SmolTalk("x"),
    ]
    for make in refused:
        with pytest.raises(UserError, match="use"):
            make()


HUMAN = {
    "task_id": "t/0",
    "prompt": "import math\n\ndef area(r):\n",
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(f):\n    assert f(0) == 0",
    "entry_point": "area",
}


def test_humaneval_runs_nothing_unless_it_was_given_the_means(base: Path) -> None:
    write_rows(base / "eval" / "humaneval.jsonl", [HUMAN])
    refusing = HumanEval()
    with pytest.raises(UserError, match="ask for it by flag"):
        refusing.evaluate(refusing[0], "pass")
    programs: list[str] = []

    def execute(program: str) -> bool:
        programs.append(program)
        exec(compile(program, "test", "exec"), {})  # our own text, in a test
        return True

    task = HumanEval(execute=execute)
    for reply in (
        HUMAN["canonical_solution"],
        f"Here:\n```python\n{HUMAN['prompt']}    return r * r\n```\nbye",
    ):
        assert task.evaluate(task[0], reply)
    assert all(program.startswith("import math") for program in programs)


def test_a_program_is_the_fenced_block_or_everything() -> None:
    assert extract_program("a\n```python\nx = 1\n```\nb") == "x = 1"
    assert extract_program("```\nx = 1") == "x = 1"
    assert extract_program("x = 1") == "x = 1"


GOOD_CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
BAD_CHATS: list[Any] = [
    [],
    GOOD_CHAT[:1],
    GOOD_CHAT[::-1],
    [*GOOD_CHAT, GOOD_CHAT[0]],
    [GOOD_CHAT[0], *GOOD_CHAT],
    [{"role": "system", "content": "s"}],
    [*GOOD_CHAT, {"role": "system", "content": "s"}],
    [GOOD_CHAT[0], {"role": "assistant", "content": " "}],
    [GOOD_CHAT[0], {"role": "assistant", "content": None}],
    [GOOD_CHAT[0], {"role": "assistant", "content": [{"type": "image", "text": "x"}]}],
    ["hi", "hello"],
    "hi",
]


@pytest.mark.parametrize("messages", BAD_CHATS)
def test_a_conversation_must_alternate_and_end_with_the_assistant(messages: Any) -> None:
    with pytest.raises(BadRow):
        parse_chat({"messages": messages})


def test_local_chat_stands_in_for_smoltalk_and_says_so(base: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, GOOD_CHAT[1]]} for n in range(100)]
    write_rows(tmp_path / "chat" / "one.jsonl.gz", rows[:60])
    write_rows(tmp_path / "chat" / "two.jsonl", [*rows[60:], {"messages": GOOD_CHAT[:1]}])
    train, test = SmolTalk("train", path=tmp_path / "chat"), SmolTalk("test", path=tmp_path / "chat")
    assert len(train) == 95 and len(test) == 5
    assert train.source.endswith("chat (2 files)") and train.skipped == {"turns do not alternate": 1}
    seen = [c["messages"][0]["content"] for c in (*train, *test)]
    assert sorted(seen) == sorted(f"q{n}" for n in range(100))


def test_custom_conversations_come_with_or_without_an_envelope(base: Path) -> None:
    system = [{"role": "system", "content": "s"}, *GOOD_CHAT]
    write_rows(base / "identity_conversations.jsonl", [GOOD_CHAT, {"messages": system}])
    task = CustomJSON()
    assert task.name == "identity_conversations" and [c["messages"] for c in task] == [GOOD_CHAT, system]
    with pytest.raises(DataUnavailable):
        CustomJSON(base / "other.jsonl")


# ---- prepare_aqua ----------------------------------------------------------------------------------------------------


def test_prepared_aqua_reads_back_as_the_same_problems(base: Path, tmp_path: Path, capsys: Any) -> None:
    from scripts.prepare_aqua import Config, main

    write_rows(tmp_path / "raw" / "train.json", [RAW, *numbered(50)])
    write_rows(tmp_path / "raw" / "dev.json", [RAW])
    main(Config(output_dir=str(tmp_path / "out"), source=str(tmp_path / "raw"), max_train=30))
    said = capsys.readouterr().out
    assert "train: 1 rows dropped, repeats a held-out question" in said and "test: left out" in said
    prepared, direct = AQUA("train", path=tmp_path / "out"), AQUA("train", path=tmp_path / "raw")
    assert len(prepared) == 30
    assert {str(c) for c in prepared} <= {str(c) for c in direct}


# ---- the real rows ---------------------------------------------------------------------------------------------------


@needs_real_data
def test_every_real_aqua_row_earns_full_reward_and_says_its_answer_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(REAL))
    train, more, dev = AQUA("train"), AQUA("train", include_mathqa=True), AQUA("validation")
    assert (
        len(dev) == 254
        and len(train) > 4_400
        and len(more) > 11_000
        and not more.bad_rows
        and not dev.bad_rows
    )
    for task in (train, more.sliced(step=7), dev):
        for conversation in task:
            texts = [part["text"] for part in conversation["messages"][1]["content"]]
            assert task.reward(conversation, "\n".join(texts)).total == 1.1
            assert all(task.reward(conversation, text).total == 0 for text in texts[:-1])


@needs_real_data
def test_the_majority_letter_of_dev_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(REAL))
    majority = AQUA("validation").majority()
    assert majority.counts == {"A": 69, "B": 66, "C": 43, "D": 50, "E": 26}
    assert round(majority.share, 4) == 0.2717


@needs_real_data
def test_gold_replies_of_every_real_task_earn_full_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(REAL))
    for task in (
        GSM8K("train"),
        GSM8K("test"),
        ARC("ARC-Easy", "test"),
        ARC("ARC-Challenge", "validation"),
        MMLU(),
    ):
        assert not task.skipped
        for conversation in task.sliced(step=7):
            content = conversation["messages"][1]["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            assert task.reward(conversation, text).total == 1.1

"""Slices and mixtures, and every task but AQuA: gold replies earn full reward, bad rows are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_rows import GOOD_CHAT, REAL, bare_machine, needs_real_data, with_hub, write_rows  # noqa: F401

from nanochat.common import UserError
from tasks import common
from tasks.aqua import AQUA
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, limit
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, parse_number, parts_of
from tasks.humaneval import HumanEval, extract_program
from tasks.mmlu import MMLU
from tasks.rows import BadRow, DataUnavailable
from tasks.smoltalk import SmolTalk, parse_chat


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
        ("#### 1.5x", None),
        ("#### 2.50/hour", None),
        ("#### 3,5/2", None),
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


def test_a_failing_hub_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with_hub(monkeypatch, RuntimeError("502 from the proxy\nlong trace"))
    with pytest.raises(DataUnavailable, match=r"RuntimeError: 502 from the proxy\)") as caught:
        MMLU("test")
    assert "long trace" not in str(caught.value)


def test_rows_of_the_hub_are_kept_for_the_next_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_hub(monkeypatch, [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(3)])
    assert GSM8K("test").source == "Hugging Face openai/gsm8k (main), split test"
    monkeypatch.setattr(common, "reachable", lambda url: False)
    kept = GSM8K("test")
    assert len(kept) == 3 and kept.source.endswith("gsm8k_test.jsonl.gz")


def test_smoltalk_of_the_hub_is_read_as_far_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, GOOD_CHAT[1]]} for n in range(200)]
    rows[150] = {"messages": []}
    with_hub(monkeypatch, rows)
    task = SmolTalk("train", stop=60)
    assert len(task) == 60 and task.skipped == {"turns do not alternate": 1}
    assert task[0]["messages"][0]["content"] == "q199"
    with_hub(monkeypatch, [{"messages": []}, *rows[:10]])
    with pytest.raises(UserError, match="1 of 11 rows"):
        SmolTalk("train")


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

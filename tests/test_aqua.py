"""AQuA is found, read, counted, de-duplicated, prepared; the real rows earn what they should."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
from task_rows import RAW, REAL, bare_machine, needs_real_data, numbered, with_hub, write_rows  # noqa: F401

from nanochat.common import UserError
from tasks.aqua import AQUA, Problem, deduplicate
from tasks.problem import exact_key, masked_key, shares_words
from tasks.rows import DataUnavailable


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
    assert time.perf_counter() - began < 20, "retries against a network that is not there take minutes"


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


def test_held_out_questions_are_looked_for_where_an_evaluation_finds_them(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data" / "aqua" / "train.jsonl", [RAW, *numbered(20)])
    write_rows(base / "aqua" / "test.jsonl", [{**RAW, "question": "What is 3*7 ?"}])
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "data"))
    assert AQUA("test").problems[0].question == "What is 3*7 ?"
    assert AQUA("train").skipped == {"repeats a held-out question": 1}
    # A file that was named stands for itself, and for no other split.
    assert len(AQUA("train", path=tmp_path / "data" / "aqua" / "train.jsonl")) == 21


def test_train_from_the_network_is_rid_of_held_out_questions_the_first_time(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = with_hub(monkeypatch, [])
    rows = {"train": [RAW, *numbered(20)], "validation": [RAW], "test": numbered(1)}
    monkeypatch.setattr(fake, "load_dataset", lambda path, config, *, split: rows[split])
    first, second = AQUA("train"), AQUA("train")
    assert second.source.endswith("train.jsonl.gz")
    assert first.problems == second.problems and first.skipped == {"repeats a held-out question": 2}


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


def test_a_line_break_of_unicode_inside_a_row_ends_no_line(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**RAW, "question": "one\u2028two\u0085three?"}, *numbered(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    monkeypatch.setattr("tasks.aqua.fetch_bytes", lambda url: text.encode())
    assert len(AQUA("test")) == 4


def test_the_hub_is_asked_for_the_raw_config_by_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = with_hub(monkeypatch, numbered(5))
    assert len(AQUA("validation")) == 5
    assert fake.asked == [("deepmind/aqua_rat", "raw", "validation")]


def test_keys_see_through_spelling_and_numbers() -> None:
    one, two = Problem("A 3-kg box?", (), "A"), Problem("a 1,200.5 KG box", (), "A")
    assert exact_key(one) == "a3kgbox" and exact_key(one) != exact_key(two)
    assert masked_key(one) == masked_key(two)
    assert deduplicate([one, one, two], []) == ([one, two], {"repeats an earlier row": 1})


def test_thirteen_words_in_a_row_of_a_held_out_question_are_too_many() -> None:
    text = "a farmer who keeps hens and cows counts fifty heads and 140 feet in his yard"
    words = text.split()
    held = Problem(text, (), "A")
    longer = Problem("One day, A farmer, " + " ".join(words[2:13]) + "; how many hens?", (), "A")
    shorter = Problem(" ".join(words[:12]) + " how many hens?", (), "A")
    kept, dropped = deduplicate([longer, shorter], [held])
    assert kept == [shorter] and dropped == {"thirteen words in a row of a held-out question": 1}
    assert shares_words(["none of it", held.question.upper()], [held.question]) == [False, True]


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


def test_sft_validates_on_as_many_rows_as_asked_and_on_all_for_minus_one(base: Path) -> None:
    from scripts.chat_sft import Config, validation_tasks

    write_rows(base / "aqua" / "dev.jsonl", numbered(9))
    for asked, count in ((4, 4), (-1, 9)):
        assert len(validation_tasks(Config(aqua_val_examples=asked))[0]) == count

"""Names lead to tasks, mixtures leave out what cannot be had and say so, and the curriculum keeps its order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat.common import UserError
from tasks import catalog
from tasks.catalog import (
    Generated,
    Interleaved,
    Part,
    assemble,
    at_most,
    open_rl_tasks,
    open_task,
    parse_levels,
    problems,
)
from tasks.rows import DataUnavailable
from tasks.synthetic import Synthetic


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No local data and no network."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("NANOCHAT_DATA_DIR", "AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tasks.aqua.fetch_bytes", lambda url: (_ for _ in ()).throw(UserError("no network")))


@dataclass(frozen=True)
class Wanted:
    aqua_train_examples: int = -1
    synthetic_examples: int = -1
    program_examples: int = 0
    quality: str = "mixed"
    aqua_path: str | None = None
    seed: int = 1


def test_task_names_are_understood_in_any_case_and_others_refused() -> None:
    assert open_task("synthetic").name == "SYNTHETIC"
    with pytest.raises(UserError, match="task AQAU is not known; use AQUA"):
        open_task("AQAU")
    with pytest.raises(DataUnavailable, match="AQUA"):
        open_task("AQUA")


def test_problems_of_our_own_stand_in_only_where_aqua_cannot_be_had() -> None:
    mixture, notes = assemble(problems(Wanted()), seed=1)
    assert len(mixture) == catalog.NUM_SYNTHETIC + catalog.NUM_SYNTHETIC // 10
    assert [kind for kind, _ in notes].count("skipped") == 1
    with pytest.raises(UserError, match="none of the parts"):
        assemble(problems(Wanted(synthetic_examples=0)), seed=1)


def test_at_most_bounds_every_part() -> None:
    parts = [
        Part("a", lambda: Synthetic(size=50)),
        Part("b", lambda: Synthetic(size=50), 5),
        Part("c", Synthetic, 0),
    ]
    mixture, _ = assemble(at_most(parts, 10), seed=1)
    assert len(mixture) == 15
    assert at_most(parts, -1) == parts


def test_prose_and_our_own_documents_are_interleaved_evenly() -> None:
    written = Generated(lambda number, seed: f"ours {number}", 0, 100)
    documents = Interleaved(written, ["book 0", "book 1"], share=0.25)
    first = [documents[number] for number in range(8)]
    assert [text for text in first if text.startswith("ours")] == ["ours 0", "ours 1"]
    assert [text for text in first if text.startswith("book")] == ["book 0", "book 1"] * 3


def test_rl_tasks_share_no_problem_between_training_and_validation() -> None:
    train, held_out = open_rl_tasks("SYNTHETIC", difficulty="2", seed=3)
    assert {train[index]["difficulty"] for index in range(100)} == {2}
    key = ("family", "numbers")
    seen = {(row["family"], tuple(sorted(row["numbers"]))) for row in (train[index] for index in range(3000))}
    assert not seen & {(row["family"], tuple(sorted(row["numbers"]))) for row in held_out}, key
    with pytest.raises(UserError, match="--difficulty=2 is for"):
        open_rl_tasks("AQUA", difficulty="2")


def test_levels_are_read_or_refused() -> None:
    assert (parse_levels(""), parse_levels("2"), parse_levels("0-1")) == (None, (2, 2), (0, 1))
    with pytest.raises(UserError, match="--difficulty=hard"):
        parse_levels("hard")


def test_programs_join_when_asked_for_and_bring_look_ups(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    row = '{"question": "Add 5 and 6 .", "equation": "x=5+6", "answer": 11}\n'
    (tmp_path / "eval" / "mawps.jsonl").write_text(row)
    mixture, notes = assemble(problems(Wanted(synthetic_examples=0, program_examples=40)), seed=1)
    assert len(mixture) == 44
    assert any("programs: 40 conversations from no AQuA rationales" in text for _, text in notes)

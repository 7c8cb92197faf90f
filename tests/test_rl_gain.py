"""Does RL help: what the tables say follows from the outcomes on disk, whatever order they stand in."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rl_gain import broken_bounds
from nanochat.rl_gain import (
    as_numbers,
    gain_table,
    load_gain,
    paired,
    seeds_table,
    standard_error,
    tasks_asked,
)
from nanochat.run_files import Files, write_json
from nanochat.statistics import mcnemar

GOLD = "ABCDE"


def write(run: Path, stage: str, correct: str, *, task: str = "SYNTHETIC", order: int = 1) -> None:
    """An evaluation in which question i was answered rightly where `correct[i]` is 1."""
    rows = [
        {"index": i, "gold": GOLD[i % 5], "predicted": "A", "correct": float(mark == "1")}
        for i, mark in enumerate(correct)
    ]
    files = Files(run / stage)
    files.table(f"outcomes/{task}", 0, rows[::order])
    files.finish({})


def write_run(run: Path, *, before: str = "1100000000", after: str = "0111110000") -> None:
    write(run, "chat_eval_sft", before)
    write(run, "chat_eval_rl", after, order=-1)
    write(run, "control_forbid_bare", "1111100000")
    write(run, "control_random_reward", before)
    write(run, "control_sft_worked", "1111100000")
    write(run, "control_rl_worked", "1111000000")
    Files(run / "rl").finish({})


def test_a_gain_is_paired_question_by_question(tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    gain = load_gain(tmp_path / "r", "SYNTHETIC")
    found = {
        (condition.stage, other): (pair.gained, pair.lost) for condition, other, pair in gain.comparisons()
    }
    assert found == {
        ("chat_eval_rl", "chat_eval_sft"): (4, 1),
        ("chat_eval_rl", "control_forbid_bare"): (1, 1),
        ("control_random_reward", "chat_eval_sft"): (0, 0),
        ("control_forbid_bare", "chat_eval_sft"): (3, 0),
        ("control_rl_worked", "control_sft_worked"): (0, 1),
    }
    assert gain.asked["chat_eval_rl"].majority == 0.2
    text = gain_table(gain)
    assert "| RL | 50.0 % (23.7 to 76.3) | 10 |" in text
    assert f"**RL** against SFT: +30.0 points; 4 gained, 1 lost, McNemar p = {mcnemar(4, 1):.2g}." in text


def test_evaluations_of_other_questions_are_not_paired(tmp_path: Path) -> None:
    write(tmp_path / "r", "chat_eval_sft", "110")
    write(tmp_path / "r", "chat_eval_rl", "1100")
    gain = load_gain(tmp_path / "r", "SYNTHETIC")
    assert set(gain.asked) == {"chat_eval_sft", "chat_eval_rl"} and list(gain.comparisons()) == []
    assert gain_table(gain).endswith("with one answer to each.")


def test_letters_alone_are_not_paired_with_written_answers(tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    for stage, mode in (("chat_eval_sft", "generative"), ("chat_eval_rl", "letters")):
        write_json(tmp_path / "r" / stage / "summary.json", {"results": {"SYNTHETIC": {"mode": mode}}})
    gain = load_gain(tmp_path / "r", "SYNTHETIC")
    assert "chat_eval_rl" not in {condition.stage for condition, _, _ in gain.comparisons()}
    assert "| RL, letters alone | 50.0 %" in gain_table(gain)


def test_tasks_are_those_that_both_answered(tmp_path: Path) -> None:
    write(tmp_path / "r", "chat_eval_sft", "11", task="AQUA")
    write(tmp_path / "r", "chat_eval_rl", "11", task="AQUA letters")
    assert tasks_asked(tmp_path / "r") == [] == tasks_asked(tmp_path / "nowhere")
    write_run(tmp_path / "s")
    assert tasks_asked(tmp_path / "s") == ["SYNTHETIC"]


def test_seeds_have_a_mean_and_a_standard_error(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", after="1111111100")
    gains = [load_gain(tmp_path / name, "SYNTHETIC") for name in "ab"]
    assert [pair.difference for pair in paired(gains)["RL against SFT"] if pair] == pytest.approx([0.3, 0.6])
    assert standard_error([0.3, 0.6]) == pytest.approx(0.15) and standard_error([0.3]) is None
    text = seeds_table(gains)
    assert "| RL | 50.0 % | 80.0 % | 65.0 % | 15.0 |" in text
    assert "+45.0 | 15.0 |" in text


def test_a_condition_that_one_seed_lacks_stays_in_the_table(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write(tmp_path / "b", "chat_eval_sft", "1100000000")
    write(tmp_path / "b", "chat_eval_rl", "1100000000")
    gains = [load_gain(tmp_path / name, "SYNTHETIC") for name in "ab"]
    text = seeds_table(gains)
    assert "| RL from there | 40.0 % |  | 40.0 % |  |" in text
    assert as_numbers(gains)["accuracy"]["RL from there"] == [0.4, None]


def test_every_broken_bound_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    found = list(broken_bounds([load_gain(tmp_path / "a", "SYNTHETIC")]))
    assert found == [
        "SFT is below 30 %",
        "RL adds less than 5 points, or p >= 0.01, on one of the seeds",
        "RL from worked rationales loses more than 2 points",
    ]
    many = tmp_path / "b"
    write_run(many, before="1100" * 50, after="1110" * 50)
    write(many, "control_rl_worked", "1111100000")
    assert list(broken_bounds([load_gain(many, "SYNTHETIC")])) == []


def test_the_picture_has_every_seed_and_the_control(tmp_path: Path) -> None:
    from benchmarks.rl_gain_figure import draw

    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        write_run(run)
        for stage, better in (("rl", 0.5), ("rl_random", 0.0)):
            files = Files(run / stage)
            for step in range(1, 12):
                files.log(step, {"rl/acc": 0.2 + better * step / 12, "rl/avg_completion_len": 12.0})
    path = tmp_path / "gain.svg"
    draw([load_gain(run, "SYNTHETIC") for run in runs], runs, path)
    text = path.read_text()
    assert text.count("stroke: #0072b2") > text.count("stroke: #999999") > 4
    before = path.read_bytes()
    draw([load_gain(run, "SYNTHETIC") for run in runs], runs, path)
    assert path.read_bytes() == before

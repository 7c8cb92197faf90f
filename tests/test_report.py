"""The report says what the run directories say, whatever is missing in them."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest

from nanochat import report, report_text
from nanochat.common import UserError
from nanochat.figures import learning_curves, running_mean, series
from nanochat.run_files import Files, write_json

SYSTEM = {"platform": "Linux", "cpu": "Some CPU", "num_cores": 2, "memory_gib": 7.9, "gpus": []}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "base"


def score(task: str, correct: int, n: int = 254, mode: str = "generative") -> dict[str, Any]:
    return {
        "task": task, "mode": mode, "n": n, "correct": correct, "accuracy": correct / n, "low": 0.2, "high": 0.3,
        "chance": 0.2, "majority": 69 / 254, "majority_letter": "A", "parse_rate": 0.996,
        "predicted": {"A": 100, "B": 154},
    }  # fmt: skip


def write_stage(base: Path, stage: str, *, results: dict[str, Any] | None = None, run: str = "r1") -> Files:
    """A stage as a tracker leaves it; without `results` it never reached its end."""
    files = Files(base / "runs" / run / stage)
    config = {
        "stage": stage,
        "run": run,
        "config": {"depth": 3, "run": run},
        "system": SYSTEM,
        "world_size": 2,
    }
    write_json(
        files.directory / "config.json", config | {"started": "2026-01-02 03:04:05", "commit": "abc" * 12}
    )
    if results is not None:
        files.finish(results)
    return files


def write_run(base: Path) -> None:
    """A whole small run."""
    write_stage(base, "tok_train", results={"vocab_size": 65536, "compression": 4.8123456})
    trained = write_stage(base, "base")
    for step in range(60):
        trained.log(step, {"train/loss": 5 * math.exp(-step / 20) + 2, "train/grad_norm": 1.0})
    trained.note("data", "85,000 characters of our own")
    trained.note("skipped", "no shard: no network")
    trained.finish({"val_bpb": 1.25})
    write_stage(base, "sft", results={"val_bpb": 0.9})
    write_stage(base, "chat_eval_sft", results={"AQUA": score("AQUA", 70)})
    rl = write_stage(base, "rl")
    for step in range(10):
        rl.log(
            step, {"rl/acc": 0.3 + step / 100, "rl/letter_pred_counts/A": 3, "rl/letter_pred_counts/B": step}
        )
    row = {
        "question": "What is 1+1?\nA) 2",
        "completion": "1+1=2\n```\nAnswer: A",
        "gold": "A",
        "reward": 1.1,
    }
    rl.table(
        "rl/samples",
        9,
        [row | {"predicted": "A"}, row | {"question": "Other?", "predicted": None, "reward": 0.0}],
    )
    rl.finish({"best_step": 9})
    pair = {"compared_with": "sft", "before": score("AQUA", 70), "gained": 30, "lost": 20, "mcnemar_p": 0.2}
    results = {"AQUA": score("AQUA", 80) | pair, "AQUA rotations": {"eval/rotation_acc": 0.5}}
    write_stage(base, "chat_eval_rl", results=results)


def test_the_report_holds_every_part_and_its_figures(base: Path) -> None:
    write_run(base)
    assert report.main(["generate", "r1"]) == 0
    text = Path("report.md").read_text()
    assert text == (base / "report" / "report.md").read_text()
    for part in (
        "# Report of the run r1",
        "## Summary",
        "## Data",
        "## Base model training",
        "## Sample answers",
        "## Time",
    ):
        assert part in text, part
    assert (
        "| AQUA, generative |  | 27.6 % (20.0 to 30.0) | 31.5 % (20.0 to 30.0) | 27.2 % (always A) | 254 |"
        in text
    )
    assert "27.6 % to 31.5 %, +3.9 points; 30 gained, 20 lost, McNemar p = 0.2." in text
    assert "- AQUA rotations, eval/rotation_acc: 0.5000" in text
    assert "- vocab_size: 65,536" in text and "- compression: 4.8123" in text
    assert "Left out:\n\n- no shard: no network (Base model training)" in text
    for figure in ("base", "rl"):
        assert f"](report_figures/{figure}.png)" in text
        assert png_size(Path("report_figures") / f"{figure}.png") > (300, 200)


def test_several_answers_to_a_question_are_named_and_have_their_pass_at_k(base: Path) -> None:
    several = {"temperature": 1.0, "num_samples": 8, "split": "test", "maj": 0.3, "num_tied": 3}
    several |= {"pass_at": {"1": 0.25, "8": 0.7}, "guess_at": {"1": 0.2, "8": 0.832}}
    write_stage(base, "chat_eval_sft", results={"AQUA": score("AQUA", 70)})
    write_stage(base, "chat_eval_rl", results={"AQUA": score("AQUA", 80) | several})
    assert report.main(["generate", "r1"]) == 0
    text = Path("report.md").read_text()
    assert "| AQUA, generative | 27.6 %" in text
    assert "| AQUA test, generative, mean of 8 samples |  | 31.5 %" in text, "another measure, another row"
    assert "at temperature 1: pass@8 70.0 % (guessing 83.2 %), maj@8 30.0 %, 3 tied" in text


def test_the_level_to_beat_is_that_of_the_curves_own_questions(base: Path) -> None:
    rl = write_stage(base, "rl", results={})
    rl.log(0, {"eval/aqua_dev_acc": 0.37, "eval/majority": 0.375})
    write_stage(base, "chat_eval_rl", results={"AQUA": score("AQUA", 80)})
    run = report.load_run("r1")
    assert report.levels(run, run.stages["rl"]) == {"always the commonest letter": 0.375}


def outcomes(files: Files, correct: str) -> None:
    rows = [{"index": i, "gold": "A", "predicted": "A", "correct": float(c)} for i, c in enumerate(correct)]
    files.table("outcomes/AQUA", 0, rows)


def test_the_report_says_whether_rl_helped_and_has_the_controls(base: Path) -> None:
    write_run(base)
    outcomes(write_stage(base, "chat_eval_sft", results={}), "11000")
    outcomes(write_stage(base, "chat_eval_rl", results={}), "01110")
    random = write_stage(base, "rl_random")
    for step in range(3):
        random.log(step, {"rl/acc": 0.2, "rl/mean_reward": 0.3})
    random.finish({})
    control = write_stage(base, "control_random_reward", results={})
    outcomes(control, "10000")
    control.table("samples/AQUA", 0, [{"question": "Q", "completion": "x", "predicted": None, "gold": "A"}])
    assert report.main(["generate", "r1"]) == 0
    text = Path("report.md").read_text()
    assert "## Does RL help?\n\n### AQUA" in text
    assert "- **RL** against SFT: +20.0 points; 2 gained, 1 lost, McNemar p = 1." in text
    assert "- **control: rewards drawn by lot** against SFT: -20.0 points; 0 gained, 1 lost" in text
    assert "## Sample answers\n\nChat RL, samples." in text, "not those of a control"
    assert (base / "report" / "control-rewards-drawn-by-lot.md").is_file()
    assert "## Control, rewards drawn by lot" in text and "](report_figures/rl_random.png)" in text


def test_sections_have_nanochats_files_and_form(base: Path) -> None:
    write_run(base)
    report.main(["generate", "r1"])
    names = {path.stem for path in (base / "report").glob("*.md")}
    assert {
        "header",
        "tokenizer-training",
        "base-model-training",
        "chat-sft",
        "chat-evaluation-rl",
        "chat-rl",
    } <= names
    lines = (base / "report" / "tokenizer-training.md").read_text().splitlines()
    assert lines[0] == "## Tokenizer training"
    assert lines[1].startswith("timestamp: 20") and lines[2] == "" and lines[3] == "- vocab_size: 65,536"


def test_missing_unfinished_and_failed_stages_are_named(base: Path) -> None:
    write_stage(base, "base").log(0, {"train/loss": 1.0})
    write_stage(base, "mid").close(ValueError("no rows"))
    report.main(["generate"])
    text = Path("report.md").read_text()
    assert "Not run: Tokenizer training, Tokenizer evaluation, Base model loss" in text
    assert "**Base model training** not finished; last seen at" in text
    assert "ValueError: no rows" in text


def test_a_torn_last_line_of_a_live_run_does_no_harm(base: Path) -> None:
    files = write_stage(base, "base")
    files.log(0, {"train/loss": 1.0})
    with (files.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "train/lo')
    assert report.load_run("r1").stages["base"].metrics == [
        {"step": 0, "time": pytest.approx(0, abs=5), "train/loss": 1.0}
    ]


def test_an_unknown_run_is_refused_with_the_ones_there_are(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["generate"]) == 2
    write_run(base)
    assert report.main(["summarize", "r2"]) == 2
    error = capsys.readouterr().err
    assert "no runs under" in error and "no run 'r2'" in error and "runs there: r1" in error
    with pytest.raises(UserError, match="only letters"):
        report.load_run("../r1")


def test_summarize_prints_straight_columns_for_the_newest_run(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(base)
    assert report.main(["summarize"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, *rows = lines[: lines.index("")]
    assert header.split() == ["base", "sft", "rl", "guessing", "questions"]
    assert {len(row.rstrip()) <= len(header) for row in rows} == {True}
    assert any("31.5 % (20.0 to 30.0)" in row for row in rows)


def test_reset_removes_the_report_and_no_run(base: Path) -> None:
    write_run(base)
    report.main(["generate", "r1"])
    assert report.main(["reset"]) == 0
    assert not (base / "report").exists()
    assert (base / "runs" / "r1" / "rl" / "metrics.jsonl").exists()
    assert report.main(["reset"]) == 0


def test_a_completion_cannot_leave_its_fence() -> None:
    shown = report_text.sample(
        {"question": "Q", "completion": "````\n# not a title", "predicted": "A", "gold": "A"}
    )
    assert "\n`````text\n````\n# not a title\n`````\n" in shown


def test_numbers_read_as_in_nanochat() -> None:
    cases = {0.12345: "0.1235", 12345: "12,345", 999: "999", 1e-5: "1e-05", True: "yes", None: ""}
    assert {item: report_text.value(item) for item in cases} == cases
    assert [report_text.duration(s) for s in (41.6, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 5 min"]


def test_samples_are_of_different_questions_right_ones_first() -> None:
    rows = [
        {"question": q, "predicted": p, "gold": "A"}
        for q, p in [("x", "B"), ("x", "A"), ("y", "A"), ("y", "A"), ("z", "A")]
    ]
    assert [(row["question"], row["predicted"]) for row in report_text.choose_samples(rows)] == [
        ("x", "A"),
        ("y", "A"),
        ("x", "B"),
    ]


def test_curves_are_thinned_but_keep_their_end_and_skip_other_rows() -> None:
    rows = [{"step": step, "a": step * 2, **({"b": 1.0} if step % 10 == 0 else {})} for step in range(5000)]
    steps, values = series(rows, "a")
    assert len(steps) <= 2001 and steps[-1] == 4999 and values[-1] == 9998
    assert series(rows, "b")[0][:3] == [0, 10, 20]


def test_the_running_mean_of_a_constant_is_that_constant_and_skips_nan() -> None:
    assert running_mean([2.0] * 5, 2) == [2.0] * 5
    assert running_mean([1.0, math.nan, 3.0], 1) == [1.0, 2.0, 3.0]
    assert math.isnan(running_mean([math.nan], 3)[0])


def test_a_stage_without_curves_gets_no_picture(tmp_path: Path) -> None:
    assert not learning_curves("base", [{"step": 0, "train/loss": 1.0}], tmp_path / "x.png")
    assert not learning_curves(
        "tok_train", [{"step": s, "train/loss": 1.0} for s in range(9)], tmp_path / "x.png"
    )
    rows = [{"step": step, "train/loss": math.nan} for step in range(3)]
    assert learning_curves("base", rows, tmp_path / "x.png")


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height

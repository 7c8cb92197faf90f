"""The rows of docs/results.md follow from the summaries on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import HEADINGS, STAGES, VOTE, load_seed, rows, together
from nanochat.common import UserError
from nanochat.run_files import Files, write_json

LETTERS = {"A": 30, "B": 20, "C": 20, "D": 20, "E": 5, "none": 5}


def asked(accuracy: float, **more: Any) -> dict[str, Any]:
    one = {
        "accuracy": accuracy,
        "n": 100,
        "low": accuracy - 0.08,
        "high": accuracy + 0.09,
        "majority": 0.25,
        "parse_rate": 0.95,
        "predicted": LETTERS,
        **more,
    }
    return {"AQUA": one, "AQUA rotations": {"eval/rotation_acc": 0.22, "eval/rotation_consistency": 0.5}}


def write(run: Path, base: float, sft: float, rl: float) -> None:
    paired = {"before": {"accuracy": sft}, "mcnemar_p": 0.03}
    for stage, results in (
        ("base", asked(base)),
        ("sft", asked(sft)),
        ("rl", asked(rl, **paired)),
        ("rl_vote", {"AQUA": {"maj": 0.31, "num_samples": 16}}),
    ):
        Files(run / f"chat_eval_{stage}").finish(results)
    for stage in ("base", "sft", "rl"):
        files = Files(run / stage)
        files.finish({})
    about = {"commit": "0123456789", "system": {"gpus": [], "num_cores": 2, "cpu": "a CPU"}}
    write_json(run / "chat_eval_rl" / "config.json", about)


def test_a_row_has_the_mean_and_what_the_mean_hides(tmp_path: Path) -> None:
    write(tmp_path / "a", 0.20, 0.24, 0.30)
    write(tmp_path / "b", 0.22, 0.26, 0.25)
    seeds = [load_seed(tmp_path / name, name) for name in "ab"]
    assert seeds[0].results[VOTE]["AQUA"]["maj"] == 0.31 and seeds[0].hardware == "2 cores, a CPU"
    base, sft, rl = rows("0.4M", seeds)
    assert [row[1] for row in (base, sft, rl)] == list(STAGES) and len(rl) == len(HEADINGS)
    assert rl[2] == "27.5 % (2.5)" and rl[3] == "30.0 (22.0 to 39.0), 25.0 (17.0 to 34.0)"
    assert rl[-1] == "+6.0 (0.03), -1.0 (0.03)" and sft[-1] == ""
    assert together(seeds, "RL", "predicted") == "60 40 40 40 10 10"


def test_a_seed_that_is_not_finished_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a", 0.2, 0.2, 0.2)
    (tmp_path / "a" / "chat_eval_sft" / "summary.json").unlink()
    with pytest.raises(UserError, match="a has no evaluation chat_eval_sft"):
        load_seed(tmp_path / "a", "a")

"""The benchmarks' own claims: both sides do the same work, phases add up, and they run from end to end, small."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
from cloud_fakes import VirtualClock

from benchmarks import growth, rl_sides, rl_step, startup
from nanochat.common import UserError
from nanochat.rl import is_live

SMALL = rl_step.Config(
    depths="2",
    questions=3,
    samples=4,
    max_tokens=6,
    rows_per_call=2,
    vocab_size=300,
    repeats=1,
    memory=False,
    reference_stride=2,
)


def test_a_phase_within_another_stops_the_outer_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = VirtualClock()
    monkeypatch.setattr(time, "perf_counter", clock.monotonic)
    watch = rl_sides.Watch()
    with watch.phase("reward"):
        clock.sleep(1.0)
        watch.timing("rollout", clock.sleep)(5.0)
        clock.sleep(2.0)
    assert watch.seconds["rollout"] == 5.0
    assert watch.seconds["reward"] == 3.0


@pytest.mark.parametrize("stop_chance", [0.0, 0.2])
def test_both_sides_of_the_rl_step_learn_the_same(stop_chance: float) -> None:
    bench = rl_sides.Bench.open(dataclasses.replace(SMALL, stop_chance=stop_chance))
    sides = {name: rl_sides.make_side(name, bench, 2) for name in rl_sides.SIDES}
    rl_step.check_agreement(sides, 1e-3)
    groups = sides["ours"].sample(1)
    shorter = [group[:2] for group in groups]
    found = {name: side.update(groups if name == "ours" else shorter) for name, side in sides.items()}
    assert found["ours"] != pytest.approx(found["reference"], rel=1e-3)  # the check can fail


def test_dead_questions_are_dead_and_the_others_mostly_live() -> None:
    bench = rl_sides.Bench.open(dataclasses.replace(SMALL, samples=16, dead=1 / 3))
    live = [is_live(group) for group in rl_sides.Ours(bench, 2).sample(0)]
    assert live[-1] is False and any(live[:-1])


def test_the_rl_step_prints_a_row_for_each_side_and_one_line_of_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rl_step.main(SMALL)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, reference = found["results"]
    assert (ours["side"], reference["side"], reference["ratio"]) == ("ours", "reference", 1.0)
    assert ours["tokens"] == reference["tokens"] == pytest.approx(3 * 4 * 6)
    assert sum(ours[phase] for phase in rl_sides.PHASES) == pytest.approx(ours["seconds"])


def test_every_script_with_a_command_line_is_timed() -> None:
    names = startup.scripts_with_help("")
    assert {"base_train", "chat_rl", "chat_cli"} <= set(names)
    with pytest.raises(UserError, match="there is no chat_clu"):
        startup.scripts_with_help("chat_clu")


def test_growth_runs_small_and_draws(tmp_path) -> None:
    config = growth.Config(
        parts="rollout,train", rows="1,2", contexts="16,32", depths="2", max_tokens=4, vocab_size=300,
        repeats=1, batch_tokens=64, figure=str(tmp_path / "growth.svg"),
    )  # fmt: skip
    rows = growth.measure(config)
    assert {row["part"] for row in rows} == {"rows", "context", "train"}
    assert all(row["microseconds_per_token"] > 0 for row in rows)
    growth.draw(rows, tmp_path / "growth.svg")
    assert 1000 < (tmp_path / "growth.svg").stat().st_size < 1_000_000


def test_the_exponent_of_a_power_is_found() -> None:
    assert growth.exponent([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2.0)

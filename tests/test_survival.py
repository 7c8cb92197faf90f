"""Killed, stopped, orphaned, started twice: a real stage goes on where it was, and what it learns is the same to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_stages import STAGES

from benchmarks import processes
from benchmarks.soak import Config, growth
from benchmarks.survival import compare_checkpoints, compare_metrics
from nanochat.common import UserError

BASE = [
    *STAGES["base"], "--num_iterations=16", "--save_every=4", "--device_batch_size=4", "--eval_every=5",
    "--run=dummy", "--device_type=cpu",
]  # fmt: skip


def begin(home: Path, ranks: int, words: list[str] = BASE) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += [
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            "-m",
            words[0],
            "--",
        ]
        words = words[1:]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NANOCHAT_", "AQUA_", "WANDB_"))}
    env |= {"NANOCHAT_BASE_DIR": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*launcher, *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until(process: subprocess.Popen[str], words: str) -> str:
    """Read what a process prints until `words` are there."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if words in line:
            return printed
    raise AssertionError(f"no {words!r} in {printed}")


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == code, printed
    return printed


def limit(seconds_to_start: float) -> float:
    """Seconds in which a job with a dead rank must end: 60, more on a machine so crowded that starting takes long."""
    return max(60.0, 3 * seconds_to_start)


def same(ours: Path, theirs: Path) -> list[str]:
    metrics = Path("runs") / "dummy" / "base" / "metrics.jsonl"
    folder = Path("base_checkpoints") / "d2"
    return compare_checkpoints(ours / folder, theirs / folder) + compare_metrics(
        ours / metrics, theirs / metrics
    )


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base dir with a tokenizer."""
    from tests.small import tiny_tokenizer

    folder = tmp_path_factory.mktemp("empty")
    tiny_tokenizer().save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def uncut(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base training on two ranks that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uncut") / "home"
    shutil.copytree(empty, folder)
    finished(begin(folder, 2))
    return folder


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """BASE as a run that does not end by itself."""
    (tmp_path / "held.py").write_text(HELD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ["held", *BASE[1:]]


@pytest.mark.slow
def test_two_ranks_stopped_then_bereft_of_one_end_as_an_uncut_run(
    empty: Path, uncut: Path, tmp_path: Path, held: list[str]
) -> None:
    home = tmp_path / "home"
    shutil.copytree(empty, home)
    process = begin(home, 2, held)
    until(process, "base     1/16")
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    told = finished(process, 1)
    assert "stopped by SIGTERM after step" in told and "the same command goes on" in told
    starting = time.monotonic()
    process = begin(home, 2, held)
    until(process, "going on from base_checkpoints/d2 step")
    ranks = [
        pid
        for pid in processes.descendants(process.pid)
        if "held" in (words := processes.command_line(pid)) and "torch.distributed.run" not in words
    ]
    began = time.monotonic()
    processes.kill(ranks[-1:])
    printed = finished(process, 1)
    assert "Signal 9 (SIGKILL)" in printed, "the job ends, and says why"
    assert time.monotonic() - began < limit(began - starting)
    finished(begin(home, 2))
    assert same(uncut, home) == []


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.0, 2.0])
def test_ranks_that_lose_torchrun_while_they_start_do_not_wait_for_it(
    wait: float, empty: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(empty, home)
    # So many steps that they cannot be done before torchrun is killed.
    process = begin(home, 2, [*BASE, "--num_iterations=1000000"])
    ranks: list[int] = []
    while len(ranks) < 2:
        ranks = [pid for pid in processes.descendants(process.pid) if BASE[0] in processes.command_line(pid)]
        time.sleep(0.02)
    time.sleep(wait)
    processes.kill([process.pid])
    printed, _ = process.communicate(timeout=900)  # until the last of them has closed its output
    assert "who launched this process is gone" in printed or "torchrun, which launched this rank" in printed


# The stage itself, whose last rank waits at step 2 until it is asked to stop: it cannot end before the test has acted.
HELD = """
import os, time
from nanochat.config import cli
from nanochat.stage import Stage
from scripts import base_train

report = Stage.report

def held(self, step, *rest):
    report(self, step, *rest)
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1
    while step.index >= 2 and int(os.environ.get("RANK", "0")) == last and not self.requests.received:
        time.sleep(0.01)

Stage.report = held
base_train.main(cli(base_train.Config))
"""
IMPATIENT = """
from nanochat import locks
from nanochat.config import cli
from scripts import base_train

locks.PATIENCE_SECONDS = 0.5
base_train.main(cli(base_train.Config))
"""
FAILING = """
import os
from nanochat.config import cli
from nanochat.stage import Stage
from scripts import base_train

report = Stage.report

def failing(self, step, *rest):
    report(self, step, *rest)
    if step.index == 6 and os.environ["RANK"] == "1":
        raise MemoryError("the second rank has no memory left")

Stage.report = failing
base_train.main(cli(base_train.Config))
"""


@pytest.mark.slow
def test_a_fault_of_one_rank_ends_the_job_in_time_with_its_reason(
    empty: Path, uncut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(empty, home)
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    starting = time.monotonic()
    process = begin(home, 2, ["failing", *BASE[1:]])
    until(process, "base     1/16")
    began = time.monotonic()
    printed = finished(process, 1)
    assert time.monotonic() - began < limit(began - starting)
    assert "MemoryError: the second rank has no memory left" in printed
    finished(begin(home, 2))
    assert same(uncut, home) == []


@pytest.mark.slow
def test_one_rank_alone_is_guarded_stops_with_75_and_goes_on_with_two(
    empty: Path, uncut: Path, tmp_path: Path, held: list[str]
) -> None:
    home = tmp_path / "home"
    shutil.copytree(empty, home)
    process = begin(home, 1, held)
    until(process, "base     1/16")
    os.kill(process.pid, signal.SIGSTOP)  # so that it is still there when the second one comes
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    second = begin(home, 1, ["impatient", *BASE[1:]])
    printed = finished(second, 1)
    assert f"error: base d2 is in use by process {process.pid} on" in printed and "Traceback" not in printed
    os.kill(process.pid, signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    assert "stopped by SIGINT after step" in finished(process, 75)
    assert "stopped by SIGINT" in json.loads((home / "runs/dummy/base/summary.json").read_text())["failed"]
    finished(begin(home, 2))
    path = Path("runs") / "dummy" / "base" / "metrics.jsonl"
    ours, theirs = (
        [
            (row["step"], row["train/loss"])
            for row in map(json.loads, (folder / path).read_text().splitlines())
        ]
        for folder in (home, uncut)
    )
    assert [step for step, _ in ours] == [step for step, _ in theirs] == list(range(1, 17))
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], abs=1e-4)


# ---- the benchmark's own judgement


def lines(path: Path, rows: list[dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda rows: rows, []),
        (lambda rows: [row | {"time": 9.0, "time/save_seconds": 1.0, "perf/mfu": 1.0} for row in rows], []),
        (lambda rows: rows[:1] + rows[2:], ["steps [1, 3] instead of [1, 2, 3]"]),
        (lambda rows: rows[:2] + rows[1:], ["steps [1, 2, 2, 3] instead of [1, 2, 3]"]),
        (lambda rows: [rows[0] | {"train/loss": 0.1 + 1e-18}, *rows[1:]], []),
        (lambda rows: [rows[0] | {"train/loss": 0.1 + 1.4e-17}, *rows[1:]], ["step 1: train/loss"]),
        (lambda rows: [*rows[:2], rows[2] | {"val/bpb": 1.0}], ["step 3: val/bpb"]),
    ],
)
def test_metrics_are_compared_step_by_step(
    change: Callable[[list[dict[str, float]]], list[dict[str, float]]], found: list[str], tmp_path: Path
) -> None:
    rows = [{"step": step, "time": step / 2, "train/loss": 0.1 * step} for step in (1, 2, 3)]
    assert compare_metrics(lines(tmp_path / "a", rows), lines(tmp_path / "b", change(rows))) == found


def test_a_leak_is_told_from_noise() -> None:
    flat = [(step, 500.0 + step % 7, 20) for step in range(1000)]
    assert growth(flat, 1000)["flat"] is True
    leak = [(step, 500.0 + 0.05 * step, 20) for step in range(1000)]  # 50 KiB a step
    assert growth(leak, 1000)["flat"] is False
    files = [(step, 500.0, 20 + step // 400) for step in range(1000)]
    assert growth(files, 1000)["flat"] is False and growth(files, 1000)["open_files"] == [21, 22]
    with pytest.raises(UserError, match="too short a soak"):
        growth(flat[-5:], 1000)
    with pytest.raises(UserError, match="--requests=10 is too short a soak"):
        Config(requests=10)
    warm_up = [(step, 300.0 + min(step, 400), 20) for step in range(1000)]
    assert growth(warm_up, 1000)["flat"] is True

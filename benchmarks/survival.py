"""
Kill it at any time, run the same command again: does anything get lost? And does a long run leak?

    python -m benchmarks.survival                       # 6 kills and 300 steps of soak, minutes on two cores
    python -m benchmarks.survival --kills=30 --nproc=2
    python -m benchmarks.survival --only=soak --steps=5000

Kills: the whole pipeline at a tiny size runs once undisturbed; then again, and again after each `kill -9` at a random
moment, of a random victim: everything, the driver alone, the stage, torchrun or one of its ranks. Whenever it gets to its end,
every checkpoint must be bit for bit that of the undisturbed run (optimizer state included), and every metrics.jsonl
have each step once, with the same numbers. Soak: see benchmarks/soak.py. Exit code 1 when anything differs or grows.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks import processes
from benchmarks.soak import soak_chat, soak_rl, untrained
from nanochat.common import UserError
from nanochat.config import cli

ROOT = Path(__file__).resolve().parent.parent
RUN = "survival"
FOLDERS = {"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}
# The lite preset with more steps, so that kills find training at work, and a checkpoint every few of them.
KNOBS = {
    "PRESET": "lite", "RUN": RUN, "NO_INSTALL": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
    "OMP_NUM_THREADS": "1", "BASE_ITERATIONS": "60", "MID_ITERATIONS": "40", "SFT_ITERATIONS": "40", "RL_STEPS": "12",
    "SAVE_EVERY": "5", "RL_SAVE_EVERY": "2", "EVAL_EVERY": "20", "RL_EVAL_EVERY": "6", "KL_EVERY": "4", "ATTN_EVERY": "6",
    "DEVICE_TYPE": "cpu", "DTYPE": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Kill the pipeline, and let it run long."""

    kills: int = 6
    """kill -9 in all"""
    nproc: int = 1
    """ranks of each stage"""
    longest_wait: float | None = None
    """a kill comes at random within so many seconds of the start; by default a quarter of what the undisturbed run took"""
    steps: int = 300
    """steps of RL in the soak"""
    requests: int = 200
    """requests to the chat server in the soak"""
    only: Literal["all", "kills", "soak"] = "all"
    """one part alone"""
    seed: int = 0
    """of moments and victims"""

    def __post_init__(self) -> None:
        waits = self.longest_wait is None or self.longest_wait > 0
        if self.kills < 0 or self.nproc < 1 or not waits or self.steps < 50:
            raise UserError(
                "use --kills of 0 or more, --nproc of 1 or more, --longest_wait above 0, --steps of 50 or more"
            )


def main(config: Config) -> None:
    """Run the parts, print one JSON line each."""
    if sys.platform != "linux":
        raise UserError(f"this benchmark reads /proc, which {sys.platform} has not; run it on Linux")
    well = True
    with tempfile.TemporaryDirectory(prefix="nanochat-survival-") as folder:
        if config.only != "soak":
            uncut = Path(folder) / "uncut"
            began = time.monotonic()
            drive_to_the_end(uncut, config)
            seconds = time.monotonic() - began
            print(f"undisturbed: {seconds:.0f} s", flush=True)
            wait = seconds / 4 if config.longest_wait is None else config.longest_wait
            result = survive(uncut, Path(folder), replace(config, longest_wait=wait))
            print(json.dumps({"benchmark": "survival", **result}), flush=True)
            well = not result["differences"]
        if config.only != "kills":
            base = Path(folder) / "soak"
            untrained(base)
            for result in (soak_rl(base, config.steps), soak_chat(base, config.requests)):
                print(json.dumps({"benchmark": "soak", **result}), flush=True)
                well = well and result["flat"]
    if not well:
        raise SystemExit(1)


def environment(base: Path, nproc: int) -> dict[str, str]:
    """The caller's, without settings of a run, and with ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NANOCHAT_", "AQUA_", "WANDB_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return kept | KNOBS | {"NANOCHAT_BASE_DIR": str(base), "NPROC": str(nproc), "PATH": path}


@contextmanager
def driver(base: Path, nproc: int) -> Iterator[subprocess.Popen[bytes]]:
    """The pipeline's driver, running; its output goes to driver.log beside `base`."""
    base.mkdir(exist_ok=True)
    with (base / "driver.log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", "run_aquarat_lite.sh"], cwd=ROOT, env=environment(base, nproc), stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            processes.kill([*processes.descendants(process.pid), process.pid])
            process.wait()


def drive_to_the_end(base: Path, config: Config) -> None:
    """Run the driver undisturbed. Raises UserError with the end of its output when it does not get there."""
    with kept_report(), driver(base, config.nproc) as process:
        if process.wait(1800):
            raise UserError(f"the pipeline failed:\n{(base / 'driver.log').read_text()[-2000:]}")


def survive(uncut: Path, folder: Path, config: Config) -> dict[str, Any]:
    """Run, kill, run again; compare whatever comes to its end with the undisturbed run."""
    chance = random.Random(config.seed)
    victims: Counter[str] = Counter()
    during: Counter[str] = Counter()
    differences: list[str] = []
    rounds, began = 0, time.monotonic()
    base = folder / "killed0"
    while victims.total() < config.kills:
        ended, victim, stage = run_and_kill(base, config, chance)
        if victim:
            victims[victim] += 1
            during[stage] += 1
            print(f"kill {victims.total()} of {config.kills}: {victim}, during {stage}", flush=True)
        if ended:
            differences += compare(uncut, base)
            rounds += 1
            base = folder / f"killed{rounds}"
    if base.exists():
        drive_to_the_end(base, config)
        differences += compare(uncut, base)
        rounds += 1
    return {
        "kills": victims.total(),
        "victims": dict(victims),
        "during": dict(during),
        "pipelines_completed": rounds,
        "ranks": config.nproc,
        "differences": differences[:20],
        "seconds": round(time.monotonic() - began),
    }


def run_and_kill(base: Path, config: Config, chance: random.Random) -> tuple[bool, str, str]:
    """Start the driver and kill after a while; (whether the pipeline was at its end before, what was killed, in which stage)."""
    assert config.longest_wait is not None
    with kept_report(), driver(base, config.nproc) as process:
        try:
            code = process.wait(chance.uniform(0, config.longest_wait))
            if code:
                raise UserError(f"the pipeline failed:\n{(base / 'driver.log').read_text()[-2000:]}")
            return True, "", ""
        except subprocess.TimeoutExpired:
            pass
        everything = [process.pid, *processes.descendants(process.pid)]
        alone, stage = {"driver": [process.pid]}, "set-up"
        for pid in processes.stages(process.pid):
            words = " ".join(processes.command_line(pid))
            stage = words.partition("scripts.")[2].partition(" ")[0]
            alone["torchrun" if "torchrun" in words else "stage" if config.nproc == 1 else "rank"] = [pid]
        name = chance.choice(["everything", *alone])
        processes.kill(everything if name == "everything" else alone[name])
        if name not in ("everything", "driver"):
            wait_for_the_job(process, f"{name} was killed in {stage}", base)
    if name == "driver":  # orphans stop by themselves; `driver` knows only those that still have their parent
        wait_for_orphans([pid for pid in everything if pid != process.pid])
    return False, name, stage


def wait_for_the_job(process: subprocess.Popen[bytes], what: str, base: Path) -> None:
    """A dead stage or rank ends the job, within a minute. Raises UserError when it does not."""
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        text = (base / "driver.log").read_text()[-2000:]
        raise UserError(f"a minute after {what} the job still runs:\n{text}") from None


def wait_for_orphans(pids: list[int]) -> None:
    """Wait until processes whose driver was killed have gone. Raises UserError when one is there after a minute."""
    deadline = time.monotonic() + 60
    while left := [pid for pid in pids if processes.command_line(pid)]:
        if time.monotonic() > deadline:
            raise UserError(
                f"a minute after its driver was killed this still runs: {processes.command_line(left[0])}"
            )
        time.sleep(0.2)


@contextmanager
def kept_report() -> Iterator[None]:
    """The driver copies its report into the repository; what lay there comes back."""
    path = ROOT / "report.md"
    before = path.read_bytes() if path.exists() else None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)


def compare(uncut: Path, killed: Path) -> list[str]:
    """What differs between two base directories in which the pipeline came to its end; [] when nothing does."""
    differences = []
    for stage, folder in FOLDERS.items():
        differences += compare_checkpoints(
            uncut / f"{folder}_checkpoints" / "d2", killed / f"{folder}_checkpoints" / "d2"
        )
        path = Path("runs") / RUN / stage / "metrics.jsonl"
        differences += [f"{stage}: {text}" for text in compare_metrics(uncut / path, killed / path)]
    return differences


def compare_checkpoints(ours: Path, theirs: Path) -> list[str]:
    """Tensors of the last checkpoint, model and optimizer of every rank, that are not bit for bit the same."""
    import torch

    last = max(int(path.stem.split("_")[1]) for path in ours.glob("model_*.pt"))
    names = sorted(path.name for path in ours.glob(f"*_{last:06d}*.pt"))
    different = []
    for name in names:
        if not (theirs / name).exists():
            different.append(f"{theirs.parent.name}: {name} is missing")
            continue
        a, b = (dict(tensors(torch.load(folder / name, weights_only=True))) for folder in (ours, theirs))
        different += [
            f"{theirs.parent.name}/{name}: {key}"
            for key in a
            if key not in b or not torch.equal(a[key], b[key])
        ]
    return different


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor inside a state, by its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{name}/{key}")
    elif hasattr(value, "dtype"):
        yield name, value


def compare_metrics(ours: Path, theirs: Path) -> list[str]:
    """Steps that are missing or stand twice, and numbers that differ, those of the clock left out."""
    a, b = ([json.loads(line) for line in path.read_text().splitlines()] for path in (ours, theirs))
    if [row["step"] for row in a] != [row["step"] for row in b]:
        return [f"steps {[row['step'] for row in b]} instead of {[row['step'] for row in a]}"]

    def learnt(row: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in row.items() if k != "time" and not k.startswith(("time/", "perf/"))}

    found = []
    for row, other in zip(map(learnt, a), map(learnt, b), strict=True):
        found += [f"step {row['step']}: {k}" for k in {**row, **other} if row.get(k) != other.get(k)]
    return found


if __name__ == "__main__":
    main(cli(Config))

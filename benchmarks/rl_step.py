"""
A step of reinforcement learning: ours against the loop that one writes first, phase by phase, in time and memory.

    python -m benchmarks.rl_step                              # 16 questions x 16 samples x 64 tokens, depth 4
    python -m benchmarks.rl_step --dead=0.5                   # half of the questions teach nothing
    OMP_NUM_THREADS=1 python -m benchmarks.rl_step --repeats 3

Both sides stand in benchmarks/rl_sides.py and take turns. The reference does a quarter of the questions in a turn, and what
they took counts four times, its single optimizer step apart. First both are given the same episodes: loss and gradient norm
must agree before anything is timed.

`dead` questions are all wrong. Memory is that of processes of their own, which make one step each: the highest of the
whole process, and what the step needs beyond the model and its optimizer.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rl_sides import PHASES, SIDES, Bench, Side, Watch, Workload, make_side
from benchmarks.rollout import describe, say_what_is_skipped
from benchmarks.train import memory_mb
from nanochat.config import cli
from nanochat.rl import is_live


@dataclass(frozen=True)
class Config(Workload):
    """Compare a step of reinforcement learning with the plain loop's."""

    depths: str = "4"
    """depths of the models, with commas"""
    memory: bool = True
    """measure memory too, in processes of their own"""
    child: str = ""
    """(for the processes that this one starts)"""


def check_agreement(sides: dict[str, Side], tolerance: float) -> None:
    """Loss and gradient norm of the same episodes on both sides; they warm up as well."""
    groups = sides["ours"].sample(0)[:4]
    found = {name: side.update(groups) for name, side in sides.items()}
    torch.testing.assert_close(
        torch.tensor(found["ours"]), torch.tensor(found["reference"]), rtol=tolerance, atol=1e-6,
        msg=f"the sides learn different things: (loss, gradient norm) {found}",
    )  # fmt: skip


def timed(side: Side, step: int) -> dict[str, float]:
    """Seconds of the phases of one step, and how much of it there was."""
    side.watch = Watch()
    groups = side.sample(step)
    side.update(groups)
    tokens = sum(e.num_tokens for group in groups for e in group)
    found = {**side.watch.seconds, "tokens": tokens, "live": sum(map(is_live, groups))}
    missing = side.bench.config.questions / len(groups)  # of the reference, whose work is that of a question
    return {name: value if name == "optimizer" else value * missing for name, value in found.items()}


def measure(depth: int, bench: Bench) -> list[dict[str, Any]]:
    """A row of medians for each side."""
    sides = {name: make_side(name, bench, depth) for name in SIDES}
    check_agreement(sides, 1e-3 if bench.world.dtype == torch.float32 else 5e-2)
    turns = [
        {name: timed(side, step) for name, side in sides.items()}
        for step in range(1, bench.config.repeats + 1)
    ]
    rows = []
    for name in SIDES:
        own = [turn[name] for turn in turns]
        seconds = [sum(turn[phase] for phase in PHASES) for turn in own]
        theirs = [sum(turn["reference"][phase] for phase in PHASES) for turn in turns]
        row: dict[str, Any] = {"depth": depth, "side": name, "seconds": statistics.median(seconds)}
        row["ratio"] = statistics.median(b / a for a, b in zip(seconds, theirs, strict=True))
        row |= {key: statistics.median(turn[key] for turn in own) for key in (*PHASES, "tokens", "live")}
        rows.append(row)
    return rows


def memory_of_one_step(config: Config) -> dict[str, float]:
    """In a child: the peak of the process, and that of the step beyond what stood before it; MB."""
    bench = Bench.open(config)
    side = make_side(config.child, bench, int(config.depths))
    held = memory_mb(bench.world, peak=False)
    if bench.world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (forget := Path("/proc/self/clear_refs")).exists():
        forget.write_text("5")
    side.update(side.sample(0))
    peak = memory_mb(bench.world, peak=True)
    return {"peak_mb": peak, "step_mb": peak - held}


def child(name: str, config: Config, depth: int) -> dict[str, float]:
    """memory_of_one_step in a process of its own."""
    settings = dataclasses.replace(config, child=name, depths=str(depth))
    flags = [f"--{key}={value}" for key, value in dataclasses.asdict(settings).items()]
    words = [sys.executable, "-m", "benchmarks.rl_step", *flags]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(row: dict[str, Any]) -> None:
    shares = "".join(f"{row[phase] / row['seconds']:>{max(8, len(phase) + 2)}.0%}" for phase in PHASES)
    memory = f"{row['peak_mb']:>9,.0f}{row['step_mb']:>9,.0f}" if "peak_mb" in row else ""
    print(
        f"{row['depth']:>5} {row['side']:>10}{row['seconds']:>9.2f}{row['ratio']:>7.2f}{shares}{memory}",
        flush=True,
    )


def main(config: Config) -> None:
    """Measure every depth, print a table and one JSON line."""
    if config.child:
        print(json.dumps(memory_of_one_step(config)))
        return
    bench = Bench.open(config)
    say_what_is_skipped(bench.world)
    lengths = sorted(map(len, bench.prompts))
    print(
        f"{config.questions} questions x {config.samples} samples x {config.max_tokens} tokens, prompts of {lengths[0]} "
        f"to {lengths[-1]} tokens from {bench.task.task.source}, {config.dead:.0%} of the questions dead"
    )
    phases = "".join(f"{phase:>{max(8, len(phase) + 2)}}" for phase in PHASES)
    print(
        f"{'depth':>5} {'step':>10}{'seconds':>9}{'ratio':>7}{phases}"
        + config.memory * f"{'peak MB':>9}{'step MB':>9}"
    )
    results = []
    for depth in map(int, config.depths.split(",")):
        for row in measure(depth, bench):
            if config.memory:
                row |= child(row["side"], config, depth)
            show(row)
            results.append(row)
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "child"}
    print(json.dumps({"benchmark": "rl_step", **settings, **describe(bench.world), "results": results}))


if __name__ == "__main__":
    main(cli(Config))

"""
What watching costs: the share of an RL run's time that goes to letters, KL and attention, at the default cadence.

    python -m benchmarks.telemetry --source=sft --steps=100 --every=20     the CPU preset
    python -m benchmarks.telemetry --source=sft --steps=400 --every=200    the default

Runs RL on the built-in problems from a checkpoint that is there, with Weights & Biases recording offline, and reads the
run's own clock: telemetry against rollout, reward, update and telemetry together; evaluation is left out, which would only
make the share smaller. The first look pays for imports and is counted. Fails where the share is 5 % or more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from nanochat.common import UserError, base_dir
from nanochat.config import cli

PHASES = ("rollout", "reward", "train", "telemetry")
BOUND = 0.05


@dataclass(frozen=True)
class Config:
    """Measure what telemetry costs."""

    source: str = "sft"
    """stage of the checkpoint to start from"""
    model_tag: str = ""
    """its folder; by default the largest there is"""
    steps: int = 100
    """steps of RL"""
    every: int = 20
    """steps between looks at letters and at attention: 20 in the CPU preset, 200 otherwise"""
    examples_per_step: int = 16
    """questions of a step"""
    num_samples: int = 8
    """completions of a question"""
    max_new_tokens: int = 128
    """longest completion"""


def main(config: Config) -> None:
    """Run, read the clock, print a table and one JSON line."""
    run = "benchmark-telemetry"
    words = [
        sys.executable, "-m", "scripts.chat_rl", f"--run={run}", "--resume=0", "--save_tag=benchmark-telemetry",
        "--dataset=SYNTHETIC", f"--source={config.source}", f"--model_tag={config.model_tag}",
        f"--max_steps={config.steps}", f"--kl_every={config.every}", f"--attn_every={config.every}",
        f"--examples_per_step={config.examples_per_step}", f"--num_samples={config.num_samples}",
        f"--max_new_tokens={config.max_new_tokens}", "--eval_every=-1", "--save_every=-1", "--log_every=50",
    ]  # fmt: skip
    if subprocess.run(words, env=os.environ | {"WANDB_MODE": "offline"}).returncode:
        raise UserError("the run failed, see above; is there a checkpoint to start from?")
    lines = (base_dir() / "runs" / run / "rl" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "time/telemetry_seconds" in row]
    seconds = {phase: sum(row[f"time/{phase}_seconds"] for row in rows) for phase in PHASES}
    total = sum(seconds.values())
    for phase, spent in seconds.items():
        print(f"{phase:12}{spent:10.2f} s{spent / total:8.1%}")
    share = seconds["telemetry"] / total
    result = {
        "benchmark": "telemetry",
        "steps": len(rows),
        "every": config.every,
        "share": round(share, 4),
    }
    print(json.dumps(result | {f"{phase}_seconds": round(spent, 3) for phase, spent in seconds.items()}))
    if share >= BOUND:
        raise SystemExit(f"telemetry takes {share:.1%} of the time, {BOUND:.0%} is the bound")


if __name__ == "__main__":
    main(cli(Config))

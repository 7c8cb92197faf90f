"""
What watching costs: the share of an RL run's time that goes to letters, KL and attention, at the default cadence.

    python -m benchmarks.telemetry --source=sft --steps=200

Runs RL on the built-in problems from a checkpoint that is there, and reads the run's own clock: telemetry against rollout,
reward, update and telemetry together, evaluation left out. The first look pays for imports and is counted.
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


@dataclass(frozen=True)
class Config:
    """Measure what telemetry costs."""

    source: str = "sft"
    """stage of the checkpoint to start from"""
    model_tag: str = ""
    """its folder; by default the largest there is"""
    steps: int = 200
    """steps of RL; the default cadence of a large run looks every 200"""
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
    if subprocess.run(words, env=os.environ | {"WANDB_MODE": "disabled"}).returncode:
        raise UserError("the run failed, see above; is there a checkpoint to start from?")
    lines = (base_dir() / "runs" / run / "rl" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "time/telemetry_seconds" in row]
    seconds = {phase: sum(row[f"time/{phase}_seconds"] for row in rows) for phase in PHASES}
    total = sum(seconds.values())
    for phase, spent in seconds.items():
        print(f"{phase:12}{spent:10.2f} s{spent / total:8.1%}")
    result = {
        "benchmark": "telemetry",
        "steps": len(rows),
        "every": config.every,
        "share": seconds["telemetry"] / total,
    }
    print(json.dumps(result | {f"{phase}_seconds": round(spent, 3) for phase, spent in seconds.items()}))


if __name__ == "__main__":
    main(cli(Config))

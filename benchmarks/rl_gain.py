"""
Does RL help? The whole pipeline on the built-in problems for several seeds, with its controls, and the table of what came out.

    NANOCHAT_DATA_DIR=... python -m benchmarks.rl_gain --seeds=42,43,44

Each seed is `bash run_aquarat_small.sh` with RL_DATASET=SYNTHETIC and CONTROLS, from the tokenizer on, in a base directory of
its own; finished stages are skipped, so the command can be stopped and typed again. `--only_table=1` runs nothing and
reads what is there. About 16 minutes a seed on two quiet cores, and 8 more where the plateau is measured.

The bounds that it checks: SFT at least 30 %, RL at least 5 points more on every seed with p < 0.01 and at least 10 in the
mean, no gain from rewards drawn by lot, and at most 2 points lost by RL from an SFT on worked rationales.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rl_gain_figure import draw
from nanochat.common import UserError, base_dir
from nanochat.config import cli
from nanochat.report_text import percent, table
from nanochat.rl_gain import SFT, Gain, as_numbers, gain_table, load_gain, mean, paired, seeds_table
from nanochat.run_files import read_lines

ROOT = Path(__file__).resolve().parent.parent
RL = "RL against SFT"


@dataclass(frozen=True)
class Config:
    """Measure what RL adds on the built-in problems."""

    seeds: str = "42,43,44"
    """seeds, with commas between"""
    task: str = "SYNTHETIC"
    """what is asked"""
    plateau_seeds: int = 1
    """on how many of the seeds RL is also started from an SFT on worked rationales alone"""
    only_table: bool = False
    """run nothing, read what is there"""
    figure: str = ""
    """where to draw it, such as docs/rl_gain.svg"""


def folder_of(seed: str) -> Path:
    """The base directory of one seed."""
    return base_dir() / "rl_gain" / f"seed{seed}"


def seeds_of(text: str) -> list[str]:
    """ "42,43" as a list. Raises UserError for anything but numbers with commas between."""
    seeds = [seed.strip() for seed in text.split(",") if seed.strip()]
    if not seeds or not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds={text} are not numbers with commas between, such as 42,43,44")
    return seeds


def run_driver(seed: str, settings: Mapping[str, str]) -> None:
    """The driver with these knobs, from an empty directory or from where it stopped. Raises UserError where it fails."""
    if subprocess.run(["bash", "run_aquarat_small.sh"], cwd=ROOT, env=os.environ | dict(settings)).returncode:
        raise UserError(f"seed {seed} failed, see above; the same command goes on from there")


def run_seed(seed: str, *, plateau: bool) -> None:
    """The whole pipeline with RL on the built-in problems, and its controls."""
    settings = {
        "SEED": seed, "RUN": f"seed{seed}", "NANOCHAT_BASE_DIR": str(folder_of(seed)),
        "RL_DATASET": "SYNTHETIC", "CONTROLS": "2" if plateau else "1", "WANDB_MODE": os.environ.get("WANDB_MODE", "offline"),
    }  # fmt: skip
    run_driver(seed, settings)


def broken_bounds(gains: Sequence[Gain]) -> Iterator[str]:
    """What was promised and did not come out."""
    found = {key: [pair for pair in pairs if pair] for key, pairs in paired(gains).items()}
    if any(gain.asked[SFT].value < 0.30 for gain in gains):
        yield "SFT is below 30 %"
    if mean([pair.difference for pair in found[RL]]) < 0.10:
        yield "RL adds less than 10 points in the mean"
    if any(pair.difference < 0.05 or pair.p >= 0.01 for pair in found[RL]):
        yield "RL adds less than 5 points, or p >= 0.01, on one of the seeds"
    for key, pairs in found.items():
        if "by lot" in key and any(pair.difference > 0 and pair.p < 0.01 for pair in pairs):
            yield "rewards drawn by lot gain"
        if key.startswith("RL from there") and any(pair.difference < -0.02 for pair in pairs):
            yield "RL from worked rationales loses more than 2 points"


def kinds_table(seeds: Sequence[str], task: str) -> str:
    """SFT and RL by family and difficulty, the questions of all seeds together; '' for a task without families."""
    counts: dict[
        tuple[str, int], list[float]
    ] = {}  # (family, difficulty) -> questions, right after SFT, after RL
    for seed in seeds:
        for place, stage in enumerate((SFT, "chat_eval_rl"), start=1):
            path = folder_of(seed) / "runs" / f"seed{seed}" / stage / "tables" / "outcomes" / f"{task}.jsonl"
            for row in read_lines(path):
                if "family" in row:
                    found = counts.setdefault((row["family"], row["difficulty"]), [0, 0, 0])
                    found[0] += place == 1
                    found[place] += row["correct"]
    rows = [
        [family, str(level), str(n), percent(before / n), percent(after / n)]
        for (family, level), (n, before, after) in sorted(counts.items())
    ]
    return table(["family", "difficulty", "n", "SFT", "RL"], rows)


def main(config: Config) -> None:
    """Run what is not there yet, print the tables, one JSON line, and the bounds that do not hold."""
    seeds = seeds_of(config.seeds)
    for place, seed in enumerate(seeds if not config.only_table else ()):
        run_seed(seed, plateau=place < config.plateau_seeds)
    gains = [load_gain(folder_of(seed) / "runs" / f"seed{seed}", config.task) for seed in seeds]
    for gain in gains:
        if "chat_eval_rl" not in gain.asked:
            raise UserError(f"{gain.run} has no evaluation of RL on {config.task}; run without --only_table")
        print(f"## {gain.run}\n\n{gain_table(gain)}\n")
    print(f"## All seeds, {config.task}\n\n{seeds_table(gains)}\n")
    print(f"## By family and difficulty\n\n{kinds_table(seeds, config.task)}\n")
    if config.figure:
        draw(gains, [folder_of(seed) / "runs" / f"seed{seed}" for seed in seeds], Path(config.figure))
        print(f"drawn in {config.figure}\n")
    broken = list(broken_bounds(gains))
    print(
        json.dumps(
            {"benchmark": "rl_gain", "task": config.task, **as_numbers(gains), "broken_bounds": broken}
        )
    )
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main(cli(Config))

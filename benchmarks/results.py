"""
How far does a size get on AQuA's dev set? The whole pipeline for several seeds, RL on AQuA, and the rows of docs/results.md.

    NANOCHAT_DATA_DIR=... python -m benchmarks.results --size=0.4M --seeds=42,43,44

Each seed is `bash run_aquarat_small.sh` from the tokenizer on, in a base directory of its own. After base, SFT and RL the
model is asked all dev questions, greedily, as they stand and in all five cyclic orders of their options, so that no fondness
for a letter helps; after RL also sixteen times at temperature 1, for the majority's vote. Finished stages are skipped, so
the command can be stopped and typed again. `--only_table=1` runs nothing and reads what is there.

Any knob of scripts/presets.py can stand in the environment; it then holds in place of the size's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.rl_gain import ROOT, run_driver, seeds_of
from nanochat.common import UserError, base_dir
from nanochat.config import cli
from nanochat.report_text import percent, table
from nanochat.rl_gain import mean, points, standard_error
from nanochat.run_files import read_json

TASK = "AQUA"
CPU = {"PRESET": "cpu", "RL_STEPS": "280"}  # one pass over the AQuA rows at hand
# Programs in place of written rationales: whole words in the vocabulary, short rows, nothing beside them; large
# groups, since most calls find nothing. A wrong answer costs nothing, as with the other sizes; docs/results.md has what it does.
PROGRAMS = CPU | {
    "VOCAB_SIZE": "2048", "PROGRAM_EXAMPLES": "300000", "AQUA_TRAIN_EXAMPLES": "0", "SYNTHETIC_EXAMPLES": "0",
    "OTHER_EXAMPLES": "0", "SFT_BATCH_TOKENS": "4096", "SFT_ITERATIONS": "3000", "MAX_NEW_TOKENS": "96",
    "EXTRA_MID_TRAIN": "--aqua_train_examples=0", "EXTRA_CHAT_SFT": "--max_seq_len=256",
    "NUM_SAMPLES": "32", "EXTRA_CHAT_RL": "--format_reward=0",
}  # fmt: skip
SIZES: dict[str, dict[str, str]] = {
    "0.2M": CPU | {"DEPTH": "2", "N_EMBD": "64", "N_HEAD": "2"},
    "0.4M": CPU,
    "0.7M": PROGRAMS,
    "d8": {"DEPTH": "8"},
    "d12": {"DEPTH": "12"},
}
STAGES = {"base": "base", "SFT": "sft", "RL": "rl"}  # as a table names them: as checkpoints are named
TRAINED = ("tok_train", "base", "mid", "sft", "rl")
VOTE = "chat_eval_rl_vote"


@dataclass(frozen=True)
class Config:
    """Train and ask one size, for several seeds."""

    size: Literal["0.2M", "0.4M", "0.7M", "d8", "d12"] = "0.4M"
    """parameters for a CPU, depth for GPUs"""
    seeds: str = "42,43,44"
    """seeds, with commas between"""
    samples: int = 16
    """answers to each question for the majority's vote"""
    only_table: bool = False
    """run nothing, read what is there"""


def folder_of(size: str, seed: str) -> Path:
    """The base directory of one seed."""
    return base_dir() / "results" / size / f"seed{seed}"


def run_seed(size: str, seed: str, samples: int) -> None:
    """The driver, then what it does not ask: the base model, and the vote."""
    run, folder = f"seed{seed}", folder_of(size, seed)
    settings = os.environ | {
        **SIZES[size], **{name: os.environ[name] for name in SIZES[size] if name in os.environ},
        "SEED": seed, "RUN": run, "NANOCHAT_BASE_DIR": str(folder), "RL_DATASET": "AQUA", "EVAL_TASKS": TASK,
        "EXTRA_CHAT_EVAL": "--rotations=5",
    }  # fmt: skip
    run_driver(seed, settings)
    rl = read_json(folder / "runs" / run / "chat_eval_rl" / "config.json")["config"]
    same = [
        f"--{name}={rl[name]}"
        for name in ("run", "seed", "model_tag", "device_type", "max_new_tokens", "max_problems")
    ]
    for label, flags in (
        ("chat_eval_base", ["-i", "base", "-a", TASK, "--rotations=5"]),
        (VOTE, ["-i", "rl", "-a", TASK, "-n", str(samples), "-t", "1.0"]),
    ):  # fmt: skip
        done = "results" in read_json(folder / "runs" / run / label / "summary.json")
        command = [sys.executable, "-m", "scripts.chat_eval", f"--label={label}", *same, *flags]
        if not done and subprocess.run(command, cwd=ROOT, env=settings).returncode:
            raise UserError(f"{label} of seed {seed} failed, see above; the same command goes on from there")


@dataclass(frozen=True, slots=True)
class Seed:
    """What one seed came to: results by stage, and where they come from."""

    name: str
    results: Mapping[str, Mapping[str, Any]]
    """by "base", "SFT", "RL" and VOTE, the results of the evaluation's summary"""
    seconds: float
    """of training, all stages"""
    commit: str
    hardware: str

    def accuracy(self, stage: str) -> float:
        return float(self.results[stage][TASK]["accuracy"])


def load_seed(folder: Path, name: str) -> Seed:
    """The seed whose run directory is `folder`. Raises UserError for one that is not finished."""
    results = {}
    for shown, stage in (*STAGES.items(), (VOTE, "rl_vote")):
        summary = read_json(folder / f"chat_eval_{stage}" / "summary.json")
        if "results" not in summary:
            raise UserError(f"{name} has no evaluation chat_eval_{stage}; run without --only_table")
        results[shown] = summary["results"]
    seconds = sum(read_json(folder / stage / "summary.json").get("seconds", 0.0) for stage in TRAINED)
    about = read_json(folder / "chat_eval_rl" / "config.json")
    system = about["system"]
    gpus = system["gpus"]
    hardware = f"{len(gpus)} x {gpus[0]}" if gpus else f"{system['num_cores']} cores, {system['cpu']}"
    return Seed(name, results, seconds, str(about["commit"])[:7], hardware)


def together(seeds: Sequence[Seed], stage: str, key: str) -> str:
    """Counts of letters of all seeds, A to E and what could not be read."""
    counts = [seed.results[stage][TASK][key] for seed in seeds]
    return " ".join(str(sum(one.get(letter, 0) for one in counts)) for letter in (*"ABCDE", "none"))


def with_interval(result: Mapping[str, Any]) -> str:
    """Accuracy of one seed in percent, and its 95 % interval (Wilson)."""
    value, low, high = (100 * result[key] for key in ("accuracy", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def rows(size: str, seeds: Sequence[Seed]) -> list[list[str]]:
    """A row for each stage: mean, standard error, and what the mean hides."""
    found = []
    for stage in STAGES:
        results = [seed.results[stage][TASK] for seed in seeds]
        each = [float(r["accuracy"]) for r in results]
        turned = [seed.results[stage][f"{TASK} rotations"] for seed in seeds]
        p = [
            f"{100 * (r['accuracy'] - r['before']['accuracy']):+.1f} ({r['mcnemar_p']:.1g})"
            for r in results
            if "mcnemar_p" in r
        ]
        found.append(
            [
                size if stage == "base" else "", stage, f"{percent(mean(each))} ({points(standard_error(each))})",
                ", ".join(with_interval(r) for r in results), percent(mean([r["majority"] for r in results])),
                percent(mean([t["eval/rotation_acc"] for t in turned])),
                percent(mean([t["eval/rotation_consistency"] for t in turned])),
                together(seeds, stage, "predicted"), percent(mean([r["parse_rate"] for r in results])), ", ".join(p),
            ]
        )  # fmt: skip
    return found


HEADINGS = (
    "size", "after", "accuracy, mean (standard error)", "each seed (95 % interval)", "commonest letter", "in five orders of the options",
    "same answer in all orders", "said A B C D E none", "read", "points on SFT (p), each seed",
)  # fmt: skip


def main(config: Config) -> None:
    """Run what is not there yet, print the rows, the vote, and one JSON line."""
    names = seeds_of(config.seeds)
    for name in names if not config.only_table else ():
        run_seed(config.size, name, config.samples)
    seeds = [
        load_seed(folder_of(config.size, name) / "runs" / f"seed{name}", f"seed{name}") for name in names
    ]
    n = seeds[0].results["RL"][TASK]["n"]
    print(f"## {TASK}, {n} questions\n\n{table(list(HEADINGS), rows(config.size, seeds))}\n")
    votes = [seed.results[VOTE][TASK] for seed in seeds]
    print(f"maj@{votes[0]['num_samples']} of RL on {TASK}: {', '.join(percent(v['maj']) for v in votes)}")
    hours = [seed.seconds / 3600 for seed in seeds]
    print(f"hours of training: {', '.join(f'{h:.2f}' for h in hours)}; {seeds[0].hardware}; commit {', '.join(sorted({s.commit for s in seeds}))}")  # fmt: skip
    accuracy = {stage: [round(seed.accuracy(stage), 4) for seed in seeds] for stage in STAGES}
    maj = [round(vote["maj"], 4) for vote in votes]
    print(json.dumps({"benchmark": "results", "size": config.size, "accuracy": accuracy, "maj": maj}))


if __name__ == "__main__":
    main(cli(Config))

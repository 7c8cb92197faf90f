"""
Write AQuA-RAT as conversations: train.jsonl, validation.jsonl and test.jsonl, ready for mid-training, SFT and RL.

    python -m scripts.prepare_aqua --output_dir ~/aqua --max-train 20000

Not needed for a run, which reads any form of AQuA by itself; it is for looking at what the model is shown, and for machines
that share one prepared copy. Training rows that repeat a validation or test question, word for word or with other
numbers, are left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, base_dir, print0, write_atomic
from nanochat.config import cli
from tasks.aqua import load_problems, read_problems
from tasks.common import shuffled
from tasks.problem import Problem, deduplicate
from tasks.rows import DataUnavailable, find_file

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Config:
    """Write AQuA-RAT as conversations in three files."""

    output_dir: str = ""
    """where to write; by default aqua in the base dir"""
    source: str = ""
    """folder with AQuA files; by default the usual order of search, the network last"""
    max_train: int = -1
    """training rows at most, chosen by the seed; -1: all"""
    max_validation: int = -1
    """validation rows at most; -1: all"""
    max_test: int = -1
    """test rows at most; -1: all"""
    include_mathqa: bool = False
    """add train_mathqa of the source folder to train"""
    seed: int = 42
    """order of the training rows"""


def main(config: Config) -> None:
    """Read, clean, write, count."""
    problems: dict[str, list[Problem]] = {}
    for split in SPLITS:
        try:
            rows = load_problems(split, config.source or None)
        except DataUnavailable as error:
            print0(f"{split}: left out. {error}")
            continue
        problems[split] = rows.items
        print0(f"{split}: {len(rows.items):,} rows from {rows.source}, {len(rows.bad)} could not be used")
        if split == "train" and config.include_mathqa:
            problems[split] = rows.items + _mathqa(Path(rows.source).parent)
    if not problems:
        raise UserError("no split of AQuA can be had; name a folder with --source")
    if "train" in problems:
        held_out = [problem for split in SPLITS[1:] for problem in problems.get(split, [])]
        kept, dropped = deduplicate(problems["train"], held_out)
        problems["train"] = shuffled(kept, config.seed)
        for why, count in dropped.items():
            print0(f"train: {count:,} rows dropped, {why}")
    folder = Path(config.output_dir).expanduser() if config.output_dir else base_dir() / "aqua"
    for split, rows_of_split in problems.items():
        most = {"train": config.max_train, "validation": config.max_validation, "test": config.max_test}[
            split
        ]
        write_split(folder / f"{split}.jsonl", rows_of_split if most < 0 else rows_of_split[:most])


def _mathqa(folder: Path) -> list[Problem]:
    found = find_file(folder, ["train_mathqa"])
    if found is None:
        raise UserError(f"--include_mathqa: no train_mathqa file in {folder}; leave the flag out")
    return read_problems(found).items


def write_split(path: Path, problems: Sequence[Problem]) -> None:
    """One conversation per line, whole or not at all."""
    lines = [json.dumps(problem.conversation(), ensure_ascii=False) + "\n" for problem in problems]
    write_atomic(path, "".join(lines))
    ambiguous = sum(problem.ambiguous for problem in problems)
    print0(f"{path}: {len(problems):,} conversations, {ambiguous} of them with the gold text at two letters")


if __name__ == "__main__":
    main(cli(Config))

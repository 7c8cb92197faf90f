"""
A run as its directory tells it: which stages there are, how they ended, what they measured. Written by run_files, read here.

A stage that is missing, still running or failed is no error: it is what the reader wants to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError, base_dir
from nanochat.report_text import duration
from nanochat.run_files import read_json, read_lines, read_metrics, run_dir

TITLES = {  # stage -> title; the section's file is named after the title, as nanochat does it
    "tok_train": "Tokenizer training",
    "tok_eval": "Tokenizer evaluation",
    "base": "Base model training",
    "base_loss": "Base model loss",
    "base_eval": "Base model evaluation",
    "mid": "Midtraining",
    "chat_eval_mid": "Chat evaluation mid",
    "sft": "Chat SFT",
    "chat_eval_sft": "Chat evaluation sft",
    "rl": "Chat RL",
    "chat_eval_rl": "Chat evaluation rl",
}
CONTROLS = {  # only where they were asked for
    "control_forbid_bare": "Control, the bare style forbidden",
    "rl_random": "Control, rewards drawn by lot",
    "control_random_reward": "Control, evaluation of rewards drawn by lot",
    "sft_worked": "Control, SFT on worked rationales alone",
    "control_sft_worked": "Control, evaluation of worked SFT",
    "rl_worked": "Control, RL from worked SFT",
    "control_rl_worked": "Control, evaluation of RL from worked SFT",
}


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What one stage left in its run directory."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    notes: Sequence[Mapping[str, Any]]

    @property
    def title(self) -> str:
        return (TITLES | CONTROLS).get(self.name, self.name.replace("_", " ").capitalize())

    @property
    def results(self) -> Mapping[str, Any]:
        return self.summary.get("results") or {}

    @property
    def seconds(self) -> float:
        last = self.metrics[-1].get("time", 0.0) if self.metrics else 0.0
        return float(self.summary.get("seconds", last))

    @property
    def state(self) -> str:
        """'' for a stage that reached its end, otherwise what became of it."""
        if self.summary.get("failed"):
            return f"failed after {duration(self.seconds)}: {self.summary['failed']}"
        return "" if self.summary.get("finished") else f"not finished; last seen at {duration(self.seconds)}"

    def told(self, kind: str) -> list[str]:
        """The notes of this kind, each once."""
        return list(dict.fromkeys(str(note["text"]) for note in self.notes if note.get("kind") == kind))


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All stages of a run, in the pipeline's order."""

    name: str
    stages: Mapping[str, StageRecord]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())


def load_run(name: str) -> RunRecord:
    """Read a run. Raises UserError, naming the runs there are, when there is nothing under that name."""
    folder = run_dir(name)
    found = [path.parent for path in folder.glob("*/config.json") if not path.parent.name.startswith(".")]
    if not found:
        others = ", ".join(run_names()) or "none yet"
        raise UserError(f"there is no run {name!r} under {folder.parent}; runs there: {others}")
    order = [*TITLES, *CONTROLS]
    found.sort(key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))
    return RunRecord(name, {path.name: load_stage(path) for path in found})


def load_stage(directory: Path) -> StageRecord:
    """Read a stage's run directory; files that are not there yet are empty."""
    return StageRecord(
        directory.name,
        directory,
        read_json(directory / "config.json"),
        read_json(directory / "summary.json"),
        read_metrics(directory / "metrics.jsonl"),
        read_lines(directory / "notes.jsonl"),
    )


def run_names() -> list[str]:
    """The names of the runs with at least one stage, newest last."""
    newest: dict[str, float] = {}
    for path in (base_dir() / "runs").glob("*/*/config.json"):
        if not path.parent.name.startswith("."):
            name = path.parent.parent.name
            newest[name] = max(newest.get(name, 0.0), path.stat().st_mtime)
    return sorted(newest, key=lambda name: newest[name])

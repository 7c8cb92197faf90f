"""
Does RL help? The same questions before and after, item by item, with the controls beside them; for one run or several seeds.

Every evaluation leaves its outcomes in tables/outcomes/TASK.jsonl, one line for each question. So any two evaluations of a
run can be paired long after they were made, and none has to be asked twice: RL with the SFT that it came from, but also
with that SFT when it may not answer without working, which is the comparison that says whether RL taught or elicited.

Over seeds the difference has a mean and a standard error; the p of each seed stands beside it, for a mean hides a seed that
lost. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.accuracy import Comparison
from nanochat.report_text import percent, table
from nanochat.run_files import read_json, read_lines
from nanochat.statistics import wilson_interval


@dataclass(frozen=True, slots=True)
class Condition:
    """One model, asked in one way: the stage that asked it, and the conditions that it is compared with."""

    title: str
    stage: str
    trained_by: str = ""
    """the stage whose seconds made the difference"""
    against: tuple[str, ...] = ()


SFT, BARE = "chat_eval_sft", "control_forbid_bare"
CONDITIONS = (
    Condition("SFT", SFT),
    Condition("RL", "chat_eval_rl", "rl", (SFT, BARE)),
    Condition("control: rewards drawn by lot", "control_random_reward", "rl_random", (SFT,)),
    Condition("control: SFT, not allowed to answer without working", BARE, "", (SFT,)),
    Condition("SFT on worked rationales alone", "control_sft_worked", "sft_worked"),
    Condition("RL from there", "control_rl_worked", "rl_worked", ("control_sft_worked",)),
)
TITLES = {condition.stage: condition.title for condition in CONDITIONS}


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of every question under one condition."""

    correct: Mapping[int, bool]
    """by the question's number"""
    gold: Mapping[int, str | None]
    mode: str = ""
    """generative or letters; '' where the evaluation did not say"""

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def value(self) -> float:
        return sum(self.correct.values()) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(sum(self.correct.values()), self.n)

    @property
    def majority(self) -> float:
        """What always saying the commonest gold letter scores."""
        letters = list(self.gold.values())
        return max(letters.count(letter) for letter in set(letters)) / self.n

    def against(self, before: Asked) -> Comparison | None:
        """Paired with another condition; None when that was asked other questions, or in another mode."""
        if self.gold != before.gold or self.mode != before.mode:
            return None
        gained = sum(now and not before.correct[i] for i, now in self.correct.items())
        lost = sum(not now and before.correct[i] for i, now in self.correct.items())
        return Comparison(self.n, gained, lost)


@dataclass(frozen=True, slots=True)
class Gain:
    """One run on one task: what was asked under each condition, and how long the training before it took."""

    run: str
    task: str
    asked: Mapping[str, Asked]
    """by stage, in the order of CONDITIONS"""
    seconds: Mapping[str, float]
    """training time by stage"""

    def comparisons(self) -> Iterator[tuple[Condition, str, Comparison]]:
        """(condition, the stage it is compared with, flips)."""
        for condition in CONDITIONS:
            for other in condition.against:
                if condition.stage in self.asked and other in self.asked:
                    pair = self.asked[condition.stage].against(self.asked[other])
                    if pair is not None:
                        yield condition, other, pair


def load_gain(run: Path, task: str) -> Gain:
    """What the run directory `run` holds on `task`, one answer to each question."""
    asked, seconds = {}, {}
    for condition in CONDITIONS:
        rows = read_lines(run / condition.stage / "tables" / "outcomes" / f"{task}.jsonl")
        if rows and all(row["correct"] in (0, 1) for row in rows):
            correct = {row["index"]: bool(row["correct"]) for row in rows}
            results = read_json(run / condition.stage / "summary.json").get("results") or {}
            mode = (results.get(task) or {}).get("mode", "")
            asked[condition.stage] = Asked(correct, {row["index"]: row["gold"] for row in rows}, mode)
            summary = read_json(run / condition.trained_by / "summary.json") if condition.trained_by else {}
            seconds[condition.stage] = float(summary.get("seconds", 0.0))
    return Gain(run.name, task, asked, seconds)


def tasks_asked(run: Path) -> list[str]:
    """Tasks on which the run asked both SFT and RL."""
    before, after = (
        {path.stem for path in (run / stage / "tables" / "outcomes").glob("*.jsonl")}
        for stage in (SFT, "chat_eval_rl")
    )
    return sorted(task for task in before & after if not task.endswith(" letters"))


def gain_table(gain: Gain) -> str:
    """One run as Markdown: a row for each condition with its interval, then a sentence for each comparison."""
    rows = []
    for condition in CONDITIONS:
        if asked := gain.asked.get(condition.stage):
            low, high = asked.interval
            shown = f"{percent(asked.value)} ({100 * low:.1f} to {100 * high:.1f})"
            spent = gain.seconds[condition.stage]
            title = condition.title + (", letters alone" if asked.mode == "letters" else "")
            rows.append([title, shown, str(asked.n), f"{spent:.0f} s" if spent else ""])
    sentences = [
        f"- **{condition.title}** against {TITLES[other]}: {100 * pair.difference:+.1f} points; "
        f"{pair.gained} gained, {pair.lost} lost, McNemar p = {pair.p:.2g}."
        for condition, other, pair in gain.comparisons()
    ] or [
        "Nothing can be paired here: that takes two evaluations of the same questions in the same mode, with one answer to each."
    ]
    return table(["", "accuracy (95 %)", "questions", "training"], rows) + "\n\n" + "\n".join(sentences)


def seeds_table(gains: Sequence[Gain]) -> str:
    """Several runs side by side: accuracies, then differences with the p of each seed, and the mean of those that have it."""
    rows = []
    for condition in CONDITIONS:
        values = [
            gain.asked[condition.stage].value if condition.stage in gain.asked else None for gain in gains
        ]
        cells = ["" if value is None else percent(value) for value in values]
        there = [value for value in values if value is not None]
        if there:
            rows.append([condition.title, *cells, percent(mean(there)), points(standard_error(there))])
    for key, pairs in paired(gains).items():
        cells = [f"{100 * p.difference:+.1f} (p = {p.p:.1g})" if p else "" for p in pairs]
        there = [pair.difference for pair in pairs if pair]
        rows.append([key, *cells, f"{100 * mean(there):+.1f}", points(standard_error(there))])
    majority = [percent(gain.asked[SFT].majority) for gain in gains]
    rows.append(["always the commonest letter", *majority, "", ""])
    return table(["", *(gain.run for gain in gains), "mean", "standard error"], rows)


def paired(gains: Sequence[Gain]) -> dict[str, list[Comparison | None]]:
    """Every comparison by its name, "RL against SFT": one Comparison for each run, None for a run that lacks it."""
    found: dict[str, list[Comparison | None]] = {}
    for place, gain in enumerate(gains):
        for condition, other, pair in gain.comparisons():
            key = f"{condition.title} against {TITLES[other]}"
            found.setdefault(key, [None] * len(gains))[place] = pair
    return found


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the spread between seeds; None for a single one."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))


def points(share: float | None) -> str:
    """A share as percentage points."""
    return "" if share is None else f"{100 * share:.1f}"


def as_numbers(gains: Sequence[Gain]) -> dict[str, Any]:
    """The same as data, for the JSON line of a benchmark; None where a run was not asked."""
    return {
        "runs": [gain.run for gain in gains],
        "accuracy": {
            title: [round(gain.asked[stage].value, 4) if stage in gain.asked else None for gain in gains]
            for stage, title in TITLES.items()
        },
        "difference": {
            key: [{"points": round(100 * p.difference, 2), "p": p.p} if p else None for p in pairs]
            for key, pairs in paired(gains).items()
        },
        "majority": [round(gain.asked[SFT].majority, 4) for gain in gains],
    }

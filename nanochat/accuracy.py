"""An accuracy that is never a bare number, and what can be said of two of them.

An Accuracy keeps every item's outcome. From that one value follow the interval, the score of always saying the
commonest letter (on AQuA's dev set 27.2 %, on its test set 24.8 %: chance, 20 %, is the wrong null), the histogram of
predicted letters, the share of answers that could be read, pass@k beside what guessing reaches, and majority votes. Two
Accuracies of the same items are compared item by item: flips and McNemar's test see differences that intervals hide.

No torch here: a report or a laptop reads the same values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from nanochat.common import UserError
from nanochat.statistics import Vote, guess_at_k, majority_vote, mcnemar, pass_at_k, wilson_interval

Mode = Literal["generative", "letters"]
NO_ANSWER = "none"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one item, sample by sample."""

    index: int
    gold: str | None
    letters: tuple[str | None, ...]
    """the final answers; None where none could be read, and always for tasks without letters"""
    options: tuple[str | None, ...]
    """the text of the option that each letter names, where the conversation holds it"""
    correct: tuple[bool, ...]
    truncated: tuple[bool, ...]
    num_options: int
    about: tuple[tuple[str, Any], ...] = ()
    """what kind of item it is, such as (("family", "linear"), ("difficulty", 2))"""

    @property
    def share(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def vote(self) -> Vote:
        return majority_vote(self.letters)

    def row(self) -> dict[str, Any]:
        """The item as a row of a table, from which any two evaluations can be paired later."""
        predicted = self.letters[0] if len(self.letters) == 1 else list(self.letters)
        named = {"index": self.index, "gold": self.gold, "predicted": predicted, "correct": self.share}
        return named | dict(self.about)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The outcomes of one evaluation, and everything that follows from them."""

    task: str
    mode: Mode
    outcomes: tuple[Outcome, ...]
    chance: float
    """what guessing scores"""
    temperature: float = 0.0
    shown: tuple[dict[str, Any], ...] = ()
    """a few completions to read"""

    @property
    def n(self) -> int:
        return len(self.outcomes)

    @property
    def num_samples(self) -> int:
        return len(self.outcomes[0].correct)

    @property
    def correct(self) -> float:
        """Items right; with several samples the sum of each item's share."""
        return math.fsum(outcome.share for outcome in self.outcomes)

    @property
    def value(self) -> float:
        """Accuracy; with k samples mean@k."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.n)

    @property
    def has_letters(self) -> bool:
        return any(outcome.gold is not None for outcome in self.outcomes)

    @property
    def gold_counts(self) -> dict[str, int]:
        return _sorted_counts(o.gold for o in self.outcomes if o.gold is not None)

    @property
    def predicted_counts(self) -> dict[str, int]:
        """Letters of all samples, "none" for those that could not be read; empty for tasks without letters."""
        if not self.has_letters:
            return {}
        return _sorted_counts(letter or NO_ANSWER for o in self.outcomes for letter in o.letters)

    @property
    def majority(self) -> tuple[str, float] | None:
        """The commonest gold letter of these items, and what always saying it scores: the null to beat."""
        counts = self.gold_counts
        letter = max(counts, key=lambda one: counts[one], default=None)
        return None if letter is None else (letter, counts[letter] / self.n)

    @property
    def parse_rate(self) -> float | None:
        """Share of samples whose final answer could be read; None for tasks without letters."""
        counts = self.predicted_counts
        return 1 - counts.get(NO_ANSWER, 0) / sum(counts.values()) if counts else None

    @property
    def truncated_rate(self) -> float:
        flags = [flag for outcome in self.outcomes for flag in outcome.truncated]
        return sum(flags) / len(flags)

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k, the mean over items."""
        return math.fsum(pass_at_k(len(o.correct), sum(o.correct), k) for o in self.outcomes) / self.n

    def guess_at(self, k: int) -> float | None:
        """pass@k of guessing among the options; None for tasks without letters."""
        if not self.has_letters:
            return None
        return math.fsum(guess_at_k(max(1, o.num_options), k) for o in self.outcomes) / self.n

    @property
    def maj(self) -> float | None:
        """maj@k over all samples, a tie counting its share; None for tasks without letters."""
        if not self.has_letters:
            return None
        return math.fsum(o.vote.score(o.gold) for o in self.outcomes if o.gold is not None) / self.n

    @property
    def num_tied(self) -> int:
        return sum(outcome.vote.tied for outcome in self.outcomes)

    def results(self) -> dict[str, Any]:
        """Everything as numbers and dicts of numbers, for a run's summary.json."""
        low, high = self.interval
        values: dict[str, Any] = {
            "task": self.task, "mode": self.mode, "temperature": self.temperature, "n": self.n,
            "correct": self.correct, "accuracy": self.value, "low": low, "high": high, "chance": self.chance,
            "truncated_rate": self.truncated_rate, "num_samples": self.num_samples,
        }  # fmt: skip
        if self.majority is not None:
            values["majority_letter"], values["majority"] = self.majority
            values |= {
                "parse_rate": self.parse_rate,
                "predicted": self.predicted_counts,
                "gold": self.gold_counts,
            }
        if self.num_samples > 1:
            ks = range(1, self.num_samples + 1)
            values["pass_at"] = {str(k): self.pass_at(k) for k in ks}
            if self.has_letters:
                values["guess_at"] = {str(k): self.guess_at(k) for k in ks}
                values["maj"], values["num_tied"] = self.maj, self.num_tied
        return values

    def metrics(self) -> dict[str, float]:
        """Curves of k samples under the names of the dashboards: mean@k, pass@k, what guessing passes, maj@k."""
        curves = {"eval/mean_at_k": self.value} | {
            f"eval/pass_at_{k}": self.pass_at(k) for k in range(1, self.num_samples + 1)
        }
        if self.maj is not None:
            curves["eval/maj_at_k"] = self.maj
        metrics: dict[str, float] = {}
        for name, value in curves.items():
            metrics |= with_interval(name, value, self.n)
        for k in range(1, self.num_samples + 1):
            guess = self.guess_at(k)
            if guess is not None:
                metrics[f"eval/guess_at_{k}"] = guess
        return metrics

    def describe(self) -> str:
        """All of it in one block for a person."""
        lines = [f"{self.task}, {self.mode}, {_decoding(self)}"]
        lines.append(
            f"  accuracy   {_with_interval(self.value, self.n)}   {_count(self.correct)} of {self.n}"
        )
        null = [f"guessing {_percent(self.chance)}"]
        if self.majority is not None:
            null.insert(0, f'always "{self.majority[0]}" {_percent(self.majority[1])}')
        lines.append(f"  null       {', '.join(null)}")
        if self.parse_rate is not None:
            lines.append(f"  predicted  {_histogram(self.predicted_counts)}")
            lines.append(f"  gold       {_histogram(self.gold_counts)}")
            read = f"  answers    {_percent(self.parse_rate)} could be read"
            lines.append(
                read + (f", {_percent(self.truncated_rate)} cut off" if self.mode == "generative" else "")
            )
        if self.num_samples > 1:
            lines += self._describe_samples()
        return "\n".join(lines)

    def _describe_samples(self) -> list[str]:
        k, lines = self.num_samples, list[str]()
        while k > 1:
            guess = self.guess_at(k)
            beside = "" if guess is None else f"   guessing {_percent(guess)}"
            lines.insert(0, f"  {f'pass@{k}':10} {_with_interval(self.pass_at(k), self.n)}{beside}")
            k //= 2
        if self.maj is not None:
            tied = f"   {self.num_tied} tied, each counted by its share"
            lines.append(f"  {f'maj@{self.num_samples}':10} {_with_interval(self.maj, self.n)}{tied}")
        return lines


@dataclass(frozen=True, slots=True)
class Rotations:
    """The same items with their options in several cyclic orders; the first is the given one."""

    task: str
    turns: tuple[Accuracy, ...]

    @property
    def n(self) -> int:
        return self.turns[0].n

    @property
    def value(self) -> float:
        """Accuracy over all orders: what is left when position plays no part."""
        return math.fsum(turn.value for turn in self.turns) / len(self.turns)

    @property
    def consistency(self) -> float:
        """Share of items for which every order gives an answer, and always the same option."""
        return sum(len(set(row)) == 1 and None not in row for row in self._choices()) / self.n

    @property
    def all_right(self) -> float:
        """Share of items right in every order."""
        return (
            sum(all(o.correct[0] for o in row) for row in zip(*(t.outcomes for t in self.turns), strict=True))
            / self.n
        )

    def _choices(self) -> Iterable[tuple[str | None, ...]]:
        rows = zip(*(turn.outcomes for turn in self.turns), strict=True)
        return (tuple(outcome.options[0] for outcome in row) for row in rows)

    def metrics(self) -> dict[str, float]:
        curves = {"consistency": self.consistency, "acc": self.value, "all_right": self.all_right}
        metrics: dict[str, float] = {}
        for name, value in curves.items():
            metrics |= with_interval(f"eval/rotation_{name}", value, self.n)
        return metrics

    def describe(self) -> str:
        """A block for a person."""
        each = ", ".join(_percent(turn.value) for turn in self.turns)
        return "\n".join(
            [
                f"{self.task}, {len(self.turns)} cyclic orders of the options",
                f"  same option in all   {_with_interval(self.consistency, self.n)}",
                f"  right in all         {_with_interval(self.all_right, self.n)}",
                f"  accuracy             {_percent(self.value)} over all orders; one by one {each}",
            ]
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """The second of two models against the first, on the same items."""

    n: int
    gained: int
    """wrong before, right now"""
    lost: int

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def p(self) -> float:
        """McNemar, exact, two-sided."""
        return mcnemar(self.gained, self.lost)

    @property
    def mid_p(self) -> float:
        return mcnemar(self.gained, self.lost, mid_p=True)

    def describe(self) -> str:
        return (
            f"  difference {100 * self.difference:+.1f} points: {self.gained} gained, {self.lost} lost of {self.n}; "
            f"McNemar p = {self.p:.2g} (mid-p {self.mid_p:.2g})"
        )


def compare(before: Accuracy, after: Accuracy) -> Comparison:
    """Pair two evaluations of the same items; with one answer each, such as greedy ones."""
    if (before.task, before.mode) != (after.task, after.mode):
        raise UserError(
            f"cannot pair {before.task} ({before.mode}) with {after.task} ({after.mode}); use one task and mode"
        )
    if [o.index for o in before.outcomes] != [o.index for o in after.outcomes]:
        raise UserError(
            f"{before.task}: the two evaluations hold different items; use the same limit and split"
        )
    if before.num_samples != 1 or after.num_samples != 1:
        raise UserError("a paired comparison needs one answer per item; use --num_samples=1")
    flips = Counter(
        (a.correct[0], b.correct[0]) for a, b in zip(before.outcomes, after.outcomes, strict=True)
    )
    return Comparison(before.n, flips[False, True], flips[True, False])


def with_interval(name: str, value: float, n: int) -> dict[str, float]:
    """A curve and its 95 % band: `name`, `name_low`, `name_high`."""
    low, high = wilson_interval(min(value * n, n), n)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _sorted_counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _decoding(accuracy: Accuracy) -> str:
    if accuracy.mode == "letters":
        return "no reasoning"
    if accuracy.temperature == 0:
        return "greedy"
    return f"{accuracy.num_samples} sample{'s' * (accuracy.num_samples > 1)} at temperature {accuracy.temperature:g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _count(correct: float) -> str:
    return f"{correct:.0f}" if correct == round(correct) else f"{correct:.1f}"


def _with_interval(share: float, n: int) -> str:
    low, high = wilson_interval(min(share * n, n), n)
    return f"{_percent(share):>7} (95 %: {100 * low:.1f} to {100 * high:.1f})"


def _histogram(counts: dict[str, int]) -> str:
    return "  ".join(f"{letter} {count}" for letter, count in counts.items())

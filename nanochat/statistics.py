"""How sure a score is: intervals, paired tests, pass@k and majority votes, in plain arithmetic.

A small model on 254 questions with five options each moves within 5 points of its letter prior by luck alone, so no
accuracy leaves this project without an interval, and no two accuracies are compared without the items on which they
differ. Everything here is exact (no normal approximation but Wilson's own) and needs nothing but `math`.

Sources: Wilson, JASA 1927; McNemar, Psychometrika 1947, with the mid-p of Fagerland et al., BMC Med. Res. Methodol.
2013; pass@k of Chen et al., arXiv 2107.03374.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson_interval(correct: float, num_items: int, *, z: float = Z_95) -> tuple[float, float]:
    """The 95 % score interval of a proportion; (0, 1) where nothing was observed.

    `correct` may be fractional: the mean over several samples of an item counts as that share of one item, because
    samples of one question are not independent questions.
    """
    assert 0 <= correct <= num_items, f"{correct} correct of {num_items}"
    if num_items == 0:
        return 0.0, 1.0
    share = correct / num_items
    scale = 1 + z * z / num_items
    centre = (share + z * z / (2 * num_items)) / scale
    half = z * math.sqrt(share * (1 - share) / num_items + z * z / (4 * num_items**2)) / scale
    # At the ends the bound is exactly 0 or 1, where floating point would leave 1e-17.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == num_items else min(1.0, centre + half)
    return low, high


def mcnemar(gained: int, lost: int, *, mid_p: bool = False) -> float:
    """Two-sided p that two models differ, from the items that only one of them gets right.

    Exact: under the null each of the `gained + lost` flips is a fair coin. The mid-p variant takes half of the
    observed outcome's own probability away, which is less conservative when flips are few.
    """
    flips = gained + lost
    if flips == 0:
        return 1.0
    fewer = min(gained, lost)
    # Python integers: exact for any number of flips, where 0.5**flips would underflow beyond 1,074.
    tail = ways = 1  # of the flips, none for the side that has fewer
    for count in range(fewer):
        ways = ways * (flips - count) // (count + 1)
        tail += ways
    return min(1.0, (2 * tail - (ways if mid_p else 0)) / 2**flips)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that k of the samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k)."""
    assert 1 <= k <= num_samples, f"pass@{k} from {num_samples} samples"
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def guess_at_k(num_options: int, k: int) -> float:
    """pass@k of blind guessing among equal options: with five options pass@8 is already 83 %."""
    return 1.0 - (1.0 - 1.0 / num_options) ** k


@dataclass(frozen=True, slots=True)
class Vote:
    """What a majority of samples answered."""

    leaders: tuple[str, ...]
    """The answers with most votes, sorted; more than one is a tie, none means that no sample gave an answer."""

    @property
    def tied(self) -> bool:
        return len(self.leaders) > 1

    def score(self, gold: str) -> float:
        """1 for the gold answer alone; in a tie the chance that a fair draw among the leaders takes it."""
        return 1.0 / len(self.leaders) if gold in self.leaders else 0.0


def majority_vote(answers: Sequence[str | None]) -> Vote:
    """Count the answers; a sample without one does not vote."""
    counts = Counter(answer for answer in answers if answer is not None)
    most = max(counts.values(), default=0)
    return Vote(tuple(sorted(answer for answer, count in counts.items() if count == most)))


def entropy(counts: Sequence[float]) -> float:
    """Entropy in nats of a histogram: log 5 for five letters used evenly, 0 when one letter answers everything."""
    total = sum(counts)
    return math.fsum(c / total * math.log(total / c) for c in counts if c > 0) if total > 0 else 0.0

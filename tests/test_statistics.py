"""Intervals, paired tests and estimators against scipy and against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from scipy import stats

from nanochat.statistics import entropy, guess_at_k, majority_vote, mcnemar, pass_at_k, wilson_interval


@pytest.mark.parametrize("num_items", [1, 2, 7, 254, 1024])
def test_wilson_interval_agrees_with_scipy(num_items: int) -> None:
    for correct in {0, 1, num_items // 4, num_items // 2, num_items - 1, num_items}:
        expected = stats.binomtest(correct, num_items).proportion_ci(0.95, method="wilson")
        assert wilson_interval(correct, num_items) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_of_nothing_is_everything() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_stays_inside_the_unit_interval_and_holds_the_share() -> None:
    for correct in range(51):
        low, high = wilson_interval(correct, 50)
        assert 0.0 <= low <= correct / 50 <= high <= 1.0


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (0, 9), (5, 5), (30, 10), (12, 13), (120, 60)])
def test_mcnemar_agrees_with_the_exact_binomial_test(gained: int, lost: int) -> None:
    expected = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(1, 0), (0, 9), (30, 10), (12, 13)])
def test_mid_p_takes_away_half_of_both_tails_own_outcome(gained: int, lost: int) -> None:
    exact = stats.binomtest(gained, gained + lost, 0.5).pvalue
    own = stats.binom.pmf(min(gained, lost), gained + lost, 0.5)
    one_sided = stats.binom.cdf(min(gained, lost), gained + lost, 0.5) - own / 2
    assert mcnemar(gained, lost, mid_p=True) == pytest.approx(min(1.0, 2 * one_sided), rel=1e-12)
    assert mcnemar(gained, lost, mid_p=True) <= exact


def test_mcnemar_does_not_underflow_with_thousands_of_flips() -> None:
    assert mcnemar(3000, 3000) == 1.0
    assert 0.0 < mcnemar(2600, 2400) < 0.01


def test_pass_at_k_equals_the_enumeration_of_all_subsets() -> None:
    for num_samples in range(1, 8):
        for num_correct in range(num_samples + 1):
            outcomes = [True] * num_correct + [False] * (num_samples - num_correct)
            for k in range(1, num_samples + 1):
                draws = [any(draw) for draw in itertools.combinations(outcomes, k)]
                assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(draws) / len(draws))


def test_guessing_five_options_eight_times_is_right_in_83_percent() -> None:
    assert guess_at_k(5, 1) == pytest.approx(0.2)
    assert guess_at_k(5, 8) == pytest.approx(0.832, abs=5e-4)


def test_a_majority_vote_ignores_samples_without_an_answer_and_shares_ties() -> None:
    assert majority_vote(["A", "B", "B", None, None, None]).leaders == ("B",)
    tie = majority_vote(["C", "A", None])
    assert tie.tied and tie.score("A") == tie.score("C") == 0.5 and tie.score("B") == 0.0
    nobody = majority_vote([None, None])
    assert nobody.leaders == () and nobody.score("A") == 0.0 and not nobody.tied


def test_entropy_of_letters_is_log_five_when_even_and_zero_when_collapsed() -> None:
    assert entropy([4, 4, 4, 4, 4]) == pytest.approx(math.log(5))
    assert entropy([0, 9, 0, 0, 0]) == 0.0
    assert entropy([]) == 0.0

"""Sampling: streams that are uniform and a value of (key, position), draws that follow the weights exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from nanochat.common import UserError
from nanochat.sampling import MASK, Sampling, capped_exp_, choose, draw, mix, row_keys, signed, uniform

LAST = 1.0 - 2.0**-48  # the greatest number that `uniform` gives


def keys(count: int, seed: int = 0) -> Tensor:
    return row_keys(torch.full((count,), seed), torch.arange(count))


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def capped(raw: Tensor, softcap: float = 15.0) -> Tensor:
    return softcap * torch.tanh(raw / softcap)


def plain_mix(x: int) -> int:
    """splitmix64's output function on Python integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


@given(st.integers(0, MASK))
def test_the_tensor_hash_is_splitmix64(x: int) -> None:
    assert mix(torch.tensor([signed(x)])).item() == signed(plain_mix(x))


def test_the_hash_gives_splitmix64s_published_first_number() -> None:
    # the first output for seed 1234567, https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    assert mix(torch.tensor([signed(1234567 + 0x9E3779B97F4A7C15)])).item() == 6457827717110365317


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**20))
def test_uniform_numbers_lie_in_the_half_open_unit_interval(seed: int, position: int) -> None:
    u = uniform(row_keys(torch.tensor([seed]), torch.tensor([3])), torch.tensor([position]))
    assert 0.0 <= u.item() <= LAST


@pytest.mark.parametrize("along", ["samples", "positions", "seeds"])
def test_numbers_are_uniform_and_uncorrelated_along_every_axis(along: str) -> None:
    count, index = 100_000, torch.arange(100_000)
    if along == "samples":
        u = uniform(keys(count), zeros(count))
    elif along == "positions":
        u = uniform(keys(1).expand(count), index)
    else:
        u = uniform(row_keys(index, zeros(count)), zeros(count))
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    for lag in (1, 2, 16):
        assert abs(stats.pearsonr(u[lag:].numpy(), u[:-lag].numpy()).statistic) < 0.015
    cells = torch.stack([u[:-1] * 16, u[1:] * 16]).long()
    table = torch.zeros(16, 16).index_put_((cells[0], cells[1]), torch.ones(count - 1), accumulate=True)
    assert stats.chisquare(table.flatten().numpy()).pvalue > 1e-3


def test_rows_with_different_seed_or_sample_have_different_streams() -> None:
    seeds, samples = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    assert row_keys(seeds.flatten(), samples.flatten()).unique().numel() == 200 * 200


@pytest.mark.parametrize("vocab", [2, 100, 128, 129, 1000, 8192])
def test_draw_is_the_inverse_of_the_cumulative_distribution(vocab: int) -> None:
    torch.manual_seed(0)
    weights = torch.rand(400, vocab) ** 4
    u = torch.rand(400, dtype=torch.float64)
    tokens, total = draw(weights, u)
    edges = weights.double().cumsum(-1)
    torch.testing.assert_close(total, edges[:, -1], rtol=1e-6, atol=0)
    expected = torch.searchsorted(edges, (u * edges[:, -1]).unsqueeze(1), right=True).squeeze(1)
    # Blocks are summed in fp32: a u within 1e-6 of an edge may fall on its other side, no other may.
    for row in (tokens != expected).nonzero().flatten().tolist():
        gap = (edges[row] / edges[row, -1] - u[row]).abs().min().item()
        assert gap < 1e-6 and abs(tokens[row] - expected[row]) == 1


@given(st.integers(1, 400), st.lists(st.integers(0, 399), min_size=1, max_size=5), st.floats(0.0, LAST))
def test_a_token_without_weight_is_never_drawn(vocab: int, live: list[int], u: float) -> None:
    weights = torch.zeros(1, vocab)
    weights[0, [token % vocab for token in live]] = torch.rand(len(live)) + 1e-30
    for number in (u, 0.0, LAST):
        token, _ = draw(weights, torch.tensor([number], dtype=torch.float64))
        assert weights[0, token.item()] > 0


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.7),
        Sampling(1.5, top_k=7),
        Sampling(0.8, top_p=0.9),
        Sampling(1.0, 20, 0.8, (0, 5)),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    torch.manual_seed(1)
    count, raw = 40_000, torch.randn(1, 50) * 2
    probabilities = expected_probabilities(raw[0], sampling)
    tokens, logprobs = choose(raw.repeat(count, 1), keys(count), zeros(count), sampling, softcap=15.0)
    torch.testing.assert_close(logprobs, probabilities[tokens].log(), rtol=0, atol=1e-5)
    observed, expected = torch.bincount(tokens, minlength=50), probabilities.double() * count
    assert (observed[expected == 0] == 0).all()
    live = expected > 5
    rest = torch.tensor([count - observed[live].sum(), count - expected[live].sum()])
    if rest[1] > 1:
        statistic = (observed[live] - expected[live]).square().div(expected[live]).sum()
        assert stats.chi2.sf(statistic.item(), int(live.sum())) > 1e-3
    else:
        kept = expected[live] * observed[live].sum() / expected[live].sum()
        assert stats.chisquare(observed[live].numpy(), kept.numpy()).pvalue > 1e-3


def expected_probabilities(raw: Tensor, sampling: Sampling) -> Tensor:
    """By sorting and summing in float64, one token at a time."""
    logits = capped(raw.double()) / sampling.temperature
    logits[list(sampling.banned)] = float("-inf")
    order = logits.argsort(descending=True).tolist()
    kept = order[: sampling.top_k or None]
    within = logits[kept].softmax(-1).tolist()
    before = [sum(within[:number]) for number in range(len(kept))]
    kept = [token for token, mass in zip(kept, before, strict=True) if mass < sampling.top_p]
    probabilities = torch.zeros_like(logits)
    probabilities[kept] = logits[kept].softmax(-1)
    return probabilities.float()


@pytest.mark.parametrize("temperature", [0.1, 0.35, 0.7, 1.0, 3.0])
def test_logprobs_are_those_of_log_softmax(temperature: float) -> None:
    torch.manual_seed(2)
    raw = torch.randn(64, 1000) * 8
    tokens, logprobs = choose(raw.clone(), keys(64), zeros(64), Sampling(temperature), softcap=15.0)
    exact = (capped(raw.double()) / temperature).log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs, exact.float(), rtol=0, atol=1e-5)


def test_a_very_low_temperature_neither_overflows_nor_vanishes() -> None:
    torch.manual_seed(3)
    raw = torch.randn(16, 300) * 50
    weights = capped_exp_(raw.clone(), softcap=15.0, temperature=1e-3)
    assert weights.isfinite().all() and (weights.amax(-1) > 1e-9).all()
    tokens, logprobs = choose(raw.clone(), keys(16), zeros(16), Sampling(1e-3), softcap=15.0)
    assert logprobs.isfinite().all()
    best = capped(raw).amax(-1)
    torch.testing.assert_close(capped(raw).gather(1, tokens.unsqueeze(1)).squeeze(1), best, rtol=0, atol=2e-2)


def test_greedy_takes_the_best_and_reports_temperature_one() -> None:
    torch.manual_seed(4)
    raw = torch.randn(16, 300)
    tokens, logprobs = choose(raw.clone(), keys(16), zeros(16), Sampling(0.0), softcap=15.0)
    assert tokens.equal(raw.argmax(-1))
    exact = capped(raw).log_softmax(-1).amax(-1)
    torch.testing.assert_close(logprobs, exact, rtol=0, atol=1e-5)


def test_greedy_takes_the_best_of_what_is_not_banned() -> None:
    raw = torch.tensor([[3.0, 2.0, 1.0]])
    tokens, logprobs = choose(raw, keys(1), zeros(1), Sampling(0.0, banned=(0,)), softcap=15.0)
    assert tokens.item() == 1
    exact = capped(torch.tensor([2.0, 1.0])).log_softmax(-1)[0]
    torch.testing.assert_close(logprobs[0], exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_p", [1e-6, 5e-324])
def test_top_p_always_keeps_the_likeliest_token(top_p: float) -> None:
    raw = torch.tensor([[0.0, 9.0, 0.0]]).repeat(100, 1)
    tokens, logprobs = choose(raw, keys(100), zeros(100), Sampling(top_p=top_p), softcap=15.0)
    assert (tokens == 1).all() and (logprobs == 0).all()


def test_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    raw = torch.randn(8, 30)
    tokens, _ = choose(raw.clone(), keys(8), zeros(8), Sampling(top_k=1000), softcap=15.0)
    assert tokens.shape == (8,)


def test_a_row_draws_the_same_alone_as_in_company() -> None:
    torch.manual_seed(5)
    raw, positions = torch.randn(32, 500), torch.arange(32)
    for sampling in (Sampling(0.9), Sampling(0.9, top_k=10), Sampling(0.0)):
        together, _ = choose(raw.clone(), keys(32), positions, sampling, softcap=15.0)
        alone = [
            choose(raw[i : i + 1].clone(), keys(32)[i : i + 1], positions[i : i + 1], sampling, softcap=15.0)[
                0
            ]
            for i in range(32)
        ]
        assert together.equal(torch.cat(alone))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": 1e-39},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
    ]
    + [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]

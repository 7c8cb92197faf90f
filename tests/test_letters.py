"""Answer positions token by token, exact letter KL, sequence KL, margins, and the telemetry's exact names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.letters import (
    answer_position,
    answer_sequences,
    letter_kl,
    letter_logits,
    letter_telemetry,
    margin,
    sequence_kl,
)
from nanochat.rl import rollout
from nanochat.tracking import Histogram
from tests.rl_fakes import ByteTokenizer, Choices, small_model, written


@pytest.mark.parametrize(
    ("text", "before", "appended"),
    [
        ("7-3=4\nAnswer: C", "7-3=4\nAnswer:", False),
        ("Final Answer: C", "Final Answer:", False),
        ("**Answer**: C", "**Answer**:", False),
        ("Answer: A\nno, wait\nAnswer: B", "Answer: A\nno, wait\nAnswer:", False),
        ("answer : (B)", "answer :", False),
        ("Answer:", "Answer:", False),
        ("it is 4", "it is 4\nAnswer:", True),
        ("it is 4\n", "it is 4\nAnswer:", True),
        ("", "Answer:", True),
        ("my unanswer: B", "my unanswer: B\nAnswer:", True),
        ("half \u00bd\nAnswer: D", "half \u00bd\nAnswer:", False),
    ],
)
def test_the_answer_position_is_directly_after_the_last_colon(text: str, before: str, appended: bool) -> None:
    tokenizer = ByteTokenizer()
    ids, was_appended = answer_position(tokenizer, tokenizer.encode(text))
    assert tokenizer.decode(ids) == before and was_appended == appended


def test_a_token_that_crosses_the_colon_is_cut_there() -> None:
    tokenizer = ByteTokenizer(words=["swer:\n"])
    ids, appended = answer_position(tokenizer, tokenizer.encode("Answer:\nB"))
    assert tokenizer.decode(ids) == "Answer:" and not appended
    assert ids == [*tokenizer.encode("An"), *tokenizer.encode("swer:")]


def test_bytes_that_are_no_text_do_not_disturb_the_position() -> None:
    tokenizer = ByteTokenizer()
    ids = [0xFF, 0xC3, *tokenizer.encode("Answer: B")]
    assert answer_position(tokenizer, ids) == (ids[:-1], False)


def test_the_stop_token_is_no_part_of_the_position_and_a_cut_completion_has_none() -> None:
    tokenizer, task = ByteTokenizer(), Choices(2)
    episodes = [written(tokenizer, task, 0, "so"), written(tokenizer, task, 1, "so", truncated=True)]
    sequences, appended = answer_sequences(tokenizer, episodes)
    assert appended == [True, True]
    assert [tokenizer.decode(s).endswith("so\nAnswer:") for s in sequences] == [True, True]


def test_letter_logits_of_a_ragged_batch_are_those_of_each_sequence_alone() -> None:
    model = small_model(noise=0.2)
    sequences = [[1, 2, 3], [4], list(range(20)), [7, 8]]
    ids = [[3, 5, 9], [1, 2], [3, 5, 9], [9, 5, 3]]
    together = letter_logits(model, sequences, ids, token_budget=25)
    assert together.shape == (4, 3) and together[1, 2] == float("-inf")
    for row, (sequence, letters) in enumerate(zip(sequences, ids, strict=True)):
        alone = model(torch.tensor([sequence]))[0, -1, letters]
        assert torch.allclose(together[row, : len(letters)], alone, atol=1e-5)


def test_letter_kl_is_torchs_kl_divergence_and_zero_for_the_same_policy() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(100, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(letter_kl(p, q), expected, atol=1e-14)
    assert torch.equal(letter_kl(p, p), torch.zeros(100, dtype=torch.float64))
    assert torch.allclose(letter_kl(p + 7, q - 2), expected, atol=1e-12), "only differences of logits count"


def test_letters_that_a_question_lacks_take_no_part_in_its_kl() -> None:
    p, q = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[0.5, 0.0, -math.inf]])
    assert torch.allclose(letter_kl(p, q), letter_kl(p[:, :2], q[:, :2]))


def test_the_margin_is_the_gap_between_the_two_best() -> None:
    assert margin(torch.tensor([[1.0, 4.0, 2.5], [0.0, 0.0, -9.0]])).tolist() == [1.5, 0.0]


def test_sequence_kl_is_the_mean_over_a_completions_own_tokens() -> None:
    tokenizer, task = ByteTokenizer(), Choices(3)
    policy, reference = (small_model(vocab_size=tokenizer.vocab_size, seed=s) for s in (0, 1))
    episodes = [
        written(tokenizer, task, i, text) for i, text in enumerate(["Answer: A", "so\nAnswer: B", ""])
    ]
    found = sequence_kl(policy, reference, episodes, temperature=0.8, token_budget=100)
    for index, e in enumerate(episodes):
        ids = torch.tensor([[*e.prompt_ids, *e.completion.ids]])
        logp, logq = (
            torch.log_softmax(m(ids)[0, :-1] / 0.8, -1).gather(1, ids[0, 1:, None])[
                len(e.prompt_ids) - 1 :, 0
            ]
            for m in (policy, reference)
        )
        ratio = logp - logq
        assert found["k1"][index] == pytest.approx(ratio.mean().item(), abs=1e-5)
        assert found["k3"][index] == pytest.approx((torch.exp(-ratio) - 1 + ratio).mean().item(), abs=1e-5)


def test_sequence_kl_on_sampled_completions_estimates_the_exact_kl_of_the_next_token() -> None:
    """One-token completions: the estimate's mean must meet the KL over the whole vocabulary."""
    tokenizer, task = ByteTokenizer(alphabet="vwxyz?- =\nABCDEwhics"), Choices(1)
    policy, reference = (small_model(vocab_size=tokenizer.vocab_size, seed=s) for s in (0, 1))
    (group,) = rollout(
        Engine(policy, tokenizer), tokenizer, task, [(0, task[0])], num_samples=4000, seeds=[3], max_tokens=1
    )
    found = sequence_kl(policy, reference, group, temperature=1.0, token_budget=100_000)
    prompt = torch.tensor([group[0].prompt_ids])
    logp, logq = (torch.log_softmax(m(prompt)[0, -1], -1) for m in (policy, reference))
    exact = (logp.exp() * (logp - logq)).sum().item()
    for name in ("k1", "k3"):
        values = torch.tensor(found[name])
        assert values.mean().item() == pytest.approx(exact, abs=4 * values.std().item() / math.sqrt(4000)), (
            name
        )


NAMES = {
    *(f"rl/kl_letter_{part}" for part in ("mean", "std", "hist")),
    *(f"rl/kl_sequence{kind}_{part}" for kind in ("", "_k1", "_k3") for part in ("mean", "std", "hist")),
    *(f"rl/letter_margin_{part}" for part in ("mean", "std", "hist")),
    "rl/letter_prob_gold_mean",
    "rl/letter_pred_entropy",
    "rl/answer_appended_rate",
    *(f"rl/{kind}_counts/{letter}" for kind in ("letter_pred", "gold") for letter in "ABCDE"),
}


def test_the_telemetry_has_exactly_the_promised_names() -> None:
    tokenizer, task = ByteTokenizer(), Choices(6)
    policy, reference = (small_model(vocab_size=tokenizer.vocab_size, seed=s) for s in (0, 1))
    episodes = [written(tokenizer, task, i, f"so\nAnswer: {'ABCDE'[i % 5]}") for i in range(5)]
    episodes.append(written(tokenizer, task, 5, "no idea"))
    report = letter_telemetry(policy, reference, tokenizer, episodes, num_hardest=3)
    metrics = report.metrics
    assert set(metrics) == NAMES
    assert metrics["rl/kl_sequence_mean"] == metrics["rl/kl_sequence_k3_mean"] > 0
    assert metrics["rl/kl_letter_mean"] > 0 and 0 < metrics["rl/letter_prob_gold_mean"] < 1
    assert metrics["rl/answer_appended_rate"] == pytest.approx(1 / 6)
    histogram = metrics["rl/letter_margin_hist"]
    assert isinstance(histogram, Histogram) and sum(histogram.counts) == 6
    for kind in ("letter_pred", "gold"):
        assert sum(metrics[f"rl/{kind}_counts/{letter}"] for letter in "ABCDE") == 6
    margins = [row["margin"] for row in report.hardest]
    assert len(margins) == 3 and margins == sorted(margins)
    row = report.hardest[0]
    assert {"question", "options", "model letter", "gold letter", "completion"} < set(row)
    assert row["options"] in {
        " | ".join(f"{letter}) {option}" for letter, option in zip("ABCDE", problem.options, strict=True))
        for problem in task.problems
    }


def test_modes_and_a_missing_reference_leave_the_rest_in_place() -> None:
    tokenizer, task = ByteTokenizer(), Choices(2)
    policy = small_model(vocab_size=tokenizer.vocab_size)
    episodes = [written(tokenizer, task, i, "Answer: A") for i in range(2)]

    def names(mode: str, reference: object) -> set[str]:
        return set(letter_telemetry(policy, reference, tokenizer, episodes, mode=mode).metrics)  # type: ignore[arg-type]

    sequence = {name for name in NAMES if "kl_sequence" in name}
    letter = {name for name in NAMES if "kl_letter" in name}
    assert names("letter", policy) == NAMES - sequence
    assert names("sequence", policy) == NAMES - letter
    assert names("both", None) == NAMES - letter - sequence


def test_before_any_update_every_kl_is_exactly_zero() -> None:
    tokenizer, task = ByteTokenizer(), Choices(3)
    policy, reference = (small_model(vocab_size=tokenizer.vocab_size) for _ in range(2))
    episodes = [written(tokenizer, task, i, "x\nAnswer: A") for i in range(3)]
    metrics = letter_telemetry(policy, reference, tokenizer, episodes).metrics
    for name in ("rl/kl_letter_mean", "rl/kl_letter_std", "rl/kl_sequence_k1_mean", "rl/kl_sequence_k3_mean"):
        assert metrics[name] == 0.0


def test_an_unknown_mode_is_refused() -> None:
    tokenizer, task = ByteTokenizer(), Choices(1)
    policy = small_model(vocab_size=tokenizer.vocab_size)
    with pytest.raises(UserError, match="--kl_mode=words"):
        letter_telemetry(policy, policy, tokenizer, [written(tokenizer, task, 0, "x")], mode="words")  # type: ignore[arg-type]

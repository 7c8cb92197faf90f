"""The shared prompt against plain rows, and microbatches of any size against each other."""

from __future__ import annotations

import dataclasses

import pytest

from nanochat.policy_gradient import (
    LossMeter,
    Objective,
    batch_logprobs,
    loss_normalizer,
    policy_gradient_loss,
    token_weight,
    trained_episodes,
)
from nanochat.rl import (
    with_advantages,
)
from nanochat.shared_prefix import microbatches
from tests.gloo import single
from tests.rl_fakes import episode, loss_and_gradient, random_groups, relative_error, small_model

ALONE = single()


@pytest.mark.parametrize("smear", [0, 2])
@pytest.mark.parametrize("window_pattern", ["L", "SSL"])
@pytest.mark.parametrize("shortest", [1, 3])
def test_the_shared_prompt_gives_the_value_and_gradient_of_plain_rows(
    smear: int, window_pattern: str, shortest: int
) -> None:
    model = small_model(smear=smear, window_pattern=window_pattern)
    groups = random_groups(shortest=shortest)
    objective = Objective(temperature=0.7)
    results = {}
    for shared in (True, False):
        batches = microbatches(groups, token_budget=10_000, smear=smear, shared=shared)
        assert len(batches) == 1
        results[shared] = loss_and_gradient(model, batches, objective, 10.0)
    assert results[True][0] == pytest.approx(results[False][0], rel=2e-6)
    assert relative_error(results[True][1], results[False][1]) < 2e-6


def test_completions_of_one_token_need_no_completion_block() -> None:
    model = small_model()
    groups = with_advantages([[episode(0, i, [1, 2, 3], [4 + i], correct=float(i)) for i in range(2)]])
    shared, plain = (microbatches(groups, token_budget=99, smear=2, shared=s) for s in (True, False))
    assert shared[0].ids.tolist() == [[1, 2, 3]]
    a, b = (loss_and_gradient(model, batches, Objective(), 2.0) for batches in (shared, plain))
    assert a[0] == pytest.approx(b[0], abs=2e-6)  # two log-probabilities near 3.5 whose advantages cancel
    assert relative_error(a[1], b[1]) < 2e-6


def test_a_packed_row_holds_every_prompt_once_and_no_final_token() -> None:
    groups = [[episode(0, i, [1, 2, 3], [4, 5, 6][: i + 1]) for i in range(3)], [episode(1, 0, [7], [8, 9])]]
    (batch,) = microbatches(groups, token_budget=99, smear=1)
    assert sorted(batch.ids[0].tolist()) == [1, 2, 3, 4, 4, 5, 7, 8]
    assert batch.num_targets == 1 + 2 + 3 + 2
    predictor = batch.ids[0][batch.predict].tolist()
    assert sorted(zip(predictor, batch.targets.tolist(), strict=True)) == sorted(
        [(3, 4), (3, 4), (4, 5), (3, 4), (4, 5), (5, 6), (7, 8), (8, 9)]
    )


def test_tokens_that_a_tool_wrote_are_inputs_and_no_targets() -> None:
    (batch,) = microbatches([[episode(0, 0, [1], [2, 3, 4], mask=[1, 0, 1])]], token_budget=99, smear=0)
    assert batch.targets.tolist() == [2, 4] and batch.ids.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("loss", ["dapo", "dr_grpo", "grpo"])
@pytest.mark.parametrize("shared", [True, False])
def test_loss_and_gradient_do_not_depend_on_the_number_of_microbatches(loss: str, shared: bool) -> None:
    model, groups = small_model(), random_groups(num_groups=4, size=8)
    objective = Objective(loss=loss, max_completion_tokens=12)
    normalizer = loss_normalizer(groups, objective, ALONE)
    counts, results = [], []
    for budget in (100_000, 150, 60, 20):
        batches = microbatches(
            groups, token_budget=budget, smear=2, weight=lambda n: token_weight(n, objective), shared=shared
        )
        counts.append(len(batches))
        results.append(loss_and_gradient(model, batches, objective, normalizer))
    assert counts[0] == 1 and counts == sorted(set(counts)) and counts[-1] >= 8
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-5)
        assert relative_error(gradient, results[0][1]) < 1e-6


def test_normalizers_of_the_three_losses_known_by_hand() -> None:
    live = [episode(0, 0, [1], [2, 3], correct=1.0), episode(0, 1, [1], [2, 3, 4], truncated=True)]
    dead = [episode(1, i, [1], [2] * 50) for i in range(2)]
    for loss, expected in (("dapo", 5), ("dr_grpo", 2 * 16), ("grpo", 2)):
        assert (
            loss_normalizer([live, dead], Objective(loss=loss, max_completion_tokens=16), ALONE) == expected
        )
    assert loss_normalizer([live, dead], Objective(mask_truncated=True), ALONE) == 2
    assert loss_normalizer([dead], Objective(), ALONE) == 0


def test_skipping_dead_groups_changes_nothing() -> None:
    model = small_model()
    groups = random_groups(num_groups=2)
    dead = [episode(9, i, [5, 6], [7, 8, 9]) for i in range(4)]
    objective = Objective()
    normalizer = loss_normalizer([*groups, dead], objective, ALONE)
    everything, kept = (
        loss_and_gradient(model, microbatches(g, token_budget=9999, smear=2), objective, normalizer)
        for g in (with_advantages([*groups, dead]), trained_episodes([*groups, dead], objective))
    )
    assert normalizer == sum(e.num_tokens for g in groups for e in g)
    assert everything[0] == pytest.approx(kept[0], rel=1e-6)
    assert relative_error(everything[1], kept[1]) < 1e-6


def test_the_ratio_is_one_when_sampler_and_trainer_are_the_same_model() -> None:
    model, groups = small_model(), random_groups()
    (batch,) = microbatches(groups, token_budget=9999, smear=2)
    logprobs = batch_logprobs(model, batch, temperature=0.7)
    batch = dataclasses.replace(batch, sampler_logprobs=logprobs, reference_logprobs=logprobs)
    meter = LossMeter()
    policy_gradient_loss(model, batch, objective=Objective(temperature=0.7), meter=meter)
    metrics = meter.metrics(ALONE)
    assert metrics["rl/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["rl/sampler_trainer_logp_diff_max"] < 1e-5
    assert metrics["rl/clip_fraction"] == 0.0
    assert metrics["rl/kl_k2_mean"] == pytest.approx(0.0, abs=1e-10)
    assert LossMeter().metrics(ALONE) == {}

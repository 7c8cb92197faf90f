"""The loss against closed forms, estimators against exact KL, whole updates on one rank and on two."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanochat.common import UserError, World
from nanochat.gpt import GPT
from nanochat.optim import make_adamw
from nanochat.policy_gradient import (
    LossMeter,
    Objective,
    batch_logprobs,
    kl_estimates,
    token_losses,
    update_policy,
)
from nanochat.rl import (
    Episode,
    randomize_rewards,
    step_metrics,
    with_advantages,
)
from nanochat.shared_prefix import RLBatch, microbatches
from nanochat.train import NonFiniteGuard
from tests.gloo import run_ranks, single
from tests.rl_fakes import episode, loss_and_gradient, random_groups, relative_error, small_model

ALONE = single()


def bandit_batch(actions: Tensor, advantage: Tensor, reference: Tensor | None = None) -> RLBatch:
    """A batch whose `hidden` is never asked for: only what token_losses reads."""
    none = torch.empty(0, dtype=torch.int64)
    return RLBatch(
        none, none, none, None, none, actions, none, advantage, torch.ones(len(actions)), torch.zeros(len(actions)),
        reference, (),
    )  # fmt: skip


def test_the_gradient_of_the_five_letter_bandit_is_the_closed_form() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    actions, advantage = (
        torch.tensor([0, 3, 3, 1]),
        torch.tensor([0.75, -0.25, -0.25, -0.25], dtype=torch.float64),
    )
    batch = bandit_batch(actions, advantage)
    loss = token_losses(torch.log_softmax(logits, 0)[actions], batch, Objective()).sum() / 4
    loss.backward()
    p, onehot = torch.softmax(logits.detach(), 0), torch.eye(5, dtype=torch.float64)[actions]
    expected = -(advantage[:, None] * (onehot - p)).sum(0) / 4
    assert torch.allclose(logits.grad, expected, atol=1e-14)


def test_on_policy_the_clipped_loss_has_the_gradient_of_the_plain_one() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    actions = torch.tensor([0, 3, 4, 1])
    old = torch.log_softmax(logits.detach(), 0)[actions]
    batch = dataclasses.replace(
        bandit_batch(actions, torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)), sampler_logprobs=old
    )
    gradients = []
    for objective in (Objective(), Objective(updates_per_rollout=2)):
        logits.grad = None
        token_losses(torch.log_softmax(logits, 0)[actions], batch, objective).sum().backward()
        gradients.append(logits.grad)
    assert torch.allclose(*gradients, atol=1e-14)


def test_clipping_stops_the_gradient_only_where_it_would_go_further_away() -> None:
    ratios, signs = [2.0, 2.0, 0.5, 0.5, 1.1], [1.0, -1.0, 1.0, -1.0, 1.0]
    logprobs = torch.tensor(ratios).log().requires_grad_()
    batch = bandit_batch(torch.zeros(5, dtype=torch.int64), torch.tensor(signs))
    token_losses(logprobs, batch, Objective(updates_per_rollout=2)).sum().backward()
    assert [g != 0 for g in logprobs.grad.tolist()] == [False, True, True, False, True]
    meter = LossMeter()
    meter.update(logprobs.detach(), batch, Objective(updates_per_rollout=2))
    assert meter.metrics(ALONE)["rl/clip_fraction"] == pytest.approx(2 / 5)


def test_exact_kl_is_the_oracle_of_k1_k2_and_k3_over_a_million_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.log_softmax(torch.randn(5, generator=generator, dtype=torch.float64), 0)
    reference = torch.log_softmax(policy + 0.1 * torch.randn(5, generator=generator, dtype=torch.float64), 0)
    exact = (policy.exp() * (policy - reference)).sum().item()
    draws = torch.multinomial(policy.exp(), 1_000_000, replacement=True, generator=generator)
    estimates = kl_estimates(policy[draws], reference[draws])
    for name in ("k1", "k3"):
        error = estimates[name].std().item() / 1000
        assert estimates[name].mean().item() == pytest.approx(exact, abs=4 * error), name
    biased = (policy.exp() * 0.5 * (policy - reference).square()).sum().item()
    assert estimates["k2"].mean().item() == pytest.approx(biased, rel=0.01)
    assert biased == pytest.approx(exact, rel=0.1), "k2 is near, for policies that are near"
    assert estimates["k3"].min().item() >= 0 > estimates["k1"].min().item()
    assert estimates["k3"].var() < estimates["k1"].var()


def test_k2_has_the_gradient_of_the_kl_and_k3_has_not() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.randn(5, generator=generator, dtype=torch.float64), 0)
    logp = torch.log_softmax(logits, 0)
    p = logp.detach().exp()
    exact = (logp.exp() * (logp - reference)).sum()
    expected = p * (logp.detach() - reference - exact.detach())
    (by_autograd,) = torch.autograd.grad(exact, logits, retain_graph=True)
    assert torch.allclose(by_autograd, expected, atol=1e-14)
    # The expectation over all letters of each estimator's gradient, samples weighted by the detached policy.
    batch = bandit_batch(torch.arange(5), torch.zeros(5, dtype=torch.float64), reference)
    losses = token_losses(logp, batch, Objective(kl_coef=1.0))
    (k2,) = torch.autograd.grad((p * losses).sum(), logits, retain_graph=True)
    (k3,) = torch.autograd.grad((p * kl_estimates(logp, reference)["k3"]).sum(), logits)
    assert torch.allclose(k2, expected, atol=1e-14)
    assert (k3 - expected).norm() > 0.1 * expected.norm()


def test_the_entropy_bonus_has_the_gradient_of_the_exact_entropy() -> None:
    model, groups = small_model(), random_groups()
    (batch,) = microbatches(groups, token_budget=10_000, smear=2)
    plain = loss_and_gradient(model, [batch], Objective(), 1.0)
    bonus = loss_and_gradient(model, [batch], Objective(entropy_coef=0.3), 1.0)
    model.zero_grad()
    logp = torch.log_softmax(model.logits(batch.hidden(model)), -1)
    entropy = -(logp.exp() * logp).sum()
    entropy.backward()
    gradient = torch.cat([w.grad.flatten() for w in model.parameters()])
    assert bonus[0] == pytest.approx(plain[0] - 0.3 * entropy.item(), rel=1e-5)
    assert relative_error(plain[1] - bonus[1], 0.3 * gradient) < 1e-5


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"loss": "ppo"}, "--loss=ppo"),
        ({"temperature": 0.0}, "--temperature=0.0"),
        ({"loss": "dr_grpo"}, "max_completion_tokens"),
        ({"kl_coef": -1.0}, "--kl_coef"),
        ({"updates_per_rollout": 0}, "--updates_per_rollout"),
        ({"clip_low": 1.5}, "--clip_low"),
    ],
)
def test_a_wrong_objective_is_refused_by_flag_and_value(values: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        Objective(**values)


# --- whole updates


def learning_groups(model: GPT) -> list[list[Episode]]:
    """Live groups whose sampler log-probabilities are the model's own."""
    groups = random_groups(num_groups=4)
    (batch,) = microbatches(groups, token_budget=9999, smear=model.config.smear)
    logprobs = batch_logprobs(model, batch, temperature=1.0)
    own = {}
    for index, e in enumerate(batch.episodes):
        values = iter(logprobs[batch.owner == index].tolist())
        column = [next(values) if m else 0.0 for m in e.completion.mask]
        own[e.question, e.sample] = dataclasses.replace(e.completion, logprobs=column)
    return [[dataclasses.replace(e, completion=own[e.question, e.sample]) for e in group] for group in groups]


def test_the_kl_to_the_start_is_zero_before_and_positive_after_an_update() -> None:
    model, reference = small_model(), small_model()
    groups = learning_groups(model)
    objective = Objective(kl_coef=0.01)
    optimizer = make_adamw(model, lr=1e-3, world=ALONE)
    first = update_policy(model, optimizer, groups, objective=objective, world=ALONE, reference=reference)
    second = update_policy(model, optimizer, groups, objective=objective, world=ALONE, reference=reference)
    assert first["rl/kl_k2_mean"] == pytest.approx(0.0, abs=1e-10)
    assert second["rl/kl_k2_mean"] > 1e-5
    assert first["train/grad_norm"] > 0


def test_several_updates_of_one_rollout_start_on_policy_and_then_clip() -> None:
    model = small_model()
    groups = learning_groups(model)
    optimizer = make_adamw(model, lr=1e-2, world=ALONE)
    objective = Objective(updates_per_rollout=4)
    metrics = update_policy(model, optimizer, groups, objective=objective, world=ALONE, want_update_norm=True)
    assert metrics["rl/sampler_trainer_logp_diff_max"] < 1e-5, "that of the first update"
    assert metrics["rl/clip_fraction"] > 0.05 and abs(metrics["rl/ratio_mean"] - 1) > 1e-3
    assert metrics["train/update_norm"] > 0


def test_a_step_without_a_live_group_does_not_move_the_weights() -> None:
    model = small_model()
    optimizer = make_adamw(model, lr=1.0, world=ALONE)
    update_policy(model, optimizer, learning_groups(model), objective=Objective(), world=ALONE)
    before = [weight.clone() for weight in model.parameters()]
    dead = [[episode(0, i, [1], [2, 3]) for i in range(4)]]
    metrics = update_policy(model, optimizer, dead, objective=Objective(), world=ALONE)
    assert metrics["train/update_norm"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_three_updates_that_are_not_finite_end_the_run_and_leave_the_batch(tmp_path: Path) -> None:
    model = small_model()
    groups = learning_groups(model)
    optimizer = make_adamw(model, lr=1e-3, world=ALONE)
    guard = NonFiniteGuard(folder=tmp_path)

    def step(number: int) -> dict[str, float]:
        return update_policy(
            model, optimizer, groups, objective=Objective(), world=ALONE, guard=guard, step=number
        )

    step(1)
    sound = [weight.detach().clone() for weight in model.parameters()]
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    assert [step(number)["train/skipped"] for number in (2, 3)] == [1.0, 1.0]
    with pytest.raises(
        UserError, match=r"3 steps in a row, the last being step 4 .*nonfinite_000004_rank0\.pt"
    ):
        step(4)
    assert guard.state() == {"num_skipped": 3, "streak": 3}
    model.lm_head.weight.data[0, 0] = sound[[*dict(model.named_parameters())].index("lm_head.weight")][0, 0]
    assert all(torch.equal(a, b) for a, b in zip(sound, model.parameters(), strict=True)), "nothing moved"
    (saved, *_) = torch.load(tmp_path / "nonfinite_000004_rank0.pt", weights_only=True)
    assert saved["targets"].numel() > 0 and saved["advantages"].isfinite().all()


def updated_weights(world: World) -> dict:
    """A step of which each rank has its share: rank 1 of 2 gets a live and a dead group, rank 0 the rest."""
    model = small_model()
    groups = learning_groups(model)
    dead = [episode(9, i, [1], [2, 3]) for i in range(4)]
    groups = with_advantages([*groups[:3], dead, groups[3]])
    mine = groups if world.size == 1 else groups[3:] if world.rank else groups[:3]
    optimizer = make_adamw(model, lr=1e-2, world=world)
    metrics = update_policy(model, optimizer, mine, objective=Objective(), world=world, token_budget=40)
    metrics |= step_metrics(mine, temperature=1.0, world=world)
    control = randomize_rewards(mine, seed=0, step=0, world=world)
    paid = [[e.question, e.sample, e.paid.correct] for group in control for e in group]
    weights = [w.detach().clone() for w in model.parameters()]
    # A further step in which only rank 0 has a live group.
    lonely = [[episode(0, i, [1], [2]) for i in range(2)]] if world.rank else [groups[0]]
    update_policy(model, optimizer, lonely, objective=Objective(), world=world)
    return {
        "weights": weights,
        "further": [w.detach() for w in model.parameters()],
        "metrics": metrics,
        "paid": paid,
    }


def test_one_and_two_ranks_give_the_same_update_metrics_and_random_rewards() -> None:
    # A process of its own too, so that both sums run on one thread: AdamW makes a step of any rounding difference.
    (alone,) = run_ranks(updated_weights, 1)
    first, second = run_ranks(updated_weights, 2)
    for a, b, c in zip(alone["weights"], first["weights"], second["weights"], strict=True):
        assert torch.equal(b, c)
        assert torch.allclose(a, b, atol=1e-6)
    assert first["metrics"].keys() == alone["metrics"].keys()
    for name, value in alone["metrics"].items():
        assert first["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert first["paid"] + second["paid"] == alone["paid"]
    for before, a, b, c in zip(
        first["weights"], alone["further"], first["further"], second["further"], strict=True
    ):
        assert torch.equal(b, c) and torch.allclose(a, b, atol=1e-6) and not torch.equal(b, before)

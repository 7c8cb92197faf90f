"""Advantages, orders, controls, metrics and rollouts; and the whole loop on a toy."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import make_adamw
from nanochat.policy_gradient import (
    Objective,
    batch_logprobs,
    trained_episodes,
    update_policy,
)
from nanochat.rl import (
    advantages,
    is_live,
    option_order,
    questions_for_step,
    randomize_rewards,
    refill,
    refill_questions,
    rollout,
    rollout_seeds,
    sample_rows,
    step_metrics,
    with_advantages,
)
from nanochat.schedule import linear_to_zero
from nanochat.shared_prefix import microbatches
from tests.gloo import single
from tests.rl_fakes import ByteTokenizer, Choices, Reward, ScriptedEngine, episode, small_model

ALONE = single()


def test_advantages_of_a_group_known_by_hand() -> None:
    rewards = [1.1, 0.1, 0.1, 0.1]
    assert advantages(rewards, "center") == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert advantages(rewards, "rloo") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert advantages(rewards, "zscore") == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    assert sum(advantages(rewards, "zscore")) == pytest.approx(0.0, abs=1e-15)


def test_an_unknown_advantage_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="--advantage=median"):
        advantages([1.0, 0.0], "median")  # type: ignore[arg-type]


def test_a_group_that_differs_only_in_format_is_dead() -> None:
    wrong = [episode(0, i, [1], [2]) for i in range(3)]
    unformatted = dataclasses.replace(wrong[0], reward=Reward(0.0, 0.0), paid=Reward(0.0, 0.0))
    group = [unformatted, *wrong[1:]]
    assert not is_live(group)
    assert [e.advantage for e in with_advantages([group])[0]] == [0.0, 0.0, 0.0]
    assert is_live([*group, episode(0, 3, [1], [2], correct=1.0)])


def test_where_wrong_answers_cost_saying_nothing_is_better_than_a_wrong_answer() -> None:
    wrong = dataclasses.replace(episode(0, 0, [1], [2]), paid=Reward(0.0, 0.0, -0.25))
    silent = dataclasses.replace(episode(0, 1, [1], [2]), paid=Reward(0.0, 0.0))
    assert not is_live([wrong, wrong]) and not is_live([silent, silent])
    [[low, high]] = with_advantages([[wrong, silent]])
    assert (low.advantage, high.advantage) == (-0.125, 0.125)
    assert trained_episodes([[wrong, silent]], Objective()) == [[wrong, silent]]


def test_questions_come_once_per_epoch_in_a_new_order_each_epoch() -> None:
    first = [q for step in range(5) for q in questions_for_step(1, step, 20, 4)]
    second = [q for step in range(5, 10) for q in questions_for_step(1, step, 20, 4)]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != list(range(20))
    assert questions_for_step(1, 7, 20, 4) == second[8:12]
    assert questions_for_step(2, 7, 20, 4) != second[8:12]


def test_a_step_may_straddle_two_epochs_and_be_longer_than_one() -> None:
    drawn = [q for step in range(4) for q in questions_for_step(0, step, 7, 5)]
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == list(range(7))
    assert len(questions_for_step(0, 0, 3, 8)) == 8


def test_no_questions_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="no questions"):
        questions_for_step(0, 0, 0, 4)


def test_seeds_differ_between_steps_questions_and_repetitions() -> None:
    seeds = rollout_seeds(0, 1, [3, 4, 3]) + rollout_seeds(0, 2, [3, 4]) + rollout_seeds(1, 1, [3])
    assert len(set(seeds)) == 6
    assert rollout_seeds(0, 1, [4])[0] == seeds[1], "a question's seed does not depend on its neighbours"


def test_option_orders_are_permutations_and_put_gold_on_every_letter_alike() -> None:
    orders = [option_order(0, step, question, 5) for step in range(20) for question in range(50)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    counts = [sum(order.index(2) == place for order in orders) for place in range(5)]
    assert all(150 < count < 250 for count in counts)  # 200 expected, standard deviation 12.6
    assert option_order(0, 3, 9, 5) == option_order(0, 3, 9, 5)


def test_refill_draws_until_enough_groups_live_and_keeps_the_dead_for_the_metrics() -> None:
    dead = [episode(0, i, [1], [2]) for i in range(2)]
    live = [episode(1, i, [1], [2], correct=float(i)) for i in range(2)]
    draws = [[dead, live], [dead, dead], [live, live, live]]
    groups, attempts = refill(lambda attempt: draws[attempt], num_live=2, max_attempts=5)
    assert attempts == 3 and [is_live(g) for g in groups] == [False, True, False, False, True]
    groups, attempts = refill(lambda attempt: [dead], num_live=1, max_attempts=4)
    assert attempts == 4 and len(groups) == 4
    questions = refill_questions(0, 3, 1, 50, 8)
    assert len(set(questions)) == 8 and questions != refill_questions(0, 3, 2, 50, 8)


def test_random_rewards_keep_the_marginal_forget_the_answer_and_leave_the_truth() -> None:
    groups = [[episode(q, s, [1], [2], correct=float(s < 4)) for s in range(16)] for q in range(200)]
    control = randomize_rewards(groups, seed=0, step=5, world=ALONE)
    episodes = [e for group in control for e in group]
    assert [e.reward for e in episodes] == [e.reward for g in groups for e in g]
    paid = [e.paid.correct for e in episodes]
    right = [e.paid.correct for e in episodes if e.reward.correct]
    assert sum(paid) / len(paid) == pytest.approx(0.25, abs=0.03)
    assert sum(right) / len(right) == pytest.approx(0.25, abs=0.06)
    assert control == randomize_rewards(groups, seed=0, step=5, world=ALONE)
    assert control != randomize_rewards(groups, seed=0, step=6, world=ALONE)


def test_random_rewards_draw_a_pay_whole() -> None:
    pays = [Reward(1.0, 0.1), Reward(0.0, 0.1, -0.25), Reward(0.0, 0.0)]
    group = [dataclasses.replace(episode(0, n, [1], [2]), reward=pays[n % 3]) for n in range(60)]
    (drawn,) = randomize_rewards([group], seed=0, step=5, world=ALONE)
    assert {e.paid for e in drawn} == set(pays), "no episode is right and wrong at once"


# --- metrics


def test_step_metrics_of_two_groups_known_by_hand() -> None:
    solved = episode(0, 0, [1], [2, 3], correct=1.0, logprobs=[-1.0, -3.0])
    unsolved = episode(0, 1, [1], [2, 3, 4, 5], truncated=True, logprobs=[-1.0] * 4, mask=[1, 1, 0, 1])
    unsolved = dataclasses.replace(unsolved, letter=None, reward=Reward(0.0, 0.0), paid=Reward(0.0, 0.0))
    metrics = step_metrics([[solved, unsolved], [unsolved, unsolved]], temperature=0.9, world=ALONE)
    assert metrics["rl/acc"] == 0.25 and metrics["rl/mean_reward"] == pytest.approx(1.1 / 4)
    assert metrics["rl/reward_std"] == pytest.approx(1.1 * math.sqrt(3) / 4)
    assert metrics["rl/format_rate"] == 0.25 and metrics["rl/truncated_rate"] == 0.75
    assert metrics["rl/acc_answered"] == 1.0
    assert metrics["rl/frac_groups_all_wrong"] == 0.5 and metrics["rl/frac_groups_all_right"] == 0.0
    assert metrics["rl/live_groups"] == 1 and metrics["rl/group_size"] == 2
    assert metrics["rl/completion_len_solved"] == 2 and metrics["rl/completion_len_unsolved"] == 3
    assert metrics["rl/avg_completion_len"] == pytest.approx(11 / 4)
    assert metrics["rl/token_entropy"] == pytest.approx((4 + 9) / 11)
    assert metrics["rl/temperature"] == 0.9
    assert step_metrics([], temperature=1.0, world=ALONE) == {}


def test_sample_rows_hold_what_a_reader_of_the_table_needs() -> None:
    (row,) = sample_rows([[episode(3, 0, [1], [2], correct=1.0)]])
    assert row == {
        "question": "question 3", "completion": "", "predicted": "A", "gold": "A", "reward": 1.1, "advantage": 0.0
    }  # fmt: skip


# --- rollouts


def test_a_rollout_groups_marks_and_keeps_what_was_sampled() -> None:
    tokenizer, task = ByteTokenizer(), Choices(4)
    engine = ScriptedEngine(tokenizer, lambda prompt, sample: ["so\nAnswer: A", "no idea"][sample])
    questions = [(index, task[index]) for index in (2, 0)]
    groups = rollout(engine, tokenizer, task, questions, num_samples=2, seeds=[1, 2], max_tokens=64)
    assert [[(e.question, e.sample) for e in group] for group in groups] == [
        [(2, 0), (2, 1)],
        [(0, 0), (0, 1)],
    ]
    first, second = groups[0]
    assert first.text == "so\nAnswer: A" and first.letter == "A" and first.gold == task[2]["answer_letter"]
    assert first.completion.ids[-1] == tokenizer.special("<|assistant_end|>")
    assert first.num_tokens == len(first.completion.ids)
    assert first.reward.total == (1.1 if first.gold == "A" else 0.1)
    assert second.letter is None and second.reward.total == 0.0
    assert first.prompt_ids == tuple(tokenizer.render_for_completion(task[2]))


def test_a_truncated_completion_earns_nothing_even_where_its_answer_is_right() -> None:
    tokenizer, task = ByteTokenizer(), Choices(1)
    gold = task[0]["answer_letter"]
    engine = ScriptedEngine(tokenizer, lambda prompt, sample: f"Answer: {gold}", truncated=True)
    ((only,),) = rollout(engine, tokenizer, task, [(0, task[0])], num_samples=1, seeds=[1], max_tokens=8)
    assert only.text == f"Answer: {gold}" and only.letter is None
    assert only.reward == only.paid == Reward(0.0, 0.0)


def test_the_format_reward_can_be_set() -> None:
    tokenizer, task = ByteTokenizer(), Choices(1)
    engine = ScriptedEngine(tokenizer, lambda prompt, sample: "Answer: A")
    ((only,),) = rollout(
        engine, tokenizer, task, [(0, task[0])], num_samples=1, seeds=[1], max_tokens=8, format_reward=0.0
    )
    assert only.reward.format == 0.0
    metrics = step_metrics([[only]], temperature=1.0, world=ALONE)
    assert metrics["rl/format_rate"] == 1.0, "it is well-formed, whatever that is paid"


@pytest.mark.parametrize(
    ("says", "truncated", "pay"),
    [
        ("Answer: {gold}", False, Reward(1.0, 0.1)),
        ("Answer: {other}", False, Reward(0.0, 0.1, -0.25)),
        ("No option.", False, Reward(0.0, 0.0)),
        ("Answer: {other}", True, Reward(0.0, 0.0)),
    ],
)
def test_only_a_wrong_answer_costs_what_wrong_answers_cost(says: str, truncated: bool, pay: Reward) -> None:
    tokenizer, task = ByteTokenizer(), Choices(1)
    gold = task[0]["answer_letter"]
    text = says.format(gold=gold, other="B" if gold == "A" else "A")
    engine = ScriptedEngine(tokenizer, lambda prompt, sample: text, truncated=truncated)
    ((only,),) = rollout(
        engine, tokenizer, task, [(0, task[0])], num_samples=1, seeds=[1], max_tokens=8, wrong_reward=-0.25
    )
    assert only.reward == only.paid == pay
    assert only.outcome == (int(pay.correct), pay.wrong < 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("window_pattern", ["L", "SSL"])
def test_sampler_and_trainer_agree_on_every_log_probability(temperature: float, window_pattern: str) -> None:
    """Ragged prompts, ragged completions, the stop token among the targets, both ways of packing."""
    tokenizer, task = ByteTokenizer(), Choices(5)
    model = small_model(vocab_size=tokenizer.vocab_size, window_pattern=window_pattern, noise=0.2)
    with torch.no_grad():  # stop often, so that lengths differ
        model.lm_head.weight[tokenizer.special("<|assistant_end|>")] += 0.3
    questions = [(i, task[i]) for i in range(5)]
    questions[0][1]["messages"][0]["content"] = "short?\n- v=A\n- w=B\n- x=C\n- y=D\n- z=E"
    groups = rollout(
        Engine(model, tokenizer), tokenizer, task, questions,
        num_samples=6, seeds=rollout_seeds(0, 0, range(5)), max_tokens=24, temperature=temperature,
    )  # fmt: skip
    episodes = [e for group in groups for e in group]
    assert (
        len({len(e.completion.ids) for e in episodes}) > 5 and len({len(e.prompt_ids) for e in episodes}) == 2
    )
    assert {e.completion.truncated for e in episodes} == {True, False}
    for shared in (True, False):
        for batch in microbatches(groups, token_budget=400, smear=2, shared=shared):
            logprobs = batch_logprobs(model, batch, temperature=temperature)
            assert torch.allclose(logprobs, batch.sampler_logprobs, atol=1e-5, rtol=0)


class Marked:
    """A toy: five letters in any order, one of them marked; the answer is that letter."""

    def __init__(self, size: int, seed: int) -> None:
        draw = random.Random(seed)
        self.rows = [(draw.sample("ABCDE", 5), draw.randrange(5)) for _ in range(size)]

    def __getitem__(self, index: int) -> dict:
        letters, marked = self.rows[index]
        content = "".join(f"* {x}" if i == marked else f" {x}" for i, x in enumerate(letters))
        return {"messages": [{"role": "user", "content": content}], "answer_letter": letters[marked]}

    def answer(self, conversation: dict, text: str) -> str | None:
        return text[1] if len(text) == 2 and text[1] in "ABCDE" else None

    def reward(self, conversation: dict, text: str, *, format_reward: float = 0.1) -> Reward:
        letter = self.answer(conversation, text)
        return Reward(float(letter == conversation["answer_letter"]), format_reward if letter else 0.0)


def speak_letters(model: GPT, tokenizer: ByteTokenizer, task: Marked, *, num_steps: int) -> None:
    """Supervised warm-up on letters drawn at random: the form of an answer, and chance accuracy."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    end = tokenizer.special("<|assistant_end|>")
    for step in range(num_steps):
        questions = questions_for_step(0, step, len(task.rows), 32)
        prompts = [tokenizer.render_for_completion(task[q]) for q in questions]
        letters = tokenizer.letter_ids(["ABCDE"[(question * 7 + step) % 5] for question in questions])
        ids = torch.tensor([[*prompt, letter, end] for prompt, letter in zip(prompts, letters, strict=True)])
        targets = ids[:, 1:].clone()
        targets[:, : len(prompts[0]) - 1] = -1
        (model(ids[:, :-1], targets) / 64).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_policy_learns_to_copy_the_marked_letter_from_chance_to_ninety_percent() -> None:
    """The whole loop: sample, mark, advantage, update; and the result on questions it has not seen."""
    tokenizer, train, held_out = ByteTokenizer(alphabet="* "), Marked(256, 0), Marked(128, 1)
    torch.manual_seed(2)
    model = GPT(
        GPTConfig.for_depth(2, vocab_size=tokenizer.vocab_size, sequence_len=32, n_embd=64, n_head=4, smear=1)
    )
    speak_letters(model, tokenizer, train, num_steps=20)
    engine, optimizer = Engine(model, tokenizer), make_adamw(model, lr=3e-3, world=ALONE)
    history: list[float] = []
    # Letters that are never sampled are never learnt: the entropy bonus keeps all five in play, whatever the rounding.
    objective, num_steps = Objective(entropy_coef=0.05), 250
    for step in range(num_steps):
        if sum(history[-10:]) > 9.3:
            break
        questions = [(q, train[q]) for q in questions_for_step(0, step, 256, 32)]
        seeds = rollout_seeds(0, step, [q for q, _ in questions])
        groups = rollout(engine, tokenizer, train, questions, num_samples=16, seeds=seeds, max_tokens=3)
        history.append(step_metrics(groups, temperature=1.0, world=ALONE)["rl/acc"])
        groups = with_advantages(groups, "zscore")
        update_policy(
            model,
            optimizer,
            groups,
            objective=objective,
            world=ALONE,
            lr_scale=linear_to_zero(step, num_steps=num_steps),
            token_budget=10_000,
        )
    questions = [(i, held_out[i]) for i in range(128)]
    final = rollout(
        engine, tokenizer, held_out, questions, num_samples=1, seeds=range(128), max_tokens=3, temperature=0.0
    )
    assert sum(history[:5]) / 5 == pytest.approx(0.2, abs=0.1)
    assert sum(history[-10:]) / 10 > 0.9
    assert step_metrics(final, temperature=0.0, world=ALONE)["rl/acc"] > 0.9

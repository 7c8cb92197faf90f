"""Reinforcement learning on questions with a checkable answer: sample, mark, compare within the question, push.

An Episode is a prompt, a completion that the policy sampled for it, and what it was paid. The episodes of one question
are a group; an episode's advantage is its pay against its group's. There is no value network, no clipping by default
and no reference model in the loss: with one update per rollout this is REINFORCE with a group baseline, which is what
is left of GRPO (arXiv 2402.03300) when everything that does nothing on policy is taken out.

Randomness is a value here: the order of questions, the order of options, the samples and the random control follow from
(seed, step, question, sample) and nothing else, so a run resumes exactly and does not depend on the number of ranks (with
dynamic sampling, where each rank refills its own share, it does).

The loss stands in nanochat/policy_gradient.py, the microbatches in nanochat/shared_prefix.py.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nanochat.common import UserError, World, derive_seed

if TYPE_CHECKING:
    from nanochat.engine import Completion, Engine
    from nanochat.tokenizer import Tokenizer

Conversation = Mapping[str, Any]
AdvantageKind = Literal["center", "zscore", "rloo"]


class Reward(Protocol):
    """What tasks.common.Reward offers; a task arrives as an argument, so its types do too."""

    @property
    def correct(self) -> float: ...
    @property
    def format(self) -> float: ...
    @property
    def wrong(self) -> float: ...
    @property
    def total(self) -> float: ...


class RewardTask(Protocol):
    """The part of a task that rollouts need."""

    def reward(self, conversation: Any, text: str, *, format_reward: float = ...) -> Reward: ...
    def answer(self, conversation: Any, text: str) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Episode:
    """One sampled completion of one question, and how it was marked."""

    question: int
    """the question's number in the task"""
    sample: int
    """its number in the group"""
    conversation: Conversation
    prompt_ids: tuple[int, ...]
    completion: Completion
    text: str
    """the completion without its stop token"""
    letter: str | None
    """the final answer, None where there is no single well-formed one"""
    gold: str | None
    reward: Reward
    """what the task says: the truth, which every metric reports"""
    paid: Reward
    """what the trainer sees: the same, but for the random control"""
    advantage: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Sampled tokens, the stop token included, what a tool wrote left out."""
        return sum(self.completion.mask)

    @property
    def outcome(self) -> tuple[int, bool]:
        """Right or not, and whether it pays for being wrong: what makes a group worth learning from, in exact values."""
        return int(self.paid.correct), self.paid.wrong < 0


Group = list[Episode]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_questions: int) -> tuple[int, ...]:
    order = list(range(num_questions))
    random.Random(derive_seed("questions", seed, epoch)).shuffle(order)
    return tuple(order)


def questions_for_step(seed: int, step: int, num_questions: int, examples_per_step: int) -> list[int]:
    """The questions of a step, the first being 0: every epoch is a fresh permutation, and a step needs no history."""
    if num_questions < 1:
        raise UserError("there are no questions to train on; check --dataset and its path")
    places = range(step * examples_per_step, (step + 1) * examples_per_step)
    return [
        _permutation(seed, place // num_questions, num_questions)[place % num_questions] for place in places
    ]


def refill_questions(seed: int, step: int, attempt: int, num_questions: int, count: int) -> list[int]:
    """Further questions for a step whose groups died; drawn beside the epoch's order, which stays as it is."""
    generator = random.Random(derive_seed("refill", seed, step, attempt))
    return generator.sample(range(num_questions), min(count, num_questions))


def rollout_seeds(seed: int, step: int, questions: Sequence[int], *, attempt: int = 0) -> list[int]:
    """One seed per question; where a question stands twice in a step (as epochs meet, or in a later `attempt` to refill
    it), the second differs."""
    seen: Counter[int] = Counter()
    later = (attempt,) if attempt else ()
    seeds = []
    for question in questions:
        seeds.append(derive_seed("rollout", seed, step, question, seen[question], *later))
        seen[question] += 1
    return seeds


def option_order(seed: int, step: int, question: int, num_options: int) -> tuple[int, ...]:
    """A shuffle of a question's options: place i shows option `order[i]`. Takes the letter prior out of the reward."""
    order = list(range(num_options))
    random.Random(derive_seed("options", seed, step, question)).shuffle(order)
    return tuple(order)


def rollout(
    engine: Engine,
    tokenizer: Tokenizer,
    task: RewardTask,
    questions: Sequence[tuple[int, Conversation]],
    *,
    num_samples: int,
    seeds: Sequence[int],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    forbid_first: Sequence[int] = (),
    use_tools: bool = True,
    format_reward: float = 0.1,
    wrong_reward: float = 0.0,
    description: str = "",
) -> list[Group]:
    """Sample `num_samples` completions of every question in one batch and mark them: one group per question.

    `forbid_first` holds token ids that no completion may begin with (the forbid-bare control).
    """
    prompts = [tokenizer.render_for_completion(conversation) for _, conversation in questions]
    completions = engine.generate(
        prompts,
        num_samples=num_samples,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        seeds=seeds,
        forbid_first=forbid_first,
        use_tools=use_tools,
        description=description,
    )
    groups = []
    for (question, conversation), prompt, group in zip(questions, prompts, completions, strict=True):
        marked = [mark(task, tokenizer, conversation, one, format_reward, wrong_reward) for one in group]
        numbered = enumerate(zip(group, marked, strict=True))
        groups.append(
            [Episode(question, n, conversation, tuple(prompt), one, *fields) for n, (one, fields) in numbered]
        )
    return groups


def mark(
    task: RewardTask,
    tokenizer: Tokenizer,
    conversation: Conversation,
    completion: Completion,
    format_reward: float = 0.1,
    wrong_reward: float = 0.0,
) -> tuple[str, str | None, str | None, Reward, Reward]:
    """Text, letter, gold letter and reward (twice) of a completion; one that hit the token limit earns nothing."""
    ids = completion.ids if completion.truncated else completion.ids[:-1]
    text = tokenizer.decode(ids)
    letter = task.answer(conversation, text)
    reward = task.reward(conversation, text, format_reward=format_reward)
    if completion.truncated:
        # Cut at "Answer: C" it might have gone on; and what was not finished shall not pay.
        letter, reward = None, _paid_like(reward, correct=0.0, format=0.0)
    elif letter is not None and not reward.correct:
        reward = _paid_like(reward, wrong=wrong_reward)
    return text, letter, conversation.get("answer_letter"), reward, reward


def _paid_like(reward: Reward, **values: float) -> Reward:
    return dataclasses.replace(reward, **values)  # type: ignore[type-var]  # a frozen dataclass, by contract


def advantages(rewards: Sequence[float], kind: AdvantageKind = "center") -> list[float]:
    """Each reward of a group against the others.

    center: minus the mean. zscore: that over the population's standard deviation. rloo: minus the mean of the OTHER
    episodes, unbiased, and n / (n - 1) times center.
    """
    mean = math.fsum(rewards) / len(rewards)
    centered = [reward - mean for reward in rewards]
    if kind == "center":
        return centered
    if kind == "rloo":
        return [value * len(rewards) / max(1, len(rewards) - 1) for value in centered]
    if kind == "zscore":
        std = math.sqrt(math.fsum(value * value for value in centered) / len(rewards))
        # No epsilon in the divisor: a live group has episodes of different outcomes, so its spread is large.
        return [value / std if std > 0 else 0.0 for value in centered]
    raise UserError(f"--advantage={kind} is not known; use center, zscore or rloo")


def with_advantages(groups: Sequence[Group], kind: AdvantageKind = "center") -> list[Group]:
    """The groups with every episode's advantage filled in; those of a dead group are exactly 0."""
    filled = []
    for group in groups:
        values = advantages([e.paid.total for e in group], kind) if is_live(group) else [0.0] * len(group)
        filled.append([dataclasses.replace(e, advantage=a) for e, a in zip(group, values, strict=True)])
    return filled


def is_live(group: Sequence[Episode]) -> bool:
    """Neither all right nor all wrong, by exact outcomes: differences of format alone teach nothing."""
    return len({e.outcome for e in group}) > 1


def refill(
    draw: Callable[[int], Sequence[Group]], *, num_live: int, max_attempts: int
) -> tuple[list[Group], int]:
    """Dynamic sampling: draw(0), draw(1), ... until `num_live` groups are live or the attempts run out.

    Returns everything drawn, for the metrics, with live groups beyond `num_live` left out; and the number of draws.
    """
    groups: list[Group] = []
    missing, attempt = num_live, 0
    while missing > 0 and attempt < max_attempts:
        for group in draw(attempt):
            live = is_live(group)
            if live and missing == 0:
                continue
            groups.append(group)
            missing -= live
        attempt += 1
    return groups, attempt


def randomize_rewards(groups: Sequence[Group], *, seed: int, step: int, world: World) -> list[Group]:
    """The control: pay every episode a reward drawn at random from this step's own, so the marginal is the same.

    What still improves under it is not learnt from the answers.
    """
    ranks = world.gather([(e.reward.correct, e.reward.format, e.reward.wrong) for g in groups for e in g])
    pool = sorted(pay for rank in ranks for pay in rank)  # sorted: the same on 1 rank and on 8

    def draw(episode: Episode) -> Reward:
        generator = random.Random(derive_seed("random reward", seed, step, episode.question, episode.sample))
        correct, form, wrong = pool[generator.randrange(len(pool))]
        return _paid_like(episode.reward, correct=correct, format=form, wrong=wrong)

    return [[dataclasses.replace(e, paid=draw(e)) for e in group] for group in groups]


def step_metrics(groups: Sequence[Group], *, temperature: float, world: World) -> dict[str, float]:
    """What a step's rollouts say, over all ranks. A collective: call it on every rank or on none.

    rl/reward_std is over all episodes of the step. rl/token_entropy is minus the mean log-probability of the sampled
    tokens: an unbiased estimate that costs nothing. The length of solved (unsolved) completions is left out of a step
    that has none.
    """
    ranks = world.gather(_sums(groups))
    total = {name: math.fsum(rank[name] for rank in ranks) for name in ranks[0]}
    n, num_groups = total["episodes"], total["groups"]
    if not n:
        return {}
    mean = total["reward"] / n
    metrics = {
        "rl/acc": total["correct"] / n,
        "rl/mean_reward": mean,
        "rl/reward_std": math.sqrt(max(0.0, total["reward_squared"] / n - mean * mean)),
        "rl/format_rate": total["formatted"] / n,
        "rl/frac_groups_all_right": total["all_right"] / num_groups,
        "rl/frac_groups_all_wrong": total["all_wrong"] / num_groups,
        "rl/live_groups": total["live"],
        "rl/avg_completion_len": total["tokens"] / n,
        "rl/truncated_rate": total["truncated"] / n,
        "rl/token_entropy": -total["logprob"] / max(1, total["tokens"]),
        "rl/temperature": temperature,
        "rl/group_size": n / num_groups,
    }
    if total["formatted"]:
        metrics["rl/acc_answered"] = total["correct"] / total["formatted"]
    if total["correct"]:
        metrics["rl/completion_len_solved"] = total["tokens_solved"] / total["correct"]
    if n > total["correct"]:
        unsolved = total["tokens"] - total["tokens_solved"]
        metrics["rl/completion_len_unsolved"] = unsolved / (n - total["correct"])
    return metrics


def _sums(groups: Sequence[Group]) -> dict[str, float]:
    episodes = [e for group in groups for e in group]
    right = [sum(int(e.reward.correct) for e in group) for group in groups]
    return {
        "episodes": len(episodes),
        "groups": len(groups),
        "correct": sum(right),
        "all_right": sum(count == len(group) for count, group in zip(right, groups, strict=True)),
        "all_wrong": sum(count == 0 for count in right),
        "live": sum(map(is_live, groups)),
        "reward": math.fsum(e.reward.total for e in episodes),
        "reward_squared": math.fsum(e.reward.total**2 for e in episodes),
        "formatted": sum(e.letter is not None for e in episodes),  # not by its pay, which may be set to 0
        "tokens": sum(e.num_tokens for e in episodes),
        "tokens_solved": sum(e.num_tokens for e in episodes if e.reward.correct),
        "truncated": sum(e.completion.truncated for e in episodes),
        "logprob": math.fsum(
            lp for e in episodes for lp, m in zip(e.completion.logprobs, e.completion.mask, strict=True) if m
        ),
    }


def sample_rows(groups: Sequence[Group], *, limit: int = 64) -> list[dict[str, Any]]:
    """Rows of the table rl/samples, grouped by question."""
    episodes = [e for group in groups for e in group][:limit]
    return [
        {
            "question": question_text(e.conversation),
            "completion": e.text,
            "predicted": e.letter,
            "gold": e.gold,
            "reward": e.reward.total,
            "advantage": e.advantage,
        }
        for e in episodes
    ]


def question_text(conversation: Conversation) -> str:
    """What the user asked, as text."""
    content = next(message["content"] for message in conversation["messages"] if message["role"] == "user")
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)

"""Ask the model and keep what became of every item: bits per byte, accuracy on tasks, consistency over option orders.

Two modes. `generative`: the model writes its completion and the task marks it. `letters`: the letters' logits directly
after the prompt and `Answer:`, no reasoning; the two differ widely, and reading only the second hides what RL does. A
completion cut off by the token limit is no answer, as in training.

Ranks share the items out and all return the same result. A task arrives as an argument.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nanochat.accuracy import Accuracy, Outcome, Rotations
from nanochat.common import UserError, World, derive_seed, progress
from nanochat.letters import CUE, letter_logits
from nanochat.rl import Conversation, Episode, Reward, question_text, rollout

if TYPE_CHECKING:
    from nanochat.engine import Engine
    from nanochat.gpt import GPT
    from nanochat.tokenizer import Tokenizer


KINDS = ("family", "difficulty")  # keys of a conversation that say what kind of item it is


class EvalTask(Protocol):
    """The part of a task that evaluation needs."""

    @property
    def name(self) -> str: ...
    @property
    def baseline(self) -> float: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def reward(self, conversation: Any, text: str, *, format_reward: float = ...) -> Reward: ...
    def answer(self, conversation: Any, text: str) -> str | None: ...


@torch.no_grad()
def bits_per_byte(model: GPT, batches: Iterable[Any], token_bytes: Tensor, world: World) -> float:
    """Bits that the model needs per byte of text, whatever the vocabulary: nats / (bytes * ln 2), over all ranks.

    token_bytes (V,): bytes of each token, 0 for special tokens, which count in neither sum.
    """
    token_bytes = token_bytes.to(model.device)
    real = torch.float32 if model.device.type == "mps" else torch.float64
    nats = torch.zeros((), dtype=real, device=model.device)
    num_bytes = torch.zeros((), dtype=torch.int64, device=model.device)
    for batch in batches:
        batch = batch.to(model.device)
        sizes = token_bytes[batch.targets.clamp(min=0)] * (batch.targets >= 0)
        targets = torch.where(sizes > 0, batch.targets, -1)
        nats += model(batch.inputs, targets, segments=batch.segments, positions=batch.positions)
        num_bytes += sizes.sum()
    world.sum(nats)
    world.sum(num_bytes)
    if not num_bytes:
        raise UserError("bits per byte: the validation text is empty; give a validation shard or more tokens")
    return float(nats) / (float(num_bytes) * math.log(2))


def evaluate_generative(
    engine: Engine,
    tokenizer: Tokenizer,
    task: EvalTask,
    world: World,
    *,
    limit: int | None = None,
    num_samples: int = 1,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 42,
    batch_size: int = 64,
    forbid_first: Sequence[int] = (),
    num_shown: int = 4,
) -> Accuracy:
    """Let the model answer the first `limit` items and mark what it wrote; `batch_size` rows at a time on each rank."""
    if temperature == 0 and num_samples > 1:
        raise UserError(
            f"--num_samples={num_samples} greedy answers are all the same; give --temperature=1.0"
        )
    indices = range(_num_items(task, limit))[world.rank :: world.size]
    size = max(1, batch_size // num_samples)
    starts = range(0, len(indices), size)
    outcomes: list[Outcome] = []
    shown: list[dict[str, Any]] = []
    for start in progress(starts, total=len(starts), description=f"evaluating {task.name}"):
        questions = [(index, task[index]) for index in indices[start : start + size]]
        groups = rollout(
            engine,
            tokenizer,
            task,
            questions,
            num_samples=num_samples,
            seeds=[derive_seed("eval", seed, index) for index, _ in questions],
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            forbid_first=forbid_first,
        )
        outcomes += [_outcome(group) for group in groups]
        shown += [_shown(group[0]) for group in groups[: num_shown - len(shown)]]
    return Accuracy(
        task.name, "generative", _gathered(outcomes, world), task.baseline, temperature, tuple(shown)
    )


def evaluate_letters(
    model: GPT,
    tokenizer: Tokenizer,
    task: EvalTask,
    world: World,
    *,
    limit: int | None = None,
    token_budget: int = 8192,
    num_shown: int = 4,
) -> Accuracy:
    """The letter with the largest logit directly after the prompt and `Answer:`, for multiple choice."""
    cue = tokenizer.encode(CUE)
    indices = list(range(_num_items(task, limit))[world.rank :: world.size])
    outcomes: list[Outcome] = []
    for start in progress(
        range(0, len(indices), 256), total=-(-len(indices) // 256), description=f"letters {task.name}"
    ):
        conversations = [task[index] for index in indices[start : start + 256]]
        if not all(conversation.get("letters") for conversation in conversations):
            raise UserError(f"{task.name} has no letters to compare; use --mode=generative")
        prompts = [[*tokenizer.render_for_completion(c), *cue] for c in conversations]
        ids = [tokenizer.letter_ids(c["letters"]) for c in conversations]
        best = letter_logits(model, prompts, ids, token_budget=token_budget).argmax(-1).tolist()
        for index, conversation, place in zip(indices[start:], conversations, best, strict=False):
            outcomes.append(_letter_outcome(index, conversation, conversation["letters"][place]))
    return Accuracy(task.name, "letters", _gathered(outcomes, world), task.baseline)


@dataclass(frozen=True, slots=True)
class _Turned:
    """A task whose options are moved on by `turn` places."""

    task: Any
    turn: int
    name: str
    baseline: float

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Any:
        return self.task.problem(index).rotations()[self.turn].conversation()

    def reward(self, conversation: Any, text: str, *, format_reward: float = 0.1) -> Reward:
        reward: Reward = self.task.reward(conversation, text, format_reward=format_reward)
        return reward

    def answer(self, conversation: Any, text: str) -> str | None:
        letter: str | None = self.task.answer(conversation, text)
        return letter


def evaluate_rotations(
    engine: Engine,
    tokenizer: Tokenizer,
    task: EvalTask,
    world: World,
    *,
    num_rotations: int = 5,
    **settings: Any,
) -> Rotations:
    """`evaluate_generative`, greedy, on the first `num_rotations` cyclic orders of every item's options.

    Needs a task of problems: `task.problem(index).rotations()`, each with `.conversation()`. A problem whose options
    name each other by letter has only its own order, and counts as it is.
    """
    if not hasattr(task, "problem"):
        raise UserError(f"{task.name} has no options to rotate; leave --rotations out")
    if not 2 <= num_rotations <= 5:
        raise UserError(f"--rotations={num_rotations}: five options have 2 to 5 cyclic orders")
    turned = [
        _Turned(task, turn, f"{task.name} turned by {turn}", task.baseline) for turn in range(num_rotations)
    ]
    results = [evaluate_generative(engine, tokenizer, one, world, **settings) for one in turned]
    return Rotations(task.name, tuple(dataclasses.replace(result, shown=()) for result in results))


def _num_items(task: EvalTask, limit: int | None) -> int:
    count = len(task) if limit is None or limit < 0 else min(limit, len(task))
    if count == 0:
        raise UserError(f"{task.name}: there is nothing to evaluate; check its split and --max_problems")
    return count


def _gathered(outcomes: list[Outcome], world: World) -> tuple[Outcome, ...]:
    everything = [outcome for rank in world.gather(outcomes) for outcome in rank]
    return tuple(sorted(everything, key=lambda outcome: outcome.index))


def _option(conversation: Conversation, letter: str | None) -> str | None:
    options = conversation.get("options")
    return options[list(conversation["letters"]).index(letter)] if options and letter is not None else None


def _outcome(group: Sequence[Episode]) -> Outcome:
    conversation = group[0].conversation
    return Outcome(
        index=group[0].question,
        gold=group[0].gold,
        letters=tuple(e.letter for e in group),
        options=tuple(_option(conversation, e.letter) for e in group),
        correct=tuple(bool(e.reward.correct) for e in group),
        truncated=tuple(e.completion.truncated for e in group),
        num_options=len(conversation.get("letters", ())),
        about=_about(conversation),
    )


def _letter_outcome(index: int, conversation: Conversation, letter: str) -> Outcome:
    gold = conversation["answer_letter"]
    option = _option(conversation, letter)
    correct, count = letter == gold, len(conversation["letters"])
    return Outcome(index, gold, (letter,), (option,), (correct,), (False,), count, _about(conversation))


def _about(conversation: Conversation) -> tuple[tuple[str, Any], ...]:
    return tuple((name, conversation[name]) for name in KINDS if name in conversation)


def _shown(episode: Episode) -> dict[str, Any]:
    return {
        "question": question_text(episode.conversation),
        "completion": episode.text,
        "predicted": episode.letter,
        "gold": episode.gold,
        "correct": bool(episode.reward.correct),
    }

"""
The two sides of benchmarks.rl_step: a step as scripts.chat_rl makes it, and the loop that one writes first.

The reference is nanochat's loop: one question at a time, eight rows a call; every completion, of dead groups too, goes
through the model with its prompt, eight padded rows a pass, the head on every position and all logits held at once; torch's
AdamW. Both have the same weights, prompts, rewards, threads and dtype.

Who is right is drawn by lot from the completion's text, since random weights answer nothing; marking costs what it costs.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import rollout
from benchmarks.rollout import HashedPieces, make_model, plain_generate, synchronize
from nanochat.common import UserError, World, compute_init
from nanochat.engine import Completion, Engine
from nanochat.gpt import GPT
from nanochat.optim import make_adamw
from nanochat.policy_gradient import Objective, loss_normalizer, update_policy
from nanochat.rl import Episode, Group, mark, with_advantages
from nanochat.rl import rollout as sample_groups
from nanochat.shared_prefix import tokens_of_rows
from tasks.aqua import AQUA
from tasks.rows import DataUnavailable
from tasks.synthetic import Synthetic

LEARNING_RATE, MAX_GRAD_NORM = 3e-5, 1.0
SIDES = ("ours", "reference")
PHASES = ("rollout", "reward", "forward and backward", "optimizer")


@dataclass(frozen=True)
class Workload(rollout.Config):
    """What there is to do in a step."""

    dead: float = 0.0
    """share of the questions whose completions are all wrong"""
    stop_chance: float = 0.0
    """chance of a stop token at every token; 0.02 makes rows 36 tokens long on average"""

    def __post_init__(self) -> None:
        if not 0 <= self.dead <= 1:
            raise UserError(f"--dead={self.dead} is a share of the questions; use 0 to 1")


@dataclass
class Watch:
    """Seconds of each phase; a phase within another stops the outer one's clock."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    running: list[str] = field(default_factory=list)
    since: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._settle()
        self.running.append(name)
        try:
            yield
        finally:
            self._settle()
            self.running.pop()

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as a phase."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed

    def _settle(self) -> None:
        synchronize()
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.since
        self.since = now


class Lottery:
    """A task whose right answers are drawn by lot, one in two; of its `num_dead` last questions, none."""

    def __init__(self, task: AQUA | Synthetic, size: int, num_dead: int) -> None:
        self.task, self.conversations = task, [task[index] for index in range(size)]
        self.dead = {id(conversation) for conversation in self.conversations[size - num_dead :]}

    @classmethod
    def open(cls, config: Workload) -> Lottery:
        try:
            task: AQUA | Synthetic = AQUA("validation")
        except DataUnavailable:
            task = Synthetic("validation")
        return cls(task, config.questions, round(config.dead * config.questions))

    def answer(self, conversation: Any, text: str) -> str | None:
        return self.task.answer(conversation, text)

    def reward(self, conversation: Any, text: str, *, format_reward: float = 0.1) -> Any:
        honest = self.task.reward(conversation, text, format_reward=format_reward)
        lucky = zlib.crc32(text.encode()) % 2 and id(conversation) not in self.dead
        return dataclasses.replace(honest, correct=float(lucky))


class Pieces(HashedPieces):
    """The tokenizer, as far as rollouts need it."""

    def render_for_completion(self, conversation: Any) -> list[int]:
        return self.prompt(str(conversation["messages"][0]["content"]))


@dataclass(frozen=True)
class Bench:
    """What both sides share."""

    config: Workload
    world: World
    task: Lottery
    tokenizer: Pieces
    prompts: list[list[int]]

    @classmethod
    def open(cls, config: Workload) -> Bench:
        world = compute_init(config.device_type, config.dtype, config.seed)
        task, tokenizer = Lottery.open(config), Pieces(config.vocab_size)
        prompts = [tokenizer.render_for_completion(conversation) for conversation in task.conversations]
        return cls(config, world, task, tokenizer, prompts)

    def model(self, depth: int) -> GPT:
        model = make_model(depth, self.config, self.prompts, self.world)
        with torch.no_grad():
            rollout.set_stop_chance(model, self.tokenizer, self.prompts, self.config.stop_chance)
        return model.requires_grad_(True)


class Ours:
    """A step as scripts.chat_rl makes it."""

    def __init__(self, bench: Bench, depth: int) -> None:
        self.bench, self.model, self.watch = bench, bench.model(depth), Watch()
        self.engine = Engine(self.model, bench.tokenizer)  # type: ignore[arg-type]
        self.optimizer = make_adamw(self.model, lr=LEARNING_RATE, world=bench.world)

    def sample(self, step: int) -> list[Group]:
        config, bench = self.bench.config, self.bench
        generate = self.watch.timing("rollout", self.engine.generate)

        def uncut(*args: Any, **kwargs: Any) -> list[list[Completion]]:
            """As if every completion had ended by itself: one that was cut earns nothing, and its group would be dead."""
            groups = generate(*args, **kwargs)
            return [[dataclasses.replace(one, truncated=False) for one in group] for group in groups]

        with self.watch.phase("reward"):
            groups = sample_groups(
                SimpleNamespace(generate=uncut),  # type: ignore[arg-type]
                bench.tokenizer,  # type: ignore[arg-type]
                bench.task,
                list(enumerate(bench.task.conversations)),
                num_samples=config.samples,
                seeds=range(step * config.questions, (step + 1) * config.questions),
                max_tokens=config.max_tokens,
                use_tools=False,
            )
            return with_advantages(groups)

    def update(self, groups: Sequence[Group]) -> tuple[float, float]:
        """Loss and gradient norm."""
        optimizer = self.optimizer
        for name in ("grad_norm", "step", "zero_grad"):
            timed = self.watch.timing("optimizer", getattr(type(optimizer), name).__get__(optimizer))
            setattr(optimizer, name, timed)
        with self.watch.phase("forward and backward"):
            self.engine.release()
            found = update_policy(
                self.model,
                optimizer,
                groups,
                objective=Objective(max_completion_tokens=self.bench.config.max_tokens),
                world=self.bench.world,
                token_budget=tokens_of_rows(groups, self.bench.config.rows_per_call),
                max_grad_norm=MAX_GRAD_NORM,
            )
        return found["train/loss"], found["train/grad_norm"]


class Reference:
    """The same step, one question and eight rows at a time."""

    def __init__(self, bench: Bench, depth: int) -> None:
        self.bench, self.model, self.watch = bench, bench.model(depth), Watch()
        weights = self.model.parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def sample(self, step: int) -> list[Group]:
        """Of every `reference_stride`-th question, others in the next step."""
        bench, groups = self.bench, []
        stop = bench.tokenizer.special("assistant_end")
        stride = bench.config.reference_stride
        for number in range(step % stride, len(bench.prompts), stride):
            conversation, prompt = bench.task.conversations[number], bench.prompts[number]
            with self.watch.phase("rollout"):
                [drawn] = plain_generate(self.model, [prompt], bench.config.samples, bench.config, 1.0)
            with self.watch.phase("reward"):
                groups.append(
                    [
                        self._episode(number, sample, conversation, ids[: rollout.useful(ids, stop)])
                        for sample, ids in enumerate(drawn)
                    ]
                )
        return with_advantages(groups)

    def _episode(self, number: int, sample: int, conversation: Any, ids: list[int]) -> Episode:
        completion = Completion(ids, [0.0] * len(ids), [1] * len(ids), truncated=False)
        fields = mark(self.bench.task, self.bench.tokenizer, conversation, completion)  # type: ignore[arg-type]
        return Episode(number, sample, conversation, tuple(self.bench.prompts[number]), completion, *fields)

    def update(self, groups: Sequence[Group]) -> tuple[float, float]:
        """Loss and gradient norm."""
        normalizer = loss_normalizer(groups, Objective(), self.bench.world)
        loss = 0.0
        with self.watch.phase("forward and backward"):
            for group in groups:
                for start in range(0, len(group), self.bench.config.rows_per_call):
                    loss += self._backward(group[start : start + self.bench.config.rows_per_call], normalizer)
        with self.watch.phase("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss, norm.item()

    def _backward(self, episodes: Sequence[Episode], normalizer: float) -> float:
        rows = [[*e.prompt_ids, *e.completion.ids] for e in episodes]
        width, device = max(map(len, rows)), self.bench.world.device
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        targets = ids[:, 1:].clone()
        for target, episode, row in zip(targets, episodes, rows, strict=True):
            target[: len(episode.prompt_ids) - 1] = -1
            target[len(row) - 1 :] = -1
        logits = self.model.logits(self.model.hidden(ids[:, :-1]))  # (8, T, V)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        advantages = torch.tensor([e.advantage for e in episodes], device=device)
        loss = (nll.view_as(targets) * advantages[:, None]).sum() / normalizer
        loss.backward()
        return loss.item()


Side = Ours | Reference


def make_side(name: str, bench: Bench, depth: int) -> Side:
    return Ours(bench, depth) if name == "ours" else Reference(bench, depth)

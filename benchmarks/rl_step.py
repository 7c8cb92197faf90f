"""
A step of reinforcement learning: ours against the loop that one writes first, phase by phase, in time and memory.

    python -m benchmarks.rl_step                              # 16 questions x 16 samples x 64 tokens, depth 4
    python -m benchmarks.rl_step --dead=0.5                   # half of the questions teach nothing
    OMP_NUM_THREADS=1 python -m benchmarks.rl_step --repeats 3

The reference is nanochat's loop: one question at a time, eight rows a call; every completion, of dead groups too, goes
through the model with its prompt, eight padded rows a pass, the head on every position and all logits held at once; torch's
AdamW. Ours is what scripts.chat_rl calls. Both have the same weights, prompts, rewards, threads and dtype and take turns.
The reference does a quarter of the questions in a turn, and what they took counts four times, its single optimizer step
apart. First both are given the same episodes: loss and gradient norm must agree before anything is timed.

Who is right is drawn by lot from the completion's text, since random weights answer nothing; marking costs what it costs.
`dead` questions are all wrong. Memory is that of processes of their own, which make one step each: the highest of the
whole process, and what the step needs beyond the model and its optimizer.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import rollout as rollout_benchmark
from benchmarks.rollout import (
    HashedPieces,
    describe,
    make_model,
    plain_generate,
    say_what_is_skipped,
    synchronize,
)
from benchmarks.train import memory_mb
from nanochat.common import UserError, World, compute_init
from nanochat.config import cli
from nanochat.engine import Completion, Engine
from nanochat.gpt import GPT
from nanochat.optim import make_adamw
from nanochat.policy_gradient import Objective, loss_normalizer, update_policy
from nanochat.rl import Episode, Group, is_live, mark, rollout, with_advantages
from nanochat.shared_prefix import tokens_of_rows
from tasks.aqua import AQUA
from tasks.rows import DataUnavailable
from tasks.synthetic import Synthetic

LEARNING_RATE, MAX_GRAD_NORM = 3e-5, 1.0
SIDES = ("ours", "reference")
PHASES = ("rollout", "reward", "forward and backward", "optimizer")


@dataclass(frozen=True)
class Config(rollout_benchmark.Config):
    """Compare a step of reinforcement learning with the plain loop's."""

    depths: str = "4"
    """depths of the models, with commas"""
    dead: float = 0.0
    """share of the questions whose completions are all wrong"""
    stop_chance: float = 0.0
    """chance of a stop token at every token; 0.02 makes rows 36 tokens long on average"""
    memory: bool = True
    """measure memory too, in processes of their own"""
    child: str = ""
    """(for the processes that this one starts)"""

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
    def open(cls, config: Config) -> Lottery:
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

    config: Config
    world: World
    task: Lottery
    tokenizer: Pieces
    prompts: list[list[int]]

    @classmethod
    def open(cls, config: Config) -> Bench:
        world = compute_init(config.device_type, config.dtype, config.seed)
        task, tokenizer = Lottery.open(config), Pieces(config.vocab_size)
        prompts = [tokenizer.render_for_completion(conversation) for conversation in task.conversations]
        return cls(config, world, task, tokenizer, prompts)

    def model(self, depth: int) -> GPT:
        model = make_model(depth, self.config, self.prompts, self.world)
        with torch.no_grad():
            rollout_benchmark.set_stop_chance(model, self.tokenizer, self.prompts, self.config.stop_chance)
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
            groups = rollout(
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
                        self._episode(
                            number, sample, conversation, ids[: rollout_benchmark.useful(ids, stop)]
                        )
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


def check_agreement(sides: dict[str, Side], tolerance: float) -> None:
    """Loss and gradient norm of the same episodes on both sides; they warm up as well."""
    groups = sides["ours"].sample(0)[:4]
    found = {name: side.update(groups) for name, side in sides.items()}
    torch.testing.assert_close(
        torch.tensor(found["ours"]), torch.tensor(found["reference"]), rtol=tolerance, atol=1e-6,
        msg=f"the sides learn different things: (loss, gradient norm) {found}",
    )  # fmt: skip


def timed(side: Side, step: int) -> dict[str, float]:
    """Seconds of the phases of one step, and how much of it there was."""
    side.watch = Watch()
    groups = side.sample(step)
    side.update(groups)
    tokens = sum(e.num_tokens for group in groups for e in group)
    found = {**side.watch.seconds, "tokens": tokens, "live": sum(map(is_live, groups))}
    missing = side.bench.config.questions / len(groups)  # of the reference, whose work is that of a question
    return {name: value if name == "optimizer" else value * missing for name, value in found.items()}


def measure(depth: int, bench: Bench) -> list[dict[str, Any]]:
    """A row of medians for each side."""
    sides = {name: make_side(name, bench, depth) for name in SIDES}
    check_agreement(sides, 1e-3 if bench.world.dtype == torch.float32 else 5e-2)
    turns = [
        {name: timed(side, step) for name, side in sides.items()}
        for step in range(1, bench.config.repeats + 1)
    ]
    rows = []
    for name in SIDES:
        own = [turn[name] for turn in turns]
        seconds = [sum(turn[phase] for phase in PHASES) for turn in own]
        theirs = [sum(turn["reference"][phase] for phase in PHASES) for turn in turns]
        row: dict[str, Any] = {"depth": depth, "side": name, "seconds": statistics.median(seconds)}
        row["ratio"] = statistics.median(b / a for a, b in zip(seconds, theirs, strict=True))
        row |= {key: statistics.median(turn[key] for turn in own) for key in (*PHASES, "tokens", "live")}
        rows.append(row)
    return rows


def memory_of_one_step(config: Config) -> dict[str, float]:
    """In a child: the peak of the process, and that of the step beyond what stood before it; MB."""
    bench = Bench.open(config)
    side = make_side(config.child, bench, int(config.depths))
    held = memory_mb(bench.world, peak=False)
    if bench.world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (forget := Path("/proc/self/clear_refs")).exists():
        forget.write_text("5")
    side.update(side.sample(0))
    peak = memory_mb(bench.world, peak=True)
    return {"peak_mb": peak, "step_mb": peak - held}


def child(name: str, config: Config, depth: int) -> dict[str, float]:
    """memory_of_one_step in a process of its own."""
    settings = dataclasses.replace(config, child=name, depths=str(depth))
    flags = [f"--{key}={value}" for key, value in dataclasses.asdict(settings).items()]
    words = [sys.executable, "-m", "benchmarks.rl_step", *flags]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(row: dict[str, Any]) -> None:
    shares = "".join(f"{row[phase] / row['seconds']:>{max(8, len(phase) + 2)}.0%}" for phase in PHASES)
    memory = f"{row['peak_mb']:>9,.0f}{row['step_mb']:>9,.0f}" if "peak_mb" in row else ""
    print(
        f"{row['depth']:>5} {row['side']:>10}{row['seconds']:>9.2f}{row['ratio']:>7.2f}{shares}{memory}",
        flush=True,
    )


def main(config: Config) -> None:
    """Measure every depth, print a table and one JSON line."""
    if config.child:
        print(json.dumps(memory_of_one_step(config)))
        return
    bench = Bench.open(config)
    say_what_is_skipped(bench.world)
    lengths = sorted(map(len, bench.prompts))
    print(
        f"{config.questions} questions x {config.samples} samples x {config.max_tokens} tokens, prompts of {lengths[0]} "
        f"to {lengths[-1]} tokens from {bench.task.task.source}, {config.dead:.0%} of the questions dead"
    )
    phases = "".join(f"{phase:>{max(8, len(phase) + 2)}}" for phase in PHASES)
    print(
        f"{'depth':>5} {'step':>10}{'seconds':>9}{'ratio':>7}{phases}"
        + config.memory * f"{'peak MB':>9}{'step MB':>9}"
    )
    results = []
    for depth in map(int, config.depths.split(",")):
        for row in measure(depth, bench):
            if config.memory:
                row |= child(row["side"], config, depth)
            show(row)
            results.append(row)
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "child"}
    print(json.dumps({"benchmark": "rl_step", **settings, **describe(bench.world), "results": results}))


if __name__ == "__main__":
    main(cli(Config))

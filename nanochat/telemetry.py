"""
What reinforcement learning does to the policy, seen from inside, every so many steps.

A fixed probe (the same validation questions, answered anew by the policy of the moment) beside the questions of the step:
the probe's curves show the policy changing, not the questions. What is measured stands in nanochat/letters.py and
nanochat/attention.py; here it is decided on what, and where it is written.

The main rank alone measures, since the numbers describe the policy and all ranks hold the same; the others wait for it at
the next update, so the cadence, not the cleverness, keeps the cost down.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.accuracy import with_interval
from nanochat.attention import attention_html, attention_telemetry, heatmap_png, treescope_package
from nanochat.common import World, derive_seed
from nanochat.engine import Engine
from nanochat.evaluate import evaluate_generative, evaluate_letters, evaluate_rotations
from nanochat.gpt import GPT
from nanochat.letters import KLMode, letter_telemetry
from nanochat.rl import Conversation, Episode, Group, RewardTask, rollout, sample_rows
from nanochat.tracking import Tracker


def due(step: int, every: int, num_steps: int) -> bool:
    """Every so many steps, and at the last; `every` of 0 or less means never."""
    return every > 0 and (step % every == 0 or step == num_steps)


def frozen_copy(model: GPT) -> GPT:
    """The reference policy: the model as it is now, for ever."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What is watched, how, and where it is written."""

    engine: Engine
    reference: GPT | None
    task: RewardTask
    probe: Sequence[tuple[int, Conversation]]
    """(number, conversation) of the fixed questions"""
    tracker: Tracker
    mode: KLMode
    temperature: float
    max_tokens: int
    seed: int
    kl_every: int
    """steps between looks at letters and KL; -1: never"""
    attn_every: int
    """and at attention"""
    html: bool = False
    """also write treescope's view of the attention maps"""

    @classmethod
    def of(
        cls, config: Any, *, engine: Engine, reference: GPT | None, task: Any, tracker: Tracker
    ) -> Telemetry:
        """As the flags of the RL stage say, on the first --kl_batch questions of `task`."""
        if config.attn_html:
            treescope_package()  # where it is missing that is told now, not at the first look
        return cls(
            engine=engine,
            reference=reference,
            task=task,
            probe=[(number, task[number]) for number in range(min(config.kl_batch, len(task)))],
            tracker=tracker,
            mode=config.kl_mode,
            temperature=config.temperature,
            max_tokens=config.max_new_tokens,
            seed=config.seed,
            kl_every=config.kl_every,
            attn_every=config.attn_every,
            html=config.attn_html,
        )

    def look(self, step: int, groups: Sequence[Group], num_steps: int) -> dict[str, Any]:
        """What is due at `step` and, to compare with, at the first; the probe is answered once for both."""
        letters, attention = (
            due(step, every, num_steps) or (step == 1 and every > 0)
            for every in (self.kl_every, self.attn_every)
        )
        answers = self.answer_probe() if letters or attention else []
        metrics: dict[str, Any] = {}
        if letters:
            metrics |= self.letters(step, answers, groups)
        if attention:
            metrics |= self.attention(step, answers)
        return metrics

    def letters(self, step: int, answers: Sequence[Episode], groups: Sequence[Group]) -> dict[str, Any]:
        """KL, margins and letters on the probe and on one episode of each of the step's first questions."""
        current = [group[0] for group in groups[: len(self.probe)]]
        report = letter_telemetry(
            self.engine.model,
            self.reference,
            self.engine.tokenizer,
            [*answers, *current],
            mode=self.mode,
            temperature=self.temperature,
        )
        self.tracker.table("rl/hardest", step, report.hardest)
        self.tracker.table("rl/samples", step, sample_rows(groups))
        return dict(report.metrics)

    def attention(self, step: int, answers: Sequence[Episode]) -> dict[str, Any]:
        """Entropies, masses and maps of attention on the probe."""
        report = attention_telemetry(self.engine.model, self.engine.tokenizer, answers)
        self.tracker.table("attn/heads", step, report.heads)
        for layer, maps in report.maps.items():
            picture = heatmap_png(maps, report.tokens, title=f"layer {layer}, step {step}")
            self.tracker.image(f"attn/map/{layer}", step, picture)
        if self.html:
            self.tracker.html("attn/view", step, attention_html(report.maps, report.tokens).encode())
        return dict(report.metrics)

    def answer_probe(self) -> list[Episode]:
        """One completion of every probe question by the policy of the moment, always with the same random numbers."""
        groups = rollout(
            self.engine,
            self.engine.tokenizer,
            self.task,
            self.probe,
            num_samples=1,
            seeds=[derive_seed("probe", self.seed, number) for number, _ in self.probe],
            max_tokens=self.max_tokens,
            temperature=self.temperature,
        )
        return [group[0] for group in groups]


def validation_metrics(
    engine: Engine, task: Any, world: World, *, limit: int, num_samples: int, max_tokens: int, seed: int
) -> dict[str, float]:
    """Held-out accuracy, greedy; by the letters' logits alone; sampled, for pass@k and maj@k; and over option orders.

    All with intervals. What a task does not have (letters, options to turn) is left out.
    """
    settings: dict[str, Any] = {"limit": limit, "max_tokens": max_tokens, "seed": seed, "batch_size": 512}
    name, tokenizer = f"eval/{task.name.lower()}_dev_acc", engine.tokenizer
    greedy = evaluate_generative(engine, tokenizer, task, world, **settings)
    metrics = with_interval(name, greedy.value, greedy.n)
    if greedy.majority is not None:
        metrics["eval/majority"] = greedy.majority[1]
        letters = evaluate_letters(engine.model, tokenizer, task, world, limit=limit)
        metrics |= with_interval("eval/letter_acc", letters.value, letters.n)
    if num_samples > 0:
        sampled = evaluate_generative(
            engine, tokenizer, task, world, num_samples=num_samples, temperature=1.0, **settings
        )
        metrics |= sampled.metrics()
        if hasattr(task, "problem"):
            metrics |= evaluate_rotations(engine, tokenizer, task, world, **settings).metrics()
    return metrics


def step_line(step: int, num_steps: int, metrics: dict[str, Any]) -> str:
    """What a person wants to see of a step."""
    names = {
        "rl/acc": "acc",
        "rl/mean_reward": "reward",
        "rl/live_groups": "live",
        "rl/avg_completion_len": "tokens",
    }
    shown = [f"{word} {metrics[name]:.3g}" for name, word in names.items() if name in metrics]
    for name, value in metrics.items():
        if name.endswith("_dev_acc"):
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            shown.append(f"{name.removeprefix('eval/')} {value:.1%} ({low:.1%} to {high:.1%})")
    shown += [f"{metrics['time/step_seconds']:.1f} s"] if "time/step_seconds" in metrics else []
    return f"rl {step:5,}/{num_steps:,} · " + " · ".join(shown)


class Clock:
    """Where the seconds of a step go."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase; the next begins."""
        now = time.perf_counter()
        self._seconds[phase], self._last = now - self._last, now

    def metrics(self, groups: Sequence[Group], world: World) -> dict[str, float]:
        """Seconds of each phase and tokens per second over all ranks. A collective."""
        tokens = sum(world.gather(sum(e.num_tokens for group in groups for e in group)))
        metrics = {f"time/{phase}_seconds": seconds for phase, seconds in self._seconds.items()}
        metrics["time/step_seconds"] = time.perf_counter() - self._began
        for phase in ("rollout", "train"):
            metrics[f"perf/{phase}_tokens_per_second"] = tokens / max(1e-9, self._seconds[phase])
        return metrics

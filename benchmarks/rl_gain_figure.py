"""The picture of `benchmarks.rl_gain`: what RL and its control do while they train, and what comes of it on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.figures import COLORS, running_mean, series
from nanochat.rl_gain import BARE, SFT, Gain
from nanochat.run_files import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RL, BY_LOT = COLORS[0], "#999999"
CURVES = (
    ("rl", RL, "RL"),
    ("rl_random", BY_LOT, "control: rewards drawn by lot"),
)  # fmt: skip
REACH = 4  # steps on either side that a point is the mean of
HELD_OUT = (SFT, "chat_eval_rl", BARE)
LABELS = ("SFT", "RL", "SFT that\nmust work")


def draw(gains: Sequence[Gain], runs: Sequence[Path], path: Path) -> None:
    """Draw the seeds in `runs`, whose outcomes are `gains`, into the SVG `path`."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "rl_gain", "font.size": 9}):
        figure, (accuracy, length, held_out) = pyplot.subplots(
            1, 3, figsize=(10, 3.1), layout="constrained", facecolor="white"
        )
        draw_training(accuracy, runs, "rl/acc", "right answers in training, %", 100)
        draw_training(length, runs, "rl/avg_completion_len", "tokens of an answer", 1)
        accuracy.set_ylim(0, 100)
        accuracy.legend(frameon=False, loc="upper left")
        draw_held_out(held_out, gains)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def draw_training(axis: Axes, runs: Sequence[Path], name: str, title: str, scale: float) -> None:
    """One metric of all seeds, of RL and of its control; a line is the mean of nine steps."""
    for stage, color, label in CURVES:
        for seed, run in enumerate(runs):
            steps, values = series(read_metrics(run / stage / "metrics.jsonl"), name)
            smooth = running_mean([scale * value for value in values], REACH)
            axis.plot(steps, smooth, color=color, alpha=0.85, linewidth=1.4, label=None if seed else label)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("step of RL")
    _tidy(axis)


def draw_held_out(axis: Axes, gains: Sequence[Gain]) -> None:
    """Accuracy with its 95 % interval before, after, and of the control; a line joins what one seed came to."""
    for seed, gain in enumerate(gains):
        there = [place for place, stage in enumerate(HELD_OUT) if stage in gain.asked]
        values = [gain.asked[HELD_OUT[place]].value for place in there]
        bounds = [gain.asked[HELD_OUT[place]].interval for place in there]
        spread = [
            [100 * (v - low) for v, (low, _) in zip(values, bounds, strict=True)],
            [100 * (high - v) for v, (_, high) in zip(values, bounds, strict=True)],
        ]
        at = [place + 0.09 * (seed - (len(gains) - 1) / 2) for place in there]
        percents = [100 * value for value in values]
        axis.errorbar(at, percents, spread, fmt="o", color=RL, markersize=4, elinewidth=1)
        axis.plot(at[:2], percents[:2], color=RL, alpha=0.4, linewidth=1)
    majority = 100 * max(gain.asked[SFT].majority for gain in gains)
    axis.axhline(majority, color=BY_LOT, linewidth=1, linestyle=(0, (4, 3)))
    axis.annotate(
        "always the commonest letter", (2.3, majority + 1.5), color="#777777", fontsize=7.5, ha="right"
    )
    axis.set_xticks(range(len(LABELS)), LABELS)
    axis.set_ylim(0, 100)
    axis.set_title("right answers on held-out problems, %", fontsize=9)
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    axis.grid(alpha=0.25, axis="y")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)

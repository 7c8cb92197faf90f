"""
Learning curves as small PNG pictures for the report.

What is drawn is a table: panels of each stage, curves of each panel. A panel without data is left out, so a stage that
logs less gets a smaller picture. Noisy curves stand faintly behind their running mean. Colours are Okabe and Ito's,
which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
MAX_POINTS = 2000
SMOOTH_FROM = 40  # curves with fewer points are drawn as they are

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: its title, its curves (metric -> label), and how the numbers are to be read."""

    title: str
    curves: Mapping[str, str]
    percent: bool = False
    from_zero: bool = False
    stacked: bool = False
    levels: bool = False
    """Whether the levels to beat are drawn here."""


ACCURACIES = {
    "eval/aqua_dev_acc": "AQuA validation",
    "eval/synthetic_dev_acc": "synthetic validation",
    "eval/gsm8k_dev_acc": "GSM8K validation",
}
SUPERVISED = (
    Panel(
        "Loss",
        {
            "train/loss": "training",
            "val/loss_aqua": "AQuA",
            "val/loss_programs": "programs",
            "val/loss_synthetic": "synthetic",
        },
    ),
    Panel("Validation, bits per byte", {"val/bpb": ""}),
    Panel("Gradient norm", {"train/grad_norm": ""}, from_zero=True),
    Panel("Tokens per second", {"perf/tokens_per_second": ""}, from_zero=True),
)
RL = (
    Panel("Accuracy", {"rl/acc": "sampled", **ACCURACIES}, percent=True, levels=True),
    Panel("Reward", {"rl/mean_reward": "mean", "rl/reward_std": "standard deviation"}),
    Panel(
        "Groups",
        {"rl/frac_groups_all_right": "all right", "rl/frac_groups_all_wrong": "all wrong"},
        percent=True,
        from_zero=True,
    ),
    Panel(
        "Completion length, tokens",
        {
            "rl/avg_completion_len": "all",
            "rl/completion_len_solved": "right",
            "rl/completion_len_unsolved": "wrong",
        },
    ),
    Panel(
        "Well-formed, truncated",
        {"rl/format_rate": "well-formed", "rl/truncated_rate": "truncated"},
        percent=True,
    ),
    Panel("Entropy per token, nats", {"rl/token_entropy": ""}, from_zero=True),
    Panel("KL to the start, nats", {"rl/kl_letter_mean": "letters", "rl/kl_sequence_mean": "per token"}),
    Panel("Margin between two best letters", {"rl/letter_margin_mean": ""}),
    Panel(
        "Predicted letters", {f"rl/letter_pred_counts/{letter}": letter for letter in "ABCDE"}, stacked=True
    ),
    Panel("Attention entropy, nats", {"attn/entropy_mean": ""}),
    Panel("Gradient norm", {"train/grad_norm": ""}, from_zero=True),
    Panel(
        "Seconds of a step",
        {
            "time/rollout_seconds": "rollout",
            "time/train_seconds": "training",
            "time/telemetry_seconds": "telemetry",
        },
        from_zero=True,
    ),
)
PANELS: dict[str, tuple[Panel, ...]] = {"base": SUPERVISED, "mid": SUPERVISED, "sft": SUPERVISED, "rl": RL}


def panels_of(stage: str) -> tuple[Panel, ...]:
    """The panels of a stage, the same for its controls: those of rl for rl_random."""
    return PANELS.get(stage.partition("_")[0], ())


def series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the metric `name`, thinned to what a small picture can show."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    kept = points[::stride] + ([points[-1]] if points and (len(points) - 1) % stride else [])
    return [float(step) for step, _ in kept], [float(value) for _, value in kept]


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and of up to `reach` on either side; what is not finite is left out."""
    result = []
    for centre in range(len(values)):
        near = [
            value for value in values[max(0, centre - reach) : centre + reach + 1] if math.isfinite(value)
        ]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def learning_curves(stage: str, rows: Rows, path: Path, *, levels: Mapping[str, float] | None = None) -> bool:
    """
    Draw the panels of `stage` that have data into the PNG `path`; False when there is nothing to draw.

    `levels` are horizontal lines for accuracies, such as {"AQuA, majority letter": 0.272}.
    """
    panels = [p for p in panels_of(stage) if any(len(series(rows, name)[0]) > 1 for name in p.curves)]
    if not panels:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.5 * columns, 2.45 * lines), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, panel in zip(axes, panels, strict=False):
        if panel.stacked:
            _draw_shares(ax, panel, rows)
        else:
            _draw_lines(ax, panel, rows, (levels or {}) if panel.levels else {})
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _draw_lines(ax: Axes, panel: Panel, rows: Rows, levels: Mapping[str, float]) -> None:
    """Curves, each with its noise behind it, and the levels to beat."""
    for color, (name, label) in zip(COLORS, panel.curves.items(), strict=False):
        steps, values = series(rows, name)
        if len(steps) < 2:
            continue
        if len(values) >= SMOOTH_FROM:
            ax.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
            values = running_mean(values, max(1, len(values) // 25))
        marker = "o" if len(values) <= 12 else None
        ax.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=3.2, label=label or None)
    for label, value in levels.items():
        ax.axhline(value, color="#999999", linewidth=1.0, linestyle=(0, (4, 3)))
        at = (0.99, value)
        ax.annotate(
            label,
            at,
            xycoords=("axes fraction", "data"),
            fontsize=7,
            color="#777777",
            ha="right",
            va="bottom",
        )
    if panel.from_zero:
        ax.set_ylim(0, 1.04 * ax.get_ylim()[1])  # room above for a level curve's markers
    _finish(ax, panel, percent=panel.percent)
    if len(ax.get_legend_handles_labels()[0]) > 1:
        legend = ax.legend(fontsize=7.5, loc="best", handlelength=1.6, labelcolor="#333333", framealpha=0.75)
        legend.get_frame().set_linewidth(0)


def _draw_shares(ax: Axes, panel: Panel, rows: Rows) -> None:
    """Shares of a whole, one above the other, each with its label at the right edge."""
    names = list(panel.curves)
    there = [row for row in rows if any(isinstance(row.get(name), int | float) for name in names)]
    totals = [sum(row.get(name) or 0 for name in names) or 1 for row in there]
    shares = [
        [(row.get(name) or 0) / total for row, total in zip(there, totals, strict=True)] for name in names
    ]
    ax.stackplot(
        [row["step"] for row in there], shares, colors=COLORS, alpha=0.8, edgecolor="white", linewidth=0.6
    )
    below = 0.0
    for label, share in zip(panel.curves.values(), shares, strict=True):
        if share[-1] > 0.04:
            ax.annotate(
                label, (1.02, below + share[-1] / 2), xycoords="axes fraction", fontsize=8, va="center"
            )
        below += share[-1]
    ax.set_ylim(0, 1)
    _finish(ax, panel, percent=True)
    ax.margins(x=0)


def _finish(ax: Axes, panel: Panel, *, percent: bool) -> None:
    """Title and axes in the report's style."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold", color="#222222")
    ax.set_xlabel("step", fontsize=8, color="#555555")
    ax.tick_params(labelsize=8, colors="#555555", length=2.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#bbbbbb")
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.margins(x=0.02)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    if percent:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))

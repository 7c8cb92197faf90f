"""
How time grows: rollouts with rows and context, training with depth, the tokenizer with its corpus.

    python -m benchmarks.growth                               # all tables and docs/growth.svg
    python -m benchmarks.growth --parts rollout --rows 1,16,256
    python -m benchmarks.growth --figure ""                   # draw nothing

Rollouts: a depth-4 model; `rows` rows (16 to a question) after prompts of 128 tokens, and 64 rows after prompts of each
context; time per sampled token, prefill included. Training: one step of `batch_tokens` tokens for each depth. Tokenizer:
training on each number of megabytes of text, over and over where there are fewer. All are medians, of our side alone:
the peers stand in the benchmarks of the same names.

The exponents at the end say how the time of one unit of work grows: as the power of x that fits best. For the tokenizer
it is the time of the whole, which the merges keep from being proportional to the text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import rollout, tokenizer, train
from nanochat.common import UserError, World, compute_init
from nanochat.config import cli
from nanochat.engine import Engine
from nanochat.provenance import provenance

ROWS_PER_QUESTION, CONTEXT_ROWS, ROWS_CONTEXT = 16, 64, 128
AXES = {
    "rows": "rows in a batch",
    "context": "tokens of the prompt",
    "train": "depth",
    "tokenizer": "MB of text",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Measure how time grows."""

    parts: str = "rollout,train,tokenizer"
    """what to measure, with commas between"""
    rows: str = "1,4,16,64,256,1024"
    """rows of a batch of rollouts"""
    contexts: str = "128,256,512,1024,2048"
    """tokens of the prompts"""
    depths: str = "2,4,6,8,10,12"
    """depths of the models that are trained"""
    megabytes: str = "5,10,20,50,100"
    """text that the tokenizer is trained on"""
    max_tokens: int = 32
    """tokens of a completion"""
    batch_tokens: int = 512
    """tokens of a training step"""
    vocab_size: int = 8192
    """tokens in the vocabulary of the models"""
    repeats: int = 5
    """timings of each point; the median counts"""
    figure: str = "docs/growth.svg"
    """where to draw; empty: nowhere"""
    device_type: str = ""
    """cuda, mps or cpu; by default the best there is"""
    dtype: str = ""
    """float32 or bfloat16; by default bfloat16 where the GPU has it"""

    def __post_init__(self) -> None:
        if unknown := set(self.parts.split(",")) - {"rollout", "train", "tokenizer"}:
            raise UserError(
                f"--parts={self.parts}: there is no {min(unknown)}; use rollout, train or tokenizer"
            )


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def median_seconds(act: Callable[[], object], repeats: int) -> float:
    """Of `repeats` runs, after one that is thrown away."""
    seconds = []
    for _ in range(repeats + 1):
        rollout.synchronize()
        began = time.perf_counter()
        act()
        rollout.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def measure_rollouts(config: Config, world: World) -> Iterator[Row]:
    """Time per token against rows, then against context."""
    points = [("rows", rows, rows, ROWS_CONTEXT) for rows in numbers(config.rows)]
    points += [("context", context, CONTEXT_ROWS, context) for context in numbers(config.contexts)]
    longest = max(context for *_, context in points)
    settings = rollout.Config(max_tokens=config.max_tokens, vocab_size=config.vocab_size)
    pieces = rollout.HashedPieces(config.vocab_size)
    model = rollout.make_model(4, settings, [range(longest)], world)
    with torch.inference_mode():
        rollout.set_stop_chance(model, pieces, [[pieces.bos_id]], 0.0)
    for part, x, rows, context in points:
        engine = Engine(model, pieces)  # type: ignore[arg-type]
        samples = min(rows, ROWS_PER_QUESTION)
        prompts = [
            [pieces.bos_id, *((7 * q + place) % pieces.first for place in range(context - 1))]
            for q in range(max(1, rows // ROWS_PER_QUESTION))
        ]

        def act(
            engine: Engine = engine, prompts: list[list[int]] = prompts, samples: int = samples
        ) -> object:
            return engine.generate(
                prompts, num_samples=samples, max_tokens=config.max_tokens, seeds=range(len(prompts))
            )

        seconds = median_seconds(act, config.repeats)
        yield point(part, x, seconds, len(prompts) * samples * config.max_tokens)


def measure_training(config: Config, world: World) -> Iterator[Row]:
    """Time of an optimizer step against depth, rows of 256 tokens."""
    length = min(256, config.batch_tokens)
    settings = train.Config(
        batch_size=config.batch_tokens // length, sequence_len=length, vocab_size=config.vocab_size
    )
    batch = train.random_batch(settings, world)
    for depth in numbers(config.depths):
        step = train.our_side(depth, settings, batch, world, compiled=False)
        seconds = median_seconds(step, config.repeats)
        yield point("train", depth, seconds, config.batch_tokens)


def measure_tokenizer(config: Config) -> Iterator[Row]:
    """Time of training 32,768 tokens on one core against the size of the text; each run in a process of its own."""
    for megabytes in numbers(config.megabytes):
        settings = tokenizer.Config(megabytes=str(megabytes))
        found = [tokenizer.child("ours", settings, 1)["seconds"] for _ in range(config.repeats)]
        yield point("tokenizer", megabytes, statistics.median(found), megabytes * 10**6)


def point(part: str, x: int, seconds: float, units: int) -> Row:
    """One row: `units` are tokens, or bytes of text."""
    row = {"part": part, "x": x, "seconds": seconds, "microseconds_per_token": seconds / units * 1e6}
    print(f"{AXES[part]:>22} {x:>6} {seconds:>9.3f} {row['microseconds_per_token']:>12.3f}", flush=True)
    return row


def measure(config: Config) -> list[Row]:
    """Every point of the parts asked for."""
    world = compute_init(config.device_type, config.dtype)
    print(f"{'x':>22} {'':>6} {'seconds':>9} {'us per token':>12}   (tokenizer: us per byte)")
    parts = config.parts.split(",")
    rows: list[Row] = []
    if "rollout" in parts:
        rows += measure_rollouts(config, world)
    if "train" in parts:
        rows += measure_training(config, world)
    if "tokenizer" in parts:
        rows += measure_tokenizer(config)
    return rows


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """k where y = c x^k fits best, by least squares of the logarithms."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = statistics.fmean(u), statistics.fmean(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum(
        (a - mean_u) ** 2 for a in u
    )


def of_part(rows: Sequence[Row], part: str) -> tuple[list[float], list[float]]:
    """x and time per token, or for the tokenizer seconds."""
    chosen = [row for row in rows if row["part"] == part]
    key = "seconds" if part == "tokenizer" else "microseconds_per_token"
    return [row["x"] for row in chosen], [row[key] for row in chosen]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Small log-log plots in one figure."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    parts = [part for part in AXES if of_part(rows, part)[0]]
    figure, axes = pyplot.subplots(
        1,
        len(parts),
        figsize=(3.25 * len(parts), 3.2),
        layout="constrained",
        squeeze=False,
        facecolor="white",
    )
    for axis, part in zip(axes[0], parts, strict=True):
        xs, ys = of_part(rows, part)
        axis.plot(xs, ys, "o-", color="#08306b")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(xs, [f"{x:g}" for x in xs])
        axis.minorticks_off()
        axis.set_yticks([])  # the points say it: an axis of one or two decades has hardly a label
        for x, y in zip(xs, ys, strict=True):
            axis.annotate(
                f"{y:.3g}" if y < 1000 else f"{y:,.0f}",
                (x, y),
                (-9 if ys[-1] > ys[0] else 9, 5),
                textcoords="offset points",
                fontsize=8,
                ha="center",
            )
        axis.margins(0.12, 0.15)
        axis.set_xlabel(AXES[part])
        axis.set_title("seconds to train a tokenizer" if part == "tokenizer" else "microseconds per token")
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "growth"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(config: Config) -> None:
    """Measure, draw, print the exponents and one JSON line."""
    rows = measure(config)
    exponents = {
        part: round(exponent(*of_part(rows, part)), 3)
        for part in AXES
        if len({row["x"] for row in rows if row["part"] == part}) > 1
    }
    print("exponents: " + ", ".join(f"{AXES[part]} {value:+.2f}" for part, value in exponents.items()))
    if config.figure:
        draw(rows, Path(config.figure))
        print(f"drawn in {config.figure}")
    about = provenance()
    machine = {"commit": about["commit"], "cpu": about["system"]["cpu"], "threads": torch.get_num_threads()}
    print(
        json.dumps(
            {
                "benchmark": "growth",
                **dataclasses.asdict(config),
                **machine,
                "exponents": exponents,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main(cli(Config))

"""The CORE metric of DCLM: 22 in-context tasks, each centred so that guessing is 0 and perfect is 1, then averaged.

Three kinds of task, told apart by what varies. multiple_choice: one context, several continuations, the one with the
lowest mean loss is chosen. schema: several contexts, one continuation, likewise. language_modeling: the continuation
must be the greedy choice token by token. Examples are shown before the question (few-shot), drawn by a seed per item.

Text layout, seeds and few-shot draws are nanochat's, so that scores compare. The data is its `eval_bundle`: core.yaml,
eval_meta_data.csv with each task's score of guessing, and eval_data/. Source: arXiv 2406.11794, section 3.5.

Legend: B rows, T time, D model dimension, N scored tokens.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import yaml

from nanochat.common import UserError, World, base_dir, progress

if TYPE_CHECKING:
    from nanochat.gpt import GPT
    from nanochat.tokenizer import Tokenizer

Kind = Literal["multiple_choice", "schema", "language_modeling"]
BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
SHUFFLE_SEED, FEWSHOT_SEED = 1337, 1234


class BundleMissing(UserError):
    """There is no eval_bundle on this machine; a pipeline goes on without CORE."""


@dataclass(frozen=True, slots=True)
class CoreTask:
    """One task as core.yaml describes it."""

    label: str
    kind: Kind
    path: Path
    num_fewshot: int
    delimiter: str
    """between context and continuation"""
    chance: float
    """what guessing scores"""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Accuracy of one task, as it is and centred."""

    label: str
    n: int
    accuracy: float
    chance: float

    @property
    def centered(self) -> float:
        return (self.accuracy - self.chance) / (1 - self.chance)


@dataclass(frozen=True, slots=True)
class CoreResult:
    """All tasks and their mean."""

    scores: tuple[TaskScore, ...]

    @property
    def core(self) -> float:
        return math.fsum(score.centered for score in self.scores) / len(self.scores)

    def table(self) -> str:
        """For a person."""
        rows = [f"{'task':36} {'n':>6} {'accuracy':>9} {'guessing':>9} {'centred':>8}"]
        for s in self.scores:
            rows.append(f"{s.label:36} {s.n:6} {s.accuracy:9.4f} {s.chance:9.4f} {s.centered:8.4f}")
        return "\n".join([*rows, f"{'CORE':36} {'':6} {'':9} {'':9} {self.core:8.4f}"])

    def csv(self) -> str:
        """The columns of nanochat's base_eval/*.csv."""
        lines = [f"{s.label:<35}, {s.accuracy:<10.6f}, {s.centered:<10.6f}" for s in self.scores]
        head, last = (
            f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}",
            f"{'CORE':<35}, {'':<10}, {self.core:<10.6f}",
        )
        return "\n".join([head, *lines, last]) + "\n"


def load_bundle(directory: Path | None = None) -> list[CoreTask]:
    """The tasks of an eval_bundle, by default base_dir()/eval_bundle. Raises BundleMissing where there is none."""
    folder = directory or base_dir() / "eval_bundle"
    config, meta = folder / "core.yaml", folder / "eval_meta_data.csv"
    if not config.is_file() or not meta.is_file():
        raise BundleMissing(
            f"CORE needs core.yaml and eval_meta_data.csv in {folder}; unzip {BUNDLE_URL} there"
        )
    try:
        with meta.open(newline="", encoding="utf-8") as file:
            chances = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        entries = yaml.safe_load(config.read_text(encoding="utf-8"))["icl_tasks"]
        return [_task(entry, folder, chances) for entry in entries]
    except UserError:
        raise
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"core.yaml or eval_meta_data.csv in {folder} is damaged ({what[:120]}); unzip {BUNDLE_URL} again"
        ) from None


def _task(entry: dict[str, Any], folder: Path, chances: dict[str, float]) -> CoreTask:
    label, kind, path = entry["label"], entry["icl_task_type"], folder / "eval_data" / entry["dataset_uri"]
    if kind not in get_args(Kind):
        raise UserError(
            f"{folder}/core.yaml: {label} is of type {kind}; known are {', '.join(get_args(Kind))}"
        )
    if label not in chances:
        raise UserError(f"{folder}/eval_meta_data.csv has no random baseline for {label}")
    if not path.is_file():
        raise UserError(f"{label}: {path} is missing; unzip {BUNDLE_URL} again")
    delimiter = entry.get("continuation_delimiter", " ")
    return CoreTask(label, kind, path, int(entry["num_fewshot"][0]), delimiter, chances[label])


def evaluate_core(
    model: GPT,
    tokenizer: Tokenizer,
    world: World,
    *,
    bundle: Path | None = None,
    max_per_task: int = -1,
    token_budget: int = 16_384,
) -> CoreResult:
    """Score all tasks; `max_per_task` items of each where it is positive. A collective over ranks."""
    tasks = load_bundle(bundle)
    return CoreResult(
        tuple(
            evaluate_task(model, tokenizer, world, task, max_items=max_per_task, token_budget=token_budget)
            for task in progress(tasks, total=len(tasks), description="CORE")
        )
    )


def evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    world: World,
    task: CoreTask,
    *,
    max_items: int = -1,
    token_budget: int = 16_384,
) -> TaskScore:
    """Accuracy of one task, its items shared out over the ranks."""
    text = task.path.read_text(encoding="utf-8")
    items = [json.loads(line) for line in text.split("\n") if line.strip()]  # splitlines cuts at U+2028, too
    random.Random(SHUFFLE_SEED).shuffle(items)
    items = items[:max_items] if max_items > 0 else items
    if len(items) <= task.num_fewshot:
        raise UserError(
            f"{task.label}: {len(items)} items are too few to show {task.num_fewshot} beside the question"
        )
    mine = range(len(items))[world.rank :: world.size]
    rows = [row for index in mine for row in _rows(tokenizer, task, items, index, model.config.sequence_len)]
    found = _score(model, rows, greedy=task.kind == "language_modeling", token_budget=token_budget)
    correct, place = 0, 0
    for index in mine:
        count = _num_rows(task, items[index])
        values = found[place : place + count]
        place += count
        correct += bool(values[0]) if count == 1 else values.index(max(values)) == items[index]["gold"]
    total = sum(world.gather(correct))
    return TaskScore(task.label, len(items), total / len(items), task.chance)


@dataclass(frozen=True, slots=True)
class _Row:
    """A sequence of which the tokens from `start` on, up to `end`, are scored."""

    ids: list[int]
    start: int
    end: int


def _num_rows(task: CoreTask, item: dict[str, Any]) -> int:
    if task.kind == "language_modeling":
        return 1
    return len(item["choices" if task.kind == "multiple_choice" else "context_options"])


def _rows(
    tokenizer: Tokenizer, task: CoreTask, items: Sequence[dict[str, Any]], index: int, longest: int
) -> list[_Row]:
    others = [i for i in range(len(items)) if i != index]
    drawn = random.Random(FEWSHOT_SEED + index).sample(others, task.num_fewshot)
    shots = "".join(f"{_solved(task, items[i])}\n\n" for i in drawn)
    texts = [shots + text for text in _variants(task, items[index])]
    sequences = tokenizer.encode_batch(texts, bos=True)
    if task.kind == "multiple_choice":
        start = _common(sequences)
        spans = [(start, len(ids)) for ids in sequences]
    elif task.kind == "schema":
        length = _common([ids[::-1] for ids in sequences])
        spans = [(len(ids) - length, len(ids)) for ids in sequences]
    else:
        # A trailing space would be a token of its own before the continuation, but not inside the text.
        context = (shots + items[index]["context"].strip() + task.delimiter).rstrip()
        start = _common([tokenizer.encode(context, bos=True), sequences[0]])
        spans = [(start, len(sequences[0]))]
    # The first token has no prediction; of two equal choices nothing differs, and the last token stands for both.
    return [
        _cropped(ids, min(max(1, start), end - 1), end, longest)
        for ids, (start, end) in zip(sequences, spans, strict=True)
    ]


def _solved(task: CoreTask, item: dict[str, Any]) -> str:
    """An item with its right answer, to be shown."""
    return _variants(task, item)[0 if task.kind == "language_modeling" else item["gold"]]


def _variants(task: CoreTask, item: dict[str, Any]) -> list[str]:
    """The texts that compete for an item."""
    if task.kind == "multiple_choice":
        return [f"{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    return [f"{item['context'].strip()}{task.delimiter}{item['continuation']}"]


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning."""
    shortest = min(map(len, sequences))
    for place in range(shortest):
        if len({sequence[place] for sequence in sequences}) > 1:
            return place
    return shortest


def _cropped(ids: list[int], start: int, end: int, longest: int) -> _Row:
    """What does not fit goes at the front; at least one token of context stays."""
    cut = max(0, len(ids) - longest)
    return _Row(ids[cut:], max(1, start - cut), end - cut)


def _batches(rows: Sequence[_Row], token_budget: int) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    while order:
        size = max(1, token_budget // len(rows[order[-1]].ids))
        yield order[-size:]
        order = order[:-size]


@torch.no_grad()
def _score(model: GPT, rows: Sequence[_Row], *, greedy: bool, token_budget: int) -> list[float]:
    """Per row the mean log-probability of its span or, with `greedy`, 1.0 where every token is the likeliest."""
    scores = [0.0] * len(rows)
    for batch in _batches(rows, token_budget):
        width = max(len(rows[i].ids) for i in batch)
        ids = torch.tensor([rows[i].ids + [0] * (width - len(rows[i].ids)) for i in batch])  # (B, T)
        spans = [(line, place) for line, i in enumerate(batch) for place in range(rows[i].start, rows[i].end)]
        line, place = torch.tensor(spans, device=model.device).T
        ids = ids.to(model.device)
        hidden = model.hidden(ids)[line, place - 1]  # (N, D)
        targets = ids[line, place]
        if greedy:
            best = torch.cat([model.logits(part).argmax(-1) for part in hidden.split(256)])
            values = (best == targets).float()
        else:
            values = model.token_logprobs(hidden, targets)
        parts = values.cpu().double().split([rows[i].end - rows[i].start for i in batch])
        for i, part in zip(batch, parts, strict=True):
            scores[i] = part.min().item() if greedy else part.mean().item()
    return scores

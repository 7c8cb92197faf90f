"""
Tasks by the names that command lines use, and the mixtures that the stages train on.

A part whose data cannot be had is left out and said so: `assemble` returns the mixture together with one line for each
part, what was used or why it is missing, for the stage to print and the report to show. When no word problems at all can
be had, the synthetic ones stand in, so that every stage runs on a machine without network and without data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nanochat.common import UserError
from nanochat.dataset import Texts, open_texts
from tasks.aqua import AQUA
from tasks.arc import ARC
from tasks.common import Conversation, Task, TaskMixture, limit
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.programs import Programs
from tasks.prose import Drill, identity_conversations, pretraining_document
from tasks.rows import DataUnavailable
from tasks.smoltalk import SmolTalk
from tasks.synthetic import Synthetic

EVALUATED = ("AQUA", "SYNTHETIC", "ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval")
NUM_IDENTITY = 1_000
NUM_SYNTHETIC = 20_000
NUM_HELD_OUT = 2_048  # synthetic problems of a held-out split


class Listed(Task):
    """Conversations that are already in memory; they are trained on, not marked."""

    def __init__(self, name: str, source: str, rows: Sequence[Conversation]) -> None:
        super().__init__()
        self.name, self.source, self._rows = name, source, rows

    def num_examples(self) -> int:
        return len(self._rows)

    def get_example(self, index: int) -> Conversation:
        return self._rows[index]

    def evaluate(self, conversation: Conversation, text: str) -> bool:
        raise UserError(f"{self.name} is trained on, not marked; evaluate another task")


def identity(seed: int = 42) -> Task:
    """Who the model is: identity_conversations.jsonl of the base dir, or conversations of our own writing."""
    try:
        return CustomJSON()
    except DataUnavailable:
        return Listed("identity", "built in", list(identity_conversations(NUM_IDENTITY, seed)))


def open_task(
    name: str, split: str = "", *, aqua_path: str | None = None, execute: Any = None, seed: int = 42
) -> Task:
    """
    The task `name` of EVALUATED (in any case) for training or evaluation.

    `split` is train, validation or test; "" is where one looks while developing: validation for AQUA and SYNTHETIC,
    test elsewhere, as nanochat has it. Raises UserError for another name, DataUnavailable where there is no data.
    """
    known = {task.lower(): task for task in EVALUATED}
    if name.lower() not in known:
        raise UserError(f"task {name} is not known; use {', '.join(EVALUATED)}")
    name = known[name.lower()]
    if name == "AQUA":
        return AQUA(split or "validation", path=aqua_path)
    if name == "SYNTHETIC":
        size = 100_000 if split == "train" else NUM_HELD_OUT
        return Synthetic(split or "validation", size=size, seed=seed)  # type: ignore[arg-type]  # it refuses others
    if name.startswith("ARC"):
        return ARC(name, split or "test")
    if name == "MMLU":
        return MMLU(split or "test")
    if name == "GSM8K":
        return GSM8K(split or "test")
    return HumanEval(execute=execute)


@dataclass(frozen=True, slots=True)
class Part:
    """One ingredient of a mixture: how to open it, and how many examples of it (None: all)."""

    name: str
    open: Callable[[], Task]
    count: int | None = None


def assemble(parts: Sequence[Part], *, seed: int) -> tuple[TaskMixture, list[tuple[str, str]]]:
    """A shuffled mixture of the parts that can be had, and a note (kind, text) on each part."""
    found: list[Task | tuple[Task, int]] = []
    notes: list[tuple[str, str]] = []
    for part in parts:
        if part.count == 0:
            continue
        try:
            task = part.open()
        except DataUnavailable as error:
            notes.append(("skipped", str(error)))
            continue
        count = len(task) if part.count is None else min(part.count, len(task))
        found.append((limit(task, count), count))
        notes.append(("data", f"{part.name}: {count:,} conversations from {task.source}"))
        notes += [("skipped", f"{part.name}: {number:,} rows, {why}") for why, number in task.skipped.items()]
    if not found:
        raise UserError(
            "none of the parts of this mixture can be had; set NANOCHAT_DATA_DIR or --synthetic_examples"
        )
    return TaskMixture(found, seed=seed), notes


def open_rl_tasks(
    dataset: str, *, aqua_path: str | None = None, difficulty: str = "", seed: int = 42
) -> tuple[Task, Task]:
    """The questions that reinforcement learning trains on, and those that it is validated on."""
    if dataset != "SYNTHETIC":
        if difficulty:
            raise UserError(f"--difficulty={difficulty} is for --dataset=SYNTHETIC; leave it out")
        return open_task(dataset, "train", aqua_path=aqua_path), open_task(
            dataset, "validation", aqua_path=aqua_path
        )
    return Synthetic("train", seed=seed, difficulty=parse_levels(difficulty)), open_task(
        dataset, "validation", seed=seed
    )


def parse_levels(text: str) -> tuple[int, int] | None:
    """ "2" or "1-2" as a pair of levels; None for ""."""
    if not text:
        return None
    low, _, high = text.partition("-")
    if not low.isdecimal() or not (high or low).isdecimal():
        raise UserError(f"--difficulty={text} is not a level; write 0, 1, 2 or a range such as 1-2")
    return int(low), int(high or low)


class WordProblems(Protocol):
    """The flags that say which word problems a stage trains on."""

    @property
    def aqua_train_examples(self) -> int: ...
    @property
    def synthetic_examples(self) -> int: ...
    @property
    def program_examples(self) -> int: ...
    @property
    def quality(self) -> Any: ...
    @property
    def aqua_path(self) -> str | None: ...
    @property
    def seed(self) -> int: ...


def problems(wanted: WordProblems) -> list[Part]:
    """Word problems: AQuA where its rows are, and built-in ones; -1 built-in: only in AQuA's place."""
    seed, path = wanted.seed, wanted.aqua_path
    rows = None if wanted.aqua_train_examples < 0 else wanted.aqua_train_examples
    aqua = Part("AQUA", lambda: AQUA("train", path=path, permute_seed=seed, seed=seed), rows)
    programs = wanted.program_examples
    count = wanted.synthetic_examples
    if count < 0:
        count = 0 if _can_be_had(aqua) else NUM_SYNTHETIC
    look_ups = (count + programs) // 10
    built_in = Part(
        "SYNTHETIC", lambda: Synthetic("train", size=count, seed=seed, quality=wanted.quality), count
    )
    return [
        aqua,
        built_in,
        Part("programs", lambda: Programs("train", size=programs, seed=seed, path=path), programs),
        Part("look-ups", lambda: Drill(size=look_ups, seed=seed, single=True), look_ups),
    ]


def _can_be_had(part: Part) -> bool:
    if part.count == 0:
        return False
    try:
        part.open()
    except DataUnavailable:
        return False
    return True


def mid_parts(seed: int) -> list[Part]:
    """Mid-training beside word problems: how conversations, multiple choice and tools look."""
    return [
        Part("SmolTalk", lambda: SmolTalk("train", seed=seed)),
        Part("MMLU", lambda: MMLU("train", seed=seed), 100_000),
        Part("GSM8K", lambda: GSM8K("train")),
        Part("identity", lambda: identity(seed)),
    ]


def sft_parts(seed: int) -> list[Part]:
    """Fine-tuning beside word problems: fewer and cleaner conversations, nearest to what will be asked."""
    return [
        Part("ARC-Easy", lambda: ARC("ARC-Easy", "train", seed=seed)),
        Part("ARC-Challenge", lambda: ARC("ARC-Challenge", "train", seed=seed)),
        Part("GSM8K", lambda: GSM8K("train")),
        Part("SmolTalk", lambda: SmolTalk("train", seed=seed), 10_000),
        Part("identity", lambda: identity(seed)),
    ]


def at_most(parts: Sequence[Part], count: int) -> list[Part]:
    """`parts` with no more than `count` conversations each; -1: as they are."""
    if count < 0:
        return list(parts)
    return [replace(part, count=count if part.count is None else min(count, part.count)) for part in parts]


@dataclass(frozen=True, slots=True)
class Generated:
    """Numbered documents of our own writing, made when they are asked for."""

    make: Callable[[int, int], str]
    """(number, seed) -> document"""
    seed: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> str:
        return self.make(number, self.seed)


@dataclass(frozen=True, slots=True)
class Interleaved:
    """
    Prose on disk and documents of our own, evenly interleaved under one numbering, so that a position stays a number.

    `share` is that of the documents of our own, counted in documents.
    """

    written: Texts
    prose: Texts
    share: float

    def __len__(self) -> int:
        return len(self.written)

    def __getitem__(self, number: int) -> str:
        so_far, then = int(number * self.share), int((number + 1) * self.share)
        return self.written[so_far] if then > so_far else self.prose[(number - so_far) % len(self.prose)]


def pretraining_texts(
    *, synthetic_share: float, seed: int, most: int = 10_000_000
) -> tuple[Texts, list[tuple[str, str]]]:
    """Training documents of the base stage, and what they are; without shards all of them are of our own writing.

    `synthetic_share` is counted in characters. With 0 it is simply the shards.
    """
    written = Generated(pretraining_document, seed, most)
    try:
        prose: Any = open_texts("train")
    except UserError as error:
        if synthetic_share == 0:
            raise
        return written, [("data", "base: documents of our own writing alone"), ("skipped", f"base: {error}")]
    if synthetic_share == 0:
        return prose, [("data", f"base: {len(prose):,} documents on disk")]
    if synthetic_share == 1:
        return written, [("data", "base: documents of our own writing alone, as asked")]
    mixed = Interleaved(written, prose, _share_of_documents(synthetic_share, written, prose))
    kind = f"{synthetic_share:.0%} of the characters of our own writing, the rest from {len(prose):,} documents on disk"
    return mixed, [("data", f"base: {kind}")]


def left_out(texts: Texts) -> list[str]:
    """Files and documents of the text on disk that could not be used, as far as `texts` has been read."""
    told = getattr(getattr(texts, "prose", texts), "told", None)
    return told() if told else []


def _share_of_documents(share_of_characters: float, written: Texts, prose: Texts, sample: int = 64) -> float:
    """Ours are short and books are long: the same share of characters is another share of documents."""
    ours = sum(len(written[n]) for n in range(sample)) / sample
    theirs = sum(len(prose[n * len(prose) // sample]) for n in range(sample)) / sample
    weighted = share_of_characters / ours, (1 - share_of_characters) / max(1.0, theirs)
    return weighted[0] / sum(weighted)

"""
What every task has in common: how a question is put, how a reply is marked, where the rows come from.

A Task is a sliceable sequence of conversations that knows how to mark a reply. It holds no model and no tensor. Data is
looked for in a fixed order (explicit path, environment, base dir, network) and the place that was used stands in
`task.source`; rows that cannot be used are counted in `task.skipped` and named, and a file of which 1 % is bad is refused.

All multiple choice, reasoned or not, ends in the same line `Answer: X`. nanochat has its models say the bare letter for
ARC and MMLU; but the letter after "Answer:" and a letter that opens a reply are different tokens (" C" and "C"), and a
small model that must learn both learns neither well. So letter logits are read in one place for every task: after the
prompt of the completion and `ANSWER_PREFIX`.
"""

from __future__ import annotations

import copy
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from nanochat.common import UserError, base_dir, data_dir, derive_seed
from nanochat.dataset import reachable
from tasks.answers import parse_answer
from tasks.rows import MAX_BAD_SHARE, DataUnavailable, Rows, find_file, keep_rows, parse_rows, read_lines

Conversation = dict[str, Any]
Item = TypeVar("Item")
TaskT = TypeVar("TaskT", bound="Task")

ANSWER_PREFIX = "Answer:"
"""what stands before the letter, in the target and where letter logits are read; the letter follows after a space"""
FORMAT_REWARD = 0.1
REASON_FIRST = 'Reason first. Last line: "Answer: X".'
LETTER_ONLY = 'Reply with one line: "Answer: X".'


@dataclass(frozen=True, slots=True)
class Reward:
    """What one completion is paid."""

    correct: float
    """1.0 for the right answer, otherwise 0.0"""
    format: float
    """the format reward where there is exactly one well-formed final answer, otherwise 0.0"""
    wrong: float = 0.0
    """what a wrong final answer is paid on top, 0.0 or less; 0.0 where the answer is right or none is given"""

    @property
    def total(self) -> float:
        return self.correct + self.format + self.wrong


@dataclass(frozen=True, slots=True)
class Majority:
    """The score of always saying one letter: the null that an accuracy must beat."""

    letter: str
    share: float
    counts: dict[str, int]


class Task:
    """A sequence of conversations and the way to mark a reply. Subclasses give `num_examples` and `get_example`."""

    name: str = ""
    eval_type: ClassVar[Literal["generative", "categorical"]] = "generative"
    baseline: float = 0.0
    """accuracy of a guess"""

    def __init__(self, *, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        self.source = ""
        self.skipped: dict[str, int] = {}
        self.bad_rows: tuple[str, ...] = ()
        self._slices: tuple[slice, ...] = ()
        self._cut(start, stop, step)

    def num_examples(self) -> int:
        """How many there are before slicing."""
        raise NotImplementedError

    def get_example(self, index: int) -> Conversation:
        """The conversation at `index` of the whole, unsliced task."""
        raise NotImplementedError

    def evaluate(self, conversation: Conversation, text: str) -> bool:
        """Whether `text`, the decoded completion without its stop token, is right."""
        raise NotImplementedError

    def answer(self, conversation: Conversation, text: str) -> str | None:
        """The final answer that `text` gives, or None when it gives none or the task has no such thing."""
        return None

    def reward(
        self, conversation: Conversation, text: str, *, format_reward: float = FORMAT_REWARD
    ) -> Reward:
        """What reinforcement learning pays for `text`."""
        well_formed = self.answer(conversation, text) is not None
        return Reward(float(self.evaluate(conversation, text)), format_reward if well_formed else 0.0)

    def sliced(self: TaskT, start: int = 0, stop: int | None = None, step: int = 1) -> TaskT:
        """The same task narrowed to a slice of what it is now; nothing is read again."""
        task = copy.copy(self)
        task._cut(start, stop, step)
        return task

    def indices(self) -> range:
        """The numbers, in the unsliced task, of the examples that this slice holds."""
        numbers = range(self.num_examples())
        for part in self._slices:
            numbers = numbers[part]
        return numbers

    def __len__(self) -> int:
        return len(self.indices())

    def __getitem__(self, index: int) -> Conversation:
        return self.get_example(self.indices()[index])

    def __iter__(self) -> Iterator[Conversation]:
        return (self.get_example(index) for index in self.indices())

    def _cut(self, start: int, stop: int | None, step: int) -> None:
        if start < 0 or (stop is not None and stop < 0) or step < 1:
            raise UserError(
                f"{self.name or 'task'}: the slice {start}:{stop}:{step} is not one; "
                "start and stop count from 0, step from 1, and no stop means all"
            )
        self._slices += (slice(start, stop, step),)

    def _take(self, rows: Rows[Any]) -> None:
        """Remember where `rows` came from and what was wrong with them."""
        self.source, self.skipped, self.bad_rows = rows.source, dict(rows.skipped), rows.bad


class MultipleChoice(Task):
    """A task whose conversations carry `letters` and `answer_letter`, and whose reply ends in `Answer: X`."""

    def answer(self, conversation: Conversation, text: str) -> str | None:
        return parse_answer(text, conversation["letters"])

    def evaluate(self, conversation: Conversation, text: str) -> bool:
        return self.answer(conversation, text) == conversation["answer_letter"]

    def gold(self, index: int) -> str:
        """The gold letter at `index` of the unsliced task."""
        return str(self.get_example(index)["answer_letter"])

    def majority(self) -> Majority:
        """Histogram of the gold letters of this slice, and what always saying the commonest would score."""
        counts = Counter(self.gold(index) for index in self.indices())
        if not counts:
            raise UserError(f"{self.name}: no rows, so no majority letter; widen the slice")
        letter = min(counts, key=lambda one: (-counts[one], one))
        return Majority(letter, counts[letter] / counts.total(), dict(sorted(counts.items())))


def limit(task: TaskT, count: int | None) -> TaskT:
    """The first `count` examples of `task`; None for all."""
    return task if count is None else task.sliced(stop=count)


class TaskMixture(Task):
    """
    Several tasks shuffled together: `TaskMixture([arc, (aqua, 20_000), (identity, 2_000)])`.

    A count beyond a task's length repeats it: whole passes, then a seeded choice of the rest. The order depends on the
    seed and the lengths alone.
    """

    name = "mixture"

    def __init__(self, parts: Sequence[Task | tuple[Task, int]], *, seed: int = 42, **slicing: Any) -> None:
        super().__init__(**slicing)
        pairs = [part if isinstance(part, tuple) else (part, len(part)) for part in parts]
        self.tasks = [task for task, _ in pairs]
        order: list[tuple[int, int]] = []
        for number, (task, count) in enumerate(pairs):
            if count and not len(task):
                raise UserError(f"{task.name}: {count} examples wanted of a task that has none; leave it out")
            passes, rest = divmod(count, len(task)) if count else (0, 0)
            order += [(number, index) for _ in range(passes) for index in range(len(task))]
            some = random.Random(derive_seed("mixture", seed, number)).sample(range(len(task)), rest)
            order += [(number, index) for index in some]
        random.Random(derive_seed("mixture", seed)).shuffle(order)
        self._order = order
        self.source = "; ".join(f"{count:,} of {task.name} ({task.source})" for task, count in pairs)
        self.skipped = {f"{task.name}: {why}": n for task in self.tasks for why, n in task.skipped.items()}

    def num_examples(self) -> int:
        return len(self._order)

    def get_example(self, index: int) -> Conversation:
        task, inner = self.owner(index)
        return task[inner]

    def owner(self, index: int) -> tuple[Task, int]:
        """The task that example `index` of the unsliced mixture belongs to, and its number there."""
        number, inner = self._order[index]
        return self.tasks[number], inner


def option_line(choice: str, letter: str) -> str:
    """One option as a prompt shows it: `- 21=A`."""
    return f"- {' '.join(choice.split())}={letter}"


def render_multiple_choice(
    question: str, letters: Sequence[str], choices: Sequence[str], *, instruction: str = REASON_FIRST
) -> str:
    """
    The question as the user puts it: choices as lines `- 21=A`, one instruction at the end.

    The choice comes first and the letter binds to it without a space (nanochat's finding): a causal model that has just
    read the value finds the letter as the very next token. The instruction agrees with the training target; it is one
    short line, because a small model pays for each token of it.
    """
    lines = [
        f"- {' '.join(choice.split())}={letter}" for letter, choice in zip(letters, choices, strict=True)
    ]
    return "\n".join([question.strip(), *lines, instruction])


# ---- where rows are: on this machine, or on the Hugging Face hub ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hub:
    """A split of a Hugging Face data set."""

    path: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"Hugging Face {self.path}{f' ({self.config})' if self.config else ''}, split {self.split}"


def load_rows(
    name: str,
    parse: Callable[[Any], Item],
    *,
    hub: Hub | None,
    path: str | Path | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Rows[Item]:
    """
    The rows of data set `name`: the file `path`, NANOCHAT_DATA_DIR/eval, base_dir()/eval, then the network.

    What came over the network is kept in base_dir()/eval, so that the next run needs none.
    """
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise UserError(f"{name}: there is no file {file}; correct the path or leave it out")
        return parse_rows(read_lines(file), parse, source=str(file), max_bad_share=max_bad_share)
    folders = [folder / "eval" for folder in (data_dir(), base_dir()) if folder is not None]
    for folder in folders:
        if found := find_file(folder, [name]):
            return parse_rows(read_lines(found), parse, source=str(found), max_bad_share=max_bad_share)
    tried = [str(folder / f"{name}.jsonl.gz") for folder in folders]
    if hub is None:
        raise DataUnavailable(name, tried)
    raw = hub_rows(hub, name, tried)
    numbered = ((f"{name}:{number}", row) for number, row in enumerate(raw, start=1))
    rows = parse_rows(numbered, parse, source=str(hub), max_bad_share=max_bad_share)
    keep_rows(folders[-1] / f"{name}.jsonl.gz", raw)
    return rows


def hub_rows(hub: Hub, name: str, tried: list[str]) -> list[dict[str, Any]]:
    """All rows of a Hugging Face split. Raises DataUnavailable, within seconds where there is no network."""
    return [dict(row) for row in open_hub(hub, name, tried)]


def open_hub(hub: Hub, name: str, tried: list[str]) -> Any:
    """The Hugging Face data set itself, read row by row from disk."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0") and not reachable(endpoint):
        raise DataUnavailable(name, [*tried, f"{hub} (no network: {endpoint} does not answer)"])
    try:
        from datasets import load_dataset

        return load_dataset(hub.path, hub.config, split=hub.split)
    except (
        Exception
    ) as error:  # whatever a hub, a proxy or a cache can raise: the next source is tried, this one is named
        why = (str(error).splitlines() or [""])[0][:200]
        raise DataUnavailable(name, [*tried, f"{hub} ({type(error).__name__}: {why})"]) from error


def shuffled(items: Sequence[Item], seed: int | None) -> list[Item]:
    """`items` in an order that depends on the seed alone; as they are when there is none."""
    copied = list(items)
    if seed is not None:
        random.Random(derive_seed("shuffle", seed)).shuffle(copied)
    return copied

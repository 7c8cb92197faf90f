"""
ARC: grade-school science questions, Easy and Challenge (Clark et al. 2018, arXiv 1803.05457).

No reasoning is asked for: the target is the one line `Answer: X`, and the letter is read after "Answer:" as in every
multiple-choice task here (tasks/common.py says why). A few questions have three or five choices; published keys are
letters or numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from tasks.common import (
    LETTER_ONLY,
    Conversation,
    Hub,
    MultipleChoice,
    load_rows,
    render_multiple_choice,
    shuffled,
)
from tasks.rows import BadRow

Row = tuple[str, tuple[str, ...], str]

FILES = {"train": "train", "validation": "dev", "test": "test"}


def letter_conversation(question: str, choices: Sequence[str], gold: str) -> Conversation:
    """A question whose whole reply is the answer line."""
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    prompt = render_multiple_choice(question, letters, choices, instruction=LETTER_ONLY)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"Answer: {gold}"}]
    return {"messages": messages, "letters": letters, "answer_letter": gold}


def checked_row(question: Any, choices: Any, place: Any) -> Row:
    """A row whose gold choice stands at `place`, a number, a letter or a digit counted from 1. Raises BadRow."""
    if not isinstance(question, str) or not question.strip():
        raise BadRow("question is missing or empty")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c.strip() for c in choices)
    ):
        raise BadRow("choices are not two or more texts")
    if isinstance(place, str):
        key = place.strip().upper()
        place = int(key) - 1 if key.isdecimal() else ord(key) - ord("A") if len(key) == 1 else -1
    if not isinstance(place, int) or not 0 <= place < len(choices):
        raise BadRow(f"gold answer is none of the choices: {place!r}")
    return question.strip(), tuple(choice.strip() for choice in choices), chr(ord("A") + place)


def _parse(row: dict[str, Any]) -> Row:
    choices = row.get("choices")
    texts = choices.get("text") if isinstance(choices, dict) else choices
    return checked_row(row.get("question"), texts, row.get("answerKey"))


class ARC(MultipleChoice):
    """ARC as a task: `ARC("ARC-Easy" | "ARC-Challenge", "train" | "validation" | "test")`."""

    eval_type = "categorical"
    baseline = 0.25

    def __init__(
        self,
        subset: str,
        split: str = "train",
        *,
        path: str | Path | None = None,
        seed: int | None = 42,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        self.name = subset
        super().__init__(start=start, stop=stop, step=step)
        if subset not in ("ARC-Easy", "ARC-Challenge") or split not in FILES:
            raise UserError(
                f"ARC has no {subset!r} {split!r}; use ARC-Easy or ARC-Challenge, train, validation or test"
            )
        name = f"{subset.lower().replace('-', '_')}_{FILES[split]}"
        rows = load_rows(name, _parse, hub=Hub("allenai/ai2_arc", subset, split), path=path)
        self._take(rows)
        self._rows = shuffled(rows.items, seed)

    def num_examples(self) -> int:
        return len(self._rows)

    def get_example(self, index: int) -> Conversation:
        return letter_conversation(*self._rows[index])

    def gold(self, index: int) -> str:
        return self._rows[index][2]

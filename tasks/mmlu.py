"""
MMLU: four choices in 57 subjects (Hendrycks et al. 2020, arXiv 2009.03300).

The published file is sorted by subject, so a slice of it would be abstract algebra alone: rows are shuffled by a seed.
`train` is the auxiliary training set, gathered from other exams. Target and marking as in tasks/arc.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat.common import UserError
from tasks.arc import Row, checked_row, letter_conversation
from tasks.common import Conversation, Hub, MultipleChoice, load_rows, shuffled

SPLITS = ("train", "validation", "dev", "test")


def _parse(row: dict[str, Any]) -> Row:
    row = row["train"] if isinstance(row.get("train"), dict) else row  # as the Hub nests the auxiliary set
    return checked_row(row.get("question"), row.get("choices"), row.get("answerKey", row.get("answer")))


class MMLU(MultipleChoice):
    """MMLU as a task: `MMLU("train" | "dev" | "validation" | "test")`."""

    name = "MMLU"
    eval_type = "categorical"
    baseline = 0.25

    def __init__(
        self,
        split: str = "test",
        *,
        path: str | Path | None = None,
        seed: int | None = 42,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        if split not in SPLITS:
            raise UserError(f"MMLU has no split {split!r}; use {', '.join(SPLITS)}")
        config = "auxiliary_train" if split == "train" else "all"
        rows = load_rows(
            f"mmlu_{split}",
            _parse,
            hub=Hub("cais/mmlu", config, split),
            path=path,
        )
        self._take(rows)
        self._rows = shuffled(rows.items, seed)

    def num_examples(self) -> int:
        return len(self._rows)

    def get_example(self, index: int) -> Conversation:
        return letter_conversation(*self._rows[index])

    def gold(self, index: int) -> str:
        return self._rows[index][2]

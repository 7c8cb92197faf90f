"""
GSM8K: grade-school word problems whose worked answers call a calculator (Cobbe et al. 2021, arXiv 2110.14168).

`<<16-3-4=9>>` in a worked answer becomes a python part and a python_output part, which the tokenizer renders as a tool
call; the reply is marked by the number after the last `####`. The published set has no validation split, and to choose
on test is to train on it slowly, so every sixteenth training row is validation here: 7,005 / 468 / 1,319.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from tasks.common import Conversation, Hub, Task, load_rows
from tasks.rows import BadRow

_CALL = re.compile(r"<<([^<>=]+)=([^<>]*)>>")
_FINAL = re.compile(r"####[ \t]*(?:\$[ \t]*)?([-+]?(?:\d[\d,]*)?\.?\d+)(?![\w/]|[.,]\d)")


def parse_number(text: str) -> str | None:
    """The number after the last `####`, in one spelling ("1,080.00" and "1080" are the same), or None."""
    before, marker, after = text.rpartition("####")
    match = _FINAL.match(marker + after) if marker else None
    if match is None:
        return None
    try:
        return format(Decimal(match[1].replace(",", "")).normalize(), "f")
    except InvalidOperation:
        return None


def parts_of(answer: str) -> list[dict[str, str]]:
    """A worked answer as text, calculator calls and their results."""
    pieces = _CALL.split(answer)
    parts = [{"type": "text", "text": pieces[0]}]
    for expression, result, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        parts.append({"type": "python", "text": expression.strip()})
        parts.append({"type": "python_output", "text": result.strip()})
        parts.append({"type": "text", "text": text})
    return [part for part in parts if part["text"]]


def _parse(row: dict[str, Any]) -> tuple[str, str]:
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise BadRow("question is missing or empty")
    if not isinstance(answer, str) or parse_number(answer) is None:
        raise BadRow("no number after ####")
    return question.strip(), answer.strip()


class GSM8K(Task):
    """GSM8K as a task: `GSM8K("train" | "validation" | "test")`."""

    name = "GSM8K"

    def __init__(
        self,
        split: str = "train",
        *,
        path: str | Path | None = None,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        if split not in ("train", "validation", "test"):
            raise UserError(f"GSM8K has no split {split!r}; use train, validation or test")
        published = "test" if split == "test" else "train"
        rows = load_rows(f"gsm8k_{published}", _parse, hub=Hub("openai/gsm8k", "main", published), path=path)
        self._take(rows)
        self.split = split
        kept = {"test": lambda n: True, "validation": lambda n: n % 16 == 0, "train": lambda n: n % 16 != 0}[
            split
        ]
        self._rows = [row for number, row in enumerate(rows.items) if kept(number)]

    def num_examples(self) -> int:
        return len(self._rows)

    def get_example(self, index: int) -> Conversation:
        question, answer = self._rows[index]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": parts_of(answer)}]
        return {"messages": messages, "answer_number": parse_number(answer)}

    def answer(self, conversation: Conversation, text: str) -> str | None:
        return parse_number(text)

    def evaluate(self, conversation: Conversation, text: str) -> bool:
        return self.answer(conversation, text) == conversation["answer_number"]

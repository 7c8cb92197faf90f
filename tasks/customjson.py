"""
CustomJSON: your own conversations from a file of JSON lines, such as the identity conversations.

A line is {"messages": [...]} or, as nanochat has it, the bare list of messages. Plain or gzip.
"""

from __future__ import annotations

from pathlib import Path

from nanochat.common import UserError, base_dir
from tasks.common import Conversation, Task
from tasks.rows import DataUnavailable, parse_rows, read_lines
from tasks.smoltalk import parse_chat

IDENTITY = "identity_conversations.jsonl"


class CustomJSON(Task):
    """The conversations of one file; by default identity_conversations.jsonl in the base dir."""

    def __init__(
        self, path: str | Path | None = None, *, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        file = base_dir() / IDENTITY if path is None else Path(path)
        self.name = file.name.split(".")[0]
        if not file.is_file():
            raise DataUnavailable(self.name, [str(file)])
        rows = parse_rows(read_lines(file), parse_chat, source=str(file), shape=(dict, list))
        self._take(rows)
        self._rows = rows.items

    def num_examples(self) -> int:
        return len(self._rows)

    def get_example(self, index: int) -> Conversation:
        return self._rows[index]

    def evaluate(self, conversation: Conversation, text: str) -> bool:
        raise UserError(f"{self.name} is trained on, not marked; evaluate another task")

"""
HumanEval: complete a Python function so that its tests pass (Chen et al. 2021, arXiv 2107.03374).

Marking means running what a model wrote. This module cannot: the caller hands in `execute`, a function that runs a program
in a bounded child process and says whether it ended well (nanochat/execution.py), and does so only when the user asked for
it by a flag. Without it every `evaluate` is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from tasks.common import Conversation, Hub, Task, load_rows
from tasks.rows import BadRow

Execute = Callable[[str], bool]

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
_FIELDS = ("prompt", "canonical_solution", "test", "entry_point")


def extract_program(completion: str) -> str:
    """The first fenced block of a reply, or the reply itself where there is no fence."""
    match = _FENCE.search(completion)
    return match[1] if match else completion.strip("\n")


def imports_of(prompt: str) -> str:
    """The import lines at the head of a prompt, which a model need not repeat."""
    lines = []
    for line in prompt.splitlines():
        if line.startswith(("import ", "from ")):
            lines.append(line)
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return "\n".join(lines)


def _parse(row: dict[str, Any]) -> dict[str, str]:
    if missing := [field for field in _FIELDS if not isinstance(row.get(field), str)]:
        raise BadRow(f"{missing[0]} is missing or not text")
    return {field: row[field] for field in _FIELDS}


class HumanEval(Task):
    """HumanEval as a task; `execute` runs a program and says whether it ended well."""

    name = "HumanEval"

    def __init__(
        self,
        *,
        execute: Execute | None = None,
        path: str | Path | None = None,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        rows = load_rows("humaneval", _parse, hub=Hub("openai/openai_humaneval", None, "test"), path=path)
        self._take(rows)
        self._rows, self._execute = rows.items, execute

    def num_examples(self) -> int:
        return len(self._rows)

    def get_example(self, index: int) -> Conversation:
        row = self._rows[index]
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]},
        ]
        return {"messages": messages, "test": row["test"], "entry_point": row["entry_point"]}

    def program(self, conversation: Conversation, completion: str) -> str:
        """What has to run: the prompt's imports, the reply's code, the tests, the call of them."""
        prompt, body = conversation["messages"][0]["content"], extract_program(completion)
        entry = conversation["entry_point"]
        if not re.search(rf"(?m)^def\s+{re.escape(entry)}\b", body):
            body = prompt + body  # the reply goes on where the prompt stops
        return "\n\n".join([imports_of(prompt), body, conversation["test"], f"check({entry})"])

    def evaluate(self, conversation: Conversation, text: str) -> bool:
        if self._execute is None:
            raise UserError(
                "HumanEval runs code that a model wrote; it is off unless you ask for it by flag, "
                "and the child process it runs in is a fence, not a sandbox"
            )
        return self._execute(self.program(conversation, text))

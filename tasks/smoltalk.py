"""
SmolTalk: general conversations (Hugging Face, smol-smoltalk), or whatever conversations stand in for it.

Where NANOCHAT_DATA_DIR has a folder `chat`, its files of {"messages": [...]} are used and the source says so. A
conversation is usable when an optional system turn is followed by user and assistant in turn, nobody silent, the assistant
last; real dialogues break this now and then, so up to 5 % may be left out here, counted and named.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from nanochat.common import UserError, base_dir, data_dir, print0
from tasks.common import Conversation, Hub, Task, open_hub, shuffled
from tasks.rows import BadRow, Rows, parse_rows, read_lines

MAX_BAD_SHARE = 0.05
TEST_SHARE = 0.05
PART_TYPES = ("text", "python", "python_output")


def parse_chat(row: dict[str, Any] | list[Any]) -> Conversation:
    """A row of {"messages": [...]}, or the bare list of messages, as a Conversation. Raises BadRow with the reason."""
    messages = row.get("messages") if isinstance(row, dict) else row
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow("messages is not a list of objects")
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(turns) < 2 or turns != [("user", "assistant")[n % 2] for n in range(len(turns))]:
        raise BadRow(f"turns do not alternate: {'-'.join(map(str, roles))[:60]}")
    if turns[-1] != "assistant":
        raise BadRow("the user has the last word")
    if not all(_speaks(message.get("content")) for message in messages):
        raise BadRow("a message without text")
    return {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}


def _speaks(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return (
        isinstance(content, list)
        and bool(content)
        and all(
            isinstance(p, dict) and p.get("type") in PART_TYPES and isinstance(p.get("text"), str)
            for p in content
        )
    )


class SmolTalk(Task):
    """General conversations: `SmolTalk("train" | "test")`. They are trained on, never marked."""

    name = "SmolTalk"

    def __init__(
        self,
        split: str = "train",
        *,
        path: str | Path | None = None,
        seed: int = 42,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        if split not in ("train", "test"):
            raise UserError(f"SmolTalk has no split {split!r}; use train or test")
        folder, tried = _chat_folder(path)
        if folder is not None:
            rows = read_chat_folder(folder)
            self._take(rows)
            mixed = shuffled(rows.items, seed)
            num_test = max(1, round(len(mixed) * TEST_SHARE))
            self._rows: Any = mixed[num_test:] if split == "train" else mixed[:num_test]
            self._numbers: list[int] | range = range(len(self._rows))
        else:
            hub = Hub("HuggingFaceTB/smol-smoltalk", None, split)
            self._rows = open_hub(hub, self.name, tried).shuffle(seed=seed)
            self.source = str(hub)
            self._numbers = self._usable(stop)

    def _usable(self, wanted: int | None) -> list[int]:
        """Numbers of the first `wanted` usable rows; the rows themselves stay on disk, half a million of them."""
        numbers: list[int] = []
        bad: list[str] = []
        reasons: Counter[str] = Counter()
        for number, row in enumerate(self._rows):
            if wanted is not None and len(numbers) >= wanted:
                break
            try:
                parse_chat(row)
                numbers.append(number)
            except BadRow as error:
                reasons[str(error).split(":")[0]] += 1
                bad.append(f"{self.name}:{number}: {error}")
        if len(bad) >= MAX_BAD_SHARE * (len(bad) + len(numbers)):
            raise UserError(
                f"{self.source}: {len(bad)} of {len(bad) + len(numbers)} rows cannot be used ({bad[:1]})"
            )
        if bad:
            print0(f"left out {len(bad)} rows of {self.source}, the first {bad[0]}")
        self.skipped, self.bad_rows = dict(reasons), tuple(bad)
        return numbers

    def num_examples(self) -> int:
        return len(self._numbers)

    def get_example(self, index: int) -> Conversation:
        return parse_chat(self._rows[self._numbers[index]])

    def evaluate(self, conversation: Conversation, text: str) -> bool:
        raise UserError("SmolTalk is trained on, not marked; evaluate another task")


def _chat_folder(path: str | Path | None) -> tuple[Path | None, list[str]]:
    """The folder of local conversations, if there is one, and where it was looked for."""
    if path is not None:
        if not Path(path).is_dir():
            raise UserError(f"{path} is not a folder of conversations; correct the path or leave it out")
        return Path(path), []
    folders = [folder / "chat" for folder in (data_dir(), base_dir()) if folder is not None]
    found = next((folder for folder in folders if any(folder.glob("*.jsonl*"))), None)
    return found, [str(folder) for folder in folders]


def read_chat_folder(folder: Path) -> Rows[Conversation]:
    """All conversations of the folder's files, but those of GSM8K: it is a part of its own, with rows held out."""
    files = sorted(file for file in folder.glob("*.jsonl*") if "gsm8k" not in file.name)
    lines = itertools.chain.from_iterable(read_lines(file) for file in files)
    return parse_rows(lines, parse_chat, source=f"{folder} ({len(files)} files)", max_bad_share=MAX_BAD_SHARE)

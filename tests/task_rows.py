"""Rows, files and a hub for the tests of tasks: an empty base dir, no local data and no network unless a test makes them."""

from __future__ import annotations

import gzip
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tasks import common
from tasks.aqua import Problem

REAL = Path(os.environ.get("NANOCHAT_DATA_DIR") or Path(__file__).parents[2] / "shared" / "data")
needs_real_data = pytest.mark.skipif(
    not (REAL / "aqua").is_dir(), reason="no real data beside the repository"
)

RAW = {
    "question": "What is 3 * 7?",
    "options": ["A)21", "B)24", "C)10", "D)37", "E)2"],
    "rationale": "3 * 7 = 21\nAnswer is A",
    "correct": "A",
}
PROBLEM = Problem("What is 3 * 7?", ("21", "24", "10", "37", "2"), "A", "3 * 7 = 21\nAnswer is A")


@pytest.fixture(autouse=True, name="base")
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty base dir, no local data, no network."""
    for name in ("NANOCHAT_DATA_DIR", "AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(common, "reachable", lambda url: False)
    monkeypatch.setattr("nanochat.dataset.reachable", lambda url: False)
    return tmp_path / "base"


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def numbered(count: int) -> list[dict[str, Any]]:
    words = ["apples", "boats", "cats", "doors", "eggs", "figs", "goats", "hats", "inks", "jars"]
    return [
        {
            **RAW,
            "question": f"{words[n % 10]} {words[n // 10 % 10]} {words[n // 100 % 10]}?",
            "correct": "ABCDE"[n % 5],
        }
        for n in range(count)
    ]


GOOD_CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


class FakeDatasets(types.ModuleType):
    """The `datasets` package as far as it is used: rows that can be iterated and shuffled."""

    def __init__(self, rows: list[Any] | Exception) -> None:
        super().__init__("datasets")
        self.rows, self.asked = rows, list[tuple[Any, ...]]()

    def load_dataset(self, path: str, config: str | None, *, split: str) -> Any:
        self.asked.append((path, config, split))
        if isinstance(self.rows, Exception):
            raise self.rows
        return Shufflable(self.rows)


class Shufflable(list[Any]):
    def shuffle(self, *, seed: int) -> Shufflable:
        return Shufflable(reversed(self))


def with_hub(monkeypatch: pytest.MonkeyPatch, rows: list[Any] | Exception) -> FakeDatasets:
    fake = FakeDatasets(rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(common, "reachable", lambda url: True)
    return fake

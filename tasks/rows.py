"""
Rows of JSON lines: found, read, checked, counted.

Whatever is wrong with a row is said with file, line and reason; below 1 % it is passed over, at or above it the file is
refused, because a file of which every hundredth row is broken is not the file one thinks it is.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from nanochat.common import UserError, print0, write_atomic

Item = TypeVar("Item")

MAX_BAD_SHARE = 0.01
EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


class DataUnavailable(UserError):
    """A data set that is nowhere to be had; it lists where it was looked for. Scripts decide what stands in."""

    def __init__(self, name: str, tried: Iterable[str]) -> None:
        self.name, self.tried = name, list(tried)
        super().__init__(
            f"{name}: not found in {', '.join(self.tried)}; set NANOCHAT_DATA_DIR or go where there is a network"
        )


class BadRow(ValueError):
    """A row that a task cannot use, and why; it is counted and named, never fatal by itself."""


@dataclass(frozen=True, slots=True)
class Rows(Generic[Item]):
    """What was read, from where, and what could not be used."""

    items: list[Item]
    source: str
    skipped: dict[str, int]
    """reason -> count"""
    bad: tuple[str, ...]
    """one line per bad row: file:line, why"""


def find_file(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of `names` that exists in `folder` under one of the known endings."""
    files = (folder / f"{name}{extension}" for name in names for extension in EXTENSIONS)
    return next((file for file in files if file.is_file()), None)


def parse_rows(
    lines: Iterable[tuple[str, Any]],
    parse: Callable[[Any], Item],
    *,
    source: str,
    max_bad_share: float = MAX_BAD_SHARE,
    shape: type | tuple[type, ...] = dict,
) -> Rows[Item]:
    """Run `parse` over (place, row) pairs; count and name the rows it refuses with BadRow; refuse a source of bad rows."""
    items, bad, reasons, total = [], [], Counter[str](), 0
    for place, row in lines:
        total += 1
        try:
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, shape):
                raise BadRow(f"not a JSON {'object' if shape is dict else 'object or list'}")
            items.append(parse(row))
        except BadRow as error:
            reasons[str(error).split(":")[0]] += 1
            bad.append(f"{place}: {error}")
    if not total:
        raise UserError(f"{source} is empty; fetch it again or name another with an explicit path")
    if len(bad) >= max_bad_share * total and bad:
        raise UserError(
            f"{source}: {len(bad)} of {total} rows cannot be used ({bad[0]}); "
            f"less than {max_bad_share:.0%} is passed over, so mend the file or name another"
        )
    for line in bad[:3]:
        print0(f"left out {line}")
    if len(bad) > 3:
        print0(f"left out {len(bad) - 3} more rows of {source}")
    return Rows(items, source, dict(reasons), tuple(bad))


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, row) for each non-empty JSON line of a plain or gzip file; a line that is not JSON comes as BadRow."""
    try:
        with path.open("rb") as plain:
            compressed = plain.read(2) == b"\x1f\x8b"
        number = 0
        with gzip.open(path) if compressed else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path.name}:{number}", _decode_line(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is torn after line {number} ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _decode_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: byte {error.start}")
    except (json.JSONDecodeError, RecursionError) as error:
        return BadRow(f"not JSON: {error}")


def keep_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write `rows` as gzip JSON lines, whole or not at all, the same bytes for the same rows."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, gzip.compress(text.encode(), mtime=0))

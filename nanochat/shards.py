"""
Pretraining text on disk: parquet shards with one `text` column, the last of them validation.

A shard that is torn, empty, of another schema or a copy of another is left out when the folder is opened, by name and with
the reason; a row group or a row that turns out unreadable later leaves its documents empty, is named once and counted.
Nothing is renumbered by that: document n is the same document on every rank and after every restart, so a dataloader's
position is a plain number.

`Texts` is what a dataloader reads: anything with a length and an index. A list of strings will do.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanochat.common import UserError, base_dir, data_dir, print0

SPLITS = ("train", "val")
CACHED_ROW_GROUPS = 8


class Texts(Protocol):
    """Numbered documents; an empty string is a document that could not be read."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> str: ...


@dataclass(frozen=True, slots=True)
class Shard:
    """One readable parquet file and how many documents each of its row groups holds."""

    path: Path
    row_groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shards:
    """What a folder holds: training shards, the validation shard, and the files that were left out with the reason."""

    directory: Path
    train: tuple[Shard, ...]
    validation: Shard
    skipped: dict[str, str]

    def of(self, split: str) -> tuple[Shard, ...]:
        """The shards of `split`: "train", or "val" (also "validation")."""
        if split not in (*SPLITS, "validation"):
            raise UserError(f"pretraining text has no split {split!r}; use train or val")
        return self.train if split == "train" else (self.validation,)


def shard_directory(directory: Path | None = None) -> Path:
    """Where shards are looked for: the folder named, else NANOCHAT_DATA_DIR/pretrain, else base_dir()/base_data."""
    if directory is not None:
        return Path(directory)
    local = data_dir()
    if local is not None and (local / "pretrain").is_dir():
        return local / "pretrain"
    return base_dir() / "base_data"


def open_shards(directory: Path | None = None) -> Shards:
    """Look at every shard of the folder; the last readable one is validation."""
    folder = shard_directory(directory)
    files = sorted(folder.glob("*.parquet")) if folder.is_dir() else []
    readable: list[Shard] = []
    skipped: dict[str, str] = {}
    seen: dict[str, str] = {}
    for file in files:
        print_of_file = _fingerprint(file)
        shard = f"a copy of {seen[print_of_file]}" if print_of_file in seen else _inspect(file)
        if isinstance(shard, str):
            skipped[file.name] = shard
        else:
            seen[print_of_file] = file.name
            readable.append(shard)
    for name, why in skipped.items():
        print0(f"left out {name}: {why}")
    if len(readable) < 2:
        raise UserError(
            f"{folder} holds {len(readable)} readable shards of {len(files)} and two are the least, one of them for "
            "validation; run python -m nanochat.dataset -n 4 or set NANOCHAT_DATA_DIR"
        )
    return Shards(folder, tuple(readable[:-1]), readable[-1], skipped)


def _inspect(path: Path) -> Shard | str:
    """The shard, or why it cannot be used. Only the footer is read: that is where a torn file shows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, meta = file.schema_arrow, file.metadata
            rows = tuple(meta.row_group(number).num_rows for number in range(meta.num_row_groups))
    except (pa.ArrowException, OSError) as error:
        return f"torn or not parquet ({str(error).partition(chr(10))[0][:80]})"
    if "text" not in schema.names:
        return f"no column named text, but {', '.join(schema.names) or 'none'}"
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return f"column text is {kind}, not string"
    return Shard(path, rows) if sum(rows) else "empty"


def _fingerprint(path: Path) -> str:
    """Size and the last 64 KiB, where parquet keeps offsets and statistics: equal only for copies."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 65_536))
        return f"{size}:{hashlib.sha256(file.read()).hexdigest()}"


class ShardTexts:
    """The documents of some shards by number, with the last row groups kept in memory."""

    def __init__(self, shards: Sequence[Shard], left_out: Mapping[str, str] | None = None) -> None:
        self._left_out = dict(left_out or {})
        self._places = [(shard, group) for shard in shards for group in range(len(shard.row_groups))]
        self._ends = list(itertools.accumulate(shard.row_groups[group] for shard, group in self._places))
        self._cache: OrderedDict[int, list[str]] = OrderedDict()
        self.skipped: Counter[str] = Counter()
        """reason -> documents that could not be read so far"""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(number)
        place = bisect.bisect_right(self._ends, number)
        return self._row_group(place)[number - self._ends[place]]  # counted from the end of the group

    def told(self) -> list[str]:
        """What was left out so far, for the report: whole files, and documents inside of others."""
        files = [f"{name}: {why}" for name, why in self._left_out.items()]
        return files + [f"{count:,} documents of {where}" for where, count in self.skipped.items() if count]

    def _row_group(self, place: int) -> list[str]:
        if place in self._cache:
            self._cache.move_to_end(place)
        else:
            self._cache[place] = self._read(*self._places[place])
            if len(self._cache) > CACHED_ROW_GROUPS:
                self._cache.popitem(last=False)
        return self._cache[place]

    def _read(self, shard: Shard, group: int) -> list[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        where = f"{shard.path.name} row group {group}"
        try:
            with pq.ParquetFile(shard.path) as file:
                column = file.read_row_group(group, columns=["text"]).column("text")
            try:
                return [text or "" for text in column.to_pylist()]
            except UnicodeDecodeError:
                return self._decode(column.cast(pa.large_binary()).to_pylist(), where)
        except (pa.ArrowException, OSError) as error:
            self._count(where, "unreadable", shard.row_groups[group], str(error).splitlines()[0][:80])
            return [""] * shard.row_groups[group]

    def _decode(self, rows: list[bytes | None], where: str) -> list[str]:
        texts = []
        for row in rows:
            try:
                texts.append((row or b"").decode())
            except UnicodeDecodeError:
                texts.append("")
        self._count(
            where, "not UTF-8", sum(bool(row) and not text for row, text in zip(rows, texts, strict=True))
        )
        return texts

    def _count(self, where: str, why: str, documents: int, detail: str = "") -> None:
        first = f"{where}: {why}" not in self.skipped
        self.skipped[f"{where}: {why}"] = documents
        if first:
            print0(f"left out {documents} documents of {where}: {why} {detail}".rstrip())


def open_texts(split: str, directory: Path | None = None) -> ShardTexts:
    """The documents of `split` ("train" or "val") by number."""
    shards = open_shards(directory)
    return ShardTexts(shards.of(split), shards.skipped)


def texts(split: str, *, start: int = 0, step: int = 1, directory: Path | None = None) -> Iterator[str]:
    """One pass over the documents start, start + step, ... of `split`; `start=rank, step=size` reads disjointly."""
    documents = open_texts(split, directory)
    for number in range(start, len(documents), step):
        if text := documents[number]:
            yield text


def by_need(weights: Sequence[float], taken: Sequence[int]) -> list[int]:
    """The sources of some weight, the one first whose `taken` is most behind its share; the first among equals."""
    used = [source for source, weight in enumerate(weights) if weight > 0]
    return sorted(used, key=lambda source: taken[source] / weights[source])


def mixed_texts(sources: Sequence[tuple[float, Iterator[str]]]) -> Iterator[str]:
    """
    Texts of several sources, each source its share of the CHARACTERS; ends with the first source that runs dry.

    The share is kept after every document, not by a coin: the order follows from the texts alone, so a restarted
    iterator gives the same texts again. A dataloader takes weighted `Texts` itself and then resumes without replay.
    """
    weights = check_weights([weight for weight, _ in sources])
    iterators: list[Any] = [iter(texts) for _, texts in sources]
    taken = [0] * len(sources)
    while True:
        source = by_need(weights, taken)[0]
        text = next(iterators[source], None)
        if text is None:
            return
        taken[source] += max(1, len(text))
        yield text


def check_weights(weights: Sequence[float]) -> list[float]:
    """`weights` as they are, if they are shares of something."""
    if not weights or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(f"shares {list(weights)} do not mix; give numbers from 0 up, not all of them 0")
    return list(weights)

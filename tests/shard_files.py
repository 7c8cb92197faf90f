"""Shards for tests to write, serve and spoil."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def parquet_bytes(documents: list[str], *, row_group_size: int = 3, column: str = "text") -> bytes:
    buffer = io.BytesIO()
    pq.write_table(
        pa.table({column: pa.array(documents, pa.string())}), buffer, row_group_size=row_group_size
    )
    return buffer.getvalue()


def documents(shard: int, count: int = 10) -> list[str]:
    return [f"shard {shard} document {n}" for n in range(count)]


def write_shards(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        (folder / f"shard_{shard:05d}.parquet").write_bytes(parquet_bytes(documents(shard)))

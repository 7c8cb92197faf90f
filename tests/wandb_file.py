"""
Reads the file that an offline W&B run writes, without any of W&B's readers: those change from version to version.

The file is a LevelDB log: blocks of 32 KiB, records cut into chunks of <crc, length, type>, each record a protobuf message.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FULL, FIRST, MIDDLE, LAST = 32768, 1, 2, 3, 4


def raw_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file; a torn last one is left out."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", data[:7]
    position, pieces = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:  # no header fits: the rest of the block is padding
            position += left
            continue
        crc, size, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0 and size == 0:
            return
        chunk = data[position + 7 : position + 7 + size]
        if len(chunk) < size:
            return
        assert zlib.crc32(bytes([kind]) + chunk) & 0xFFFFFFFF == crc
        position += 7 + size
        pieces = chunk if kind in (FULL, FIRST) else pieces + chunk
        if kind in (FULL, LAST):
            yield pieces


def records(path: Path) -> Iterator[Any]:
    """The same as protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    for raw in raw_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        yield record


def name(item: Any) -> str:
    return ".".join(item.nested_key) if item.nested_key else item.key


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, call by call; a histogram has the keys `<name>.values` and `<name>.bins`."""
    found = [record.history for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{name(item): json.loads(item.value_json) for item in row.item} for row in found]


def run_record(path: Path) -> Any:
    """Project, group, id and config of the run."""
    return next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")


def step_metrics(path: Path) -> dict[str, str]:
    """Metric, or glob, -> the metric that is its x axis."""
    found = [record.metric for record in records(path) if record.WhichOneof("record_type") == "metric"]
    return {metric.name or metric.glob_name: metric.step_metric for metric in found if metric.step_metric}


def summary(path: Path) -> dict[str, Any]:
    """The last value of each summary key."""
    values: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            values |= {name(item): json.loads(item.value_json) for item in record.summary.update}
    return values

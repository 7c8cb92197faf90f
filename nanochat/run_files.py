"""
The run directory: what a stage writes under `runs/<run>/<stage>/`, and how it is read back.

    config.json     settings, command, commit, versions, machine
    metrics.jsonl   {"step", "time", name: number or histogram}; each step stands once, time in seconds of work
    tables/         one .jsonl for each table, each row with its step
    media/          pictures and pages; media.jsonl lists them
    notes.jsonl     {"kind", "text"}: data that was used, what was left out
    summary.json    {"finished", "seconds", "results"}, and "failed" where an error ended the stage

JSON has no NaN, and a diverging loss must not vanish: such values are the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nanochat.common import UserError, base_dir, write_atomic

Row = Mapping[str, Any]
SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values between edges; one more edge than counts."""

    counts: tuple[float, ...]
    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.edges) == len(self.counts) + 1, f"{len(self.counts)} counts, {len(self.edges)} edges"

    @classmethod
    def of(cls, values: Sequence[float], *, num_bins: int = 32) -> Histogram:
        """The histogram of `values`, leaving out what is not finite."""
        import numpy as np

        array = np.asarray(values, dtype=np.float64).ravel()
        counts, edges = np.histogram(array[np.isfinite(array)], bins=num_bins)
        return cls(tuple(counts.tolist()), tuple(edges.tolist()))


def run_dir(run: str, stage: str = "") -> Path:
    """The folder of a run, or of one of its stages. Raises UserError for a name that is no plain file name."""
    return base_dir() / "runs" / check_run_name(run) / stage


def check_run_name(run: str) -> str:
    """`run`, or UserError when it is no plain file name."""
    if not run or run.startswith(".") or not all(c.isalnum() or c in "._-" for c in run):
        raise UserError(
            f"run {run!r}: the name of a run has only letters, digits, '.', '_' and '-', such as aquarat-1"
        )
    return run


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} where there is no file. Raises UserError for a torn one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path} is not JSON; remove it, or run its stage again") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, [] where there is none; a torn last line, left by a crash, is not one."""
    if not path.exists():
        return []
    # Only "\n" ends a line: a completion may hold U+2028 or U+0085, at which splitlines would cut it.
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON; remove that line") from None
    return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, with NaN and infinities as floats again."""
    return [
        {
            name: SPECIAL_FLOATS.get(value, value) if isinstance(value, str) else value
            for name, value in row.items()
        }
        for row in read_lines(path)
    ]


class Files:
    """Writes a run directory. A stage that starts anew sets the old one aside; one that resumes cuts it at its step."""

    def __init__(self, directory: Path, *, resume_step: int | None = None) -> None:
        self.directory = directory
        if resume_step is None:
            _set_aside(directory)
        else:
            for path in [
                directory / "metrics.jsonl",
                directory / "media.jsonl",
                *directory.glob("tables/**/*.jsonl"),
            ]:
                _drop_from(path, resume_step)
        (directory / "summary.json").unlink(missing_ok=True)
        directory.mkdir(parents=True, exist_ok=True)
        self.notes = {(row["kind"], row["text"]) for row in read_lines(directory / "notes.jsonl")}
        kept = read_lines(directory / "metrics.jsonl")
        self.seconds_before = float(kept[-1]["time"]) if kept else 0.0
        self.began = time.monotonic()
        self.results: dict[str, Any] = {}
        self.finished = False
        self.step = -1
        self.row: dict[str, Any] = {}
        self.line_start = 0

    @property
    def seconds(self) -> float:
        """Seconds that this stage has worked, those before a resume included."""
        return self.seconds_before + time.monotonic() - self.began

    def log(self, step: int, metrics: Row) -> None:
        """Write the line of `step`, or write it again with what is new."""
        assert step >= self.step, f"step {step} after step {self.step}: steps must not go back"
        if step > self.step:
            self.row = {}
        self.row.update({name: _jsonable(value) for name, value in metrics.items()})
        line = {"step": step, "time": round(self.seconds, 3), **self.row}
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        handle = os.open(self.directory / "metrics.jsonl", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            if step > self.step:
                self.step, self.line_start = step, os.lseek(handle, 0, os.SEEK_END)
            # Over the old line, and cut only then: a kill between the two leaves the line, never a gap.
            os.pwrite(handle, data, self.line_start)
            os.truncate(handle, self.line_start + len(data))
        finally:
            os.close(handle)

    def sync(self) -> None:
        """Put the metrics onto the disk, before a checkpoint says that their steps are done."""
        with (self.directory / "metrics.jsonl").open("ab") as file:
            os.fsync(file.fileno())

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        """Append `rows` to tables/<name>.jsonl."""
        _append(self.directory / "tables" / f"{name}.jsonl", [{"step": step, **row} for row in rows])

    def media(self, kind: str, name: str, step: int, data: bytes) -> Path:
        """Write a picture or page, and list it."""
        path = Path("media") / f"{name}_{step:06d}.{kind}"
        write_atomic(self.directory / path, data)
        _append(self.directory / "media.jsonl", [{"step": step, "name": name, "file": path.as_posix()}])
        return self.directory / path

    def note(self, kind: str, text: str) -> None:
        """Append to notes.jsonl; what a resumed stage says again stands once."""
        if (kind, text) in self.notes:
            return
        self.notes.add((kind, text))
        _append(self.directory / "notes.jsonl", [{"kind": kind, "text": text}])

    def finish(self, results: Row) -> None:
        """Write summary.json with the results of a stage that reached its end."""
        self.results = {name: _jsonable(value) for name, value in results.items()}
        self.finished = True
        self._summarize(None)

    def close(self, error: BaseException | None = None) -> None:
        """End the record: a stage that did not call `finish`, or that failed after it, still gets its summary."""
        if error is not None or not self.finished:
            self._summarize(error)

    def _summarize(self, error: BaseException | None) -> None:
        summary = {
            "finished": None if error else now(),
            "seconds": round(self.seconds, 3),
            "results": self.results,
        }
        if error is not None:
            summary["failed"] = f"{type(error).__name__}: {error}"
        write_json(self.directory / "summary.json", summary)


def write_json(path: Path, value: Row) -> None:
    """Write an object so that a person can read it, in one piece."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _jsonable(value: Any) -> Any:
    """`value` as JSON has it: tensors and numpy scalars as numbers, what is not finite as a string."""
    if isinstance(value, Histogram):
        return {"counts": list(value.counts), "edges": list(value.edges)}
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _append(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(_jsonable(row), ensure_ascii=False, default=str) + "\n" for row in rows)


def _drop_from(path: Path, step: int) -> None:
    """Keep the lines before `step`: the rest will be written again."""
    if path.exists():
        kept = [row for row in read_lines(path) if row["step"] < step]
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def _set_aside(directory: Path) -> None:
    """Move an earlier record to `.previous/<stage>`, so that starting a stage again by mistake loses nothing."""
    if directory.exists():
        previous = directory.parent / ".previous" / directory.name
        shutil.rmtree(previous, ignore_errors=True)
        previous.parent.mkdir(parents=True, exist_ok=True)
        directory.rename(previous)

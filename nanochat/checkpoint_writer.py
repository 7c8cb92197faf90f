"""
One rank's files of a checkpoint, written beside their final names, hashed on the way, and put onto the disk.

In the background training does not wait for the disk: the tensors are copied first, from a GPU into pinned memory by
copies that queue behind the step just made and before the next, so the host waits for neither; a thread writes the copy.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

UNFINISHED = ".unfinished"
States = dict[Path, dict[str, Any]]


class Writing:
    """The writing of `states`; `wait` returns the files' entries for the meta file, and what went wrong or ''."""

    def __init__(self, states: States, folder: Path, *, background: bool) -> None:
        self.paths = list(states)
        self.seconds = 0.0
        self._outcome: tuple[dict[str, Any], str] = {}, "it was not written"
        self._thread: threading.Thread | None = None
        if not background:
            self._run(states, folder, None)
            return
        copies = {path: _copied(state) for path, state in states.items()}
        copied = None
        if torch.cuda.is_available():
            copied = torch.cuda.Event()
            copied.record()
        # a daemon: a run that fails must end, and what it leaves unfinished nobody reads
        self._thread = threading.Thread(target=self._run, args=(copies, folder, copied), daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> tuple[dict[str, Any], str]:
        if self._thread is not None:
            self._thread.join()
        return self._outcome

    def _run(self, states: States, folder: Path, copied: Any) -> None:
        began = time.perf_counter()
        if copied is not None:
            copied.synchronize()
        self._outcome = _write_all(states, folder)
        self.seconds = time.perf_counter() - began


class _HashingFile:
    """A file that hashes what is written to it, so that nothing needs reading again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.num_bytes += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    """A copy on the host that training does not change; of a GPU's tensor it is there once the stream has got so far."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return copy.copy_(value.detach(), non_blocking=True)


def _write(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Write `state` beside `path`, and onto the disk; return its entry for the meta file."""
    with path.with_name(path.name + UNFINISHED).open("wb") as file:
        hashing = _HashingFile(file)
        torch.save(_on_cpu(state), hashing)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.num_bytes, "sha256": hashing.digest.hexdigest()}


def _write_all(states: States, folder: Path) -> tuple[dict[str, Any], str]:
    """Write every state; return the entries for the meta file, and what went wrong or ''."""
    needed = sum(tensor.nbytes for state in states.values() for tensor in _tensors(state))
    free = shutil.disk_usage(folder).free
    full = f"the disk is full: {folder} has {free / 1e6:,.1f} MB free, this needs {needed / 1e6:,.1f} MB"
    if free < needed:
        return {}, full
    try:
        return {path.name: _write(path, state) for path, state in states.items()}, ""
    except OSError as error:
        return {}, full if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    except RuntimeError as error:  # torch's writer wraps what the file raised
        cause = error.__context__
        no_space = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        return {}, full if no_space else str(error)

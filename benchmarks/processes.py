"""What the survival benchmark asks of the kernel: which processes a driver started, what they hold, and an end to them. Linux."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from contextlib import suppress
from pathlib import Path


def descendants(root: int) -> list[int]:
    """All processes that come of `root`, children before grandchildren, itself left out."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            # the name, in parentheses, may hold anything
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))
    found = list(children[root])
    for pid in found:
        found += children[pid]
    return found


def command_line(pid: int) -> list[str]:
    """The words that started a process; [] when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def stages(root: int) -> list[int]:
    """Processes under `root` that run a stage: Python with -m scripts.X, torchrun and its ranks."""
    return [pid for pid in descendants(root) if any(w.startswith("scripts.") for w in command_line(pid))]


def kill(pids: list[int]) -> None:
    """kill -9, without a word to those that have gone already."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def resident_mib(pid: int) -> float:
    """Memory that a process keeps resident; raises OSError when it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def open_files(pid: int) -> int:
    """File descriptors that a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))

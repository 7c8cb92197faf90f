"""
What is asked of the serving engine, what comes back, and whose turn it is. No tensors, no threads.

Waiting is fair: clients take turns by start-time fair queueing (Goyal, Vin, Cheng 1996) over the tokens they ask for, so
that somebody with a hundred requests does not stand before somebody with one.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nanochat.sampling import Sampling


class Busy(Exception):
    """The line is full; `retry_seconds` says when it probably is not."""

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_seconds} s")
        self.retry_seconds = retry_seconds


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of one sample."""

    sample: int
    token: int
    text: str
    """what it adds to the answer: whole characters, no special token"""
    tool: str = ""
    """what it adds to the talk with the calculator"""
    logprob: float | None = None
    """of the model's own distribution, whatever was sampled from"""
    top: tuple[tuple[int, float], ...] = ()
    """likeliest tokens there, with their log-probabilities"""
    letters: tuple[float, ...] | None = None
    """probabilities of the question's letters, if the answer were due before this token; at the end, the final ones"""
    finish: Literal["stop", "length"] | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The job ends here, through no fault of its own."""

    message: str


Event = Piece | Failure


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What one client asks for; `receive` gets its events, in order."""

    prompt: Sequence[int]
    receive: Callable[[Event], None]
    max_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    num_samples: int = 1
    stop: tuple[str, ...] = ()
    num_top: int | None = None
    """likeliest tokens to report at each place; None: no log-probabilities at all"""
    letters: tuple[str, ...] = ()
    """letters of the question whose probabilities are to be watched"""
    client: str = ""
    """whose turn it counts as"""
    arrived: float = field(default_factory=time.monotonic)


Publish = Callable[[list[tuple[Job, Event]]], None]


def hand_out(events: list[tuple[Job, Event]]) -> None:
    """Give each event to its job."""
    for job, event in events:
        job.receive(event)


class Line:
    """Who is next."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Job]] = []
        self._ends: dict[str, float] = {}  # when each client's requests so far would be served, in fair time
        self._now, self._count = 0.0, 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, job: Job) -> None:
        start = max(self._now, self._ends.get(job.client, 0.0))
        self._ends[job.client] = start + job.num_samples * job.max_tokens
        self._count += 1
        heapq.heappush(self._heap, (start, self._count, job))

    def first(self) -> Job:
        return self._heap[0][2]

    def pop(self) -> Job:
        self._now, _, job = heapq.heappop(self._heap)
        if not self._heap:
            self._ends = {client: end for client, end in self._ends.items() if end > self._now}
        return job

    def remove(self, jobs: set[Job]) -> None:
        self._heap = [entry for entry in self._heap if entry[2] not in jobs]
        heapq.heapify(self._heap)

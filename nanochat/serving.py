"""
Many users, one engine: requests join the batch when there is room and leave it when they are done.

A `Scheduler` is one thread around one Decoder (continuous batching: Orca, OSDI 2022). Between two steps it drops whom
nobody waits for any more, admits who is next, and hands out what the step drew. Everything a step gave is published in
one call, because waking an event loop once for 32 rows costs what waking it for one does.

Waiting is fair (jobs.py) and bounded: a full line refuses at once and says when to come again.

With several GPUs there is a Scheduler for each, and a request goes to the one with least to do.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nanochat.common import UserError
from nanochat.engine import CPU_CHUNK
from nanochat.insight import Answer, Certainty, final_letters, letters_now
from nanochat.jobs import Busy, Event, Failure, Job, Line, Piece, Publish, hand_out
from nanochat.kv_cache import Extent, numbers_per_token
from nanochat.transcript import Transcript

if TYPE_CHECKING:
    from nanochat.decoder import Decoder
    from nanochat.engine import Engine

MAX_ROWS, MAX_WAITING = 32, 256
PREFILL_TOKENS = 4096  # prompt tokens admitted between two steps: who is being answered should not wait long


@dataclass(slots=True)
class Stats:
    """Counts since the start, and the latest first-token times in seconds."""

    requests: int = 0
    refused: int = 0
    cancelled: int = 0
    failed: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    first_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    finish_times: deque[float] = field(default_factory=lambda: deque(maxlen=50))


class Scheduler:
    """One engine and the thread that runs it. Use as a context manager, or `start` and `close`."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_rows: int = MAX_ROWS,
        max_waiting: int = MAX_WAITING,
        publish: Publish = hand_out,
    ) -> None:
        """`max_rows`: samples at once, fewer where the engine's cache holds fewer. `max_waiting`: jobs in line."""
        self.engine, self.publish, self.max_waiting = engine, publish, max_waiting
        self.extent = _extent(engine, max_rows)
        self.stats = Stats()
        self._answers: dict[int, Answer] = {}  # by id of the row
        self._line, self._left = Line(), set[Job]()
        self._entering: list[Job] = []  # out of the line and not yet in flight
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="nanochat-scheduler", daemon=True)

    def start(self) -> Scheduler:
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop after the present step; jobs in flight get no more events."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Scheduler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    @property
    def num_rows(self) -> int:
        return len(self._answers)

    @property
    def load(self) -> int:
        """Samples that are being made or whose prompts are being read, and jobs in line."""
        return self.num_waiting + sum(job.num_samples for job in self._entering) + self.num_rows

    def submit(self, job: Job) -> None:
        """Put a job in line. Raises Busy when that is full, UserError for a job that no one could serve."""
        if not 1 <= job.num_samples <= self.extent.rows:
            raise UserError(f"n={job.num_samples}: this server makes 1 to {self.extent.rows} answers at once")
        self._request(job)  # refuses what the engine would refuse, before it waits
        with self._changed:
            if len(self._line) >= self.max_waiting:
                self.stats.refused += 1
                raise Busy(self._retry_seconds())
            self.stats.requests += 1
            self._line.add(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more; cancelling one that is done does nothing."""
        with self._changed:
            self._left.add(job)
            self._changed.notify()

    def _retry_seconds(self) -> int:
        """How long the line takes at the pace of the latest answers."""
        times = self.stats.finish_times
        if len(times) < 2:
            return 1
        pace = len(times) / max(time.monotonic() - times[0], 1e-3)
        return min(60, max(1, math.ceil(len(self._line) / pace / 2)))

    def _request(self, job: Job) -> Any:
        return self.engine.request(
            job.prompt, job.seed, range(job.num_samples), job.max_tokens, job.sampling, (), True, 0
        )

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self.engine.model.device.type == "cuda":
            torch.cuda.set_device(self.engine.model.device)  # a thread of its own begins with the first GPU
        while not self._closing:
            try:
                with self.engine.decoder(self.extent, check_every=1) as decoder:
                    while self._wait():
                        self._leave(decoder)
                        self._admit(decoder)
                        if decoder.rows:
                            self._step(decoder)
            except (
                Exception
            ) as error:  # out of memory, say: who was in flight is told, everybody else is served
                traceback.print_exc(file=sys.stderr)
                self._fail_all(error)

    def _wait(self) -> bool:
        """Wait until there is something to do; False when it is time to go."""
        with self._changed:
            while not (self._closing or self._answers or self._line or self._left):
                self._changed.wait()
            return not self._closing

    def _leave(self, decoder: Decoder) -> None:
        """Drop the rows and waiting jobs of clients that left."""
        with self._changed:
            left, self._left = self._left, set()
            before = len(self._line)
            if left:
                self._line.remove(left)
            self.stats.cancelled += before - len(self._line)
        gone = [answer for answer in self._answers.values() if answer.job in left]
        self.stats.cancelled += len({answer.job for answer in gone})
        self._drop(decoder, gone)

    def _drop(self, decoder: Decoder, answers: Sequence[Answer]) -> None:
        decoder.drop([answer.row for answer in answers])
        for answer in answers:
            del self._answers[id(answer.row)]

    def _admit(self, decoder: Decoder) -> None:
        """Admit who is next, as long as there is room; a job that needs much room is not overtaken."""
        admitted: list[tuple[Job, Any]] = []
        num_tokens = 0
        with self._changed:
            while self._line and num_tokens < PREFILL_TOKENS:
                job = self._line.first()
                request = self._request(job)
                if not decoder.has_room([*(other for _, other in admitted), request]):
                    break
                self._line.pop()
                admitted.append((job, request))
                num_tokens += len(job.prompt)
        self.stats.prompt_tokens += num_tokens
        self._entering = [job for job, _ in admitted]
        owners = {id(request): job for job, request in admitted}
        for row in decoder.admit([request for _, request in admitted]):
            job = owners[id(row.request)]
            self._answers[id(row)] = Answer(job, row, Transcript(self.engine.tokenizer, stop=job.stop))
        self._entering = []

    def _step(self, decoder: Decoder) -> None:
        """Draw a token of every row and publish what came of it."""
        began = time.monotonic()
        answers = [self._answers[id(row)] for row in decoder.rows]
        letters, certainty = (
            letters_now(decoder, answers, self.engine.tokenizer),
            Certainty.of(decoder, answers),
        )
        finished = set(map(id, decoder.step()))
        events: list[tuple[Job, Event]] = []
        done: list[Answer] = []
        failed: set[Job] = set()
        for answer in answers:
            event = self._event(answer, certainty, letters.get(id(answer.row)))
            events.append((answer.job, event))
            if isinstance(event, Failure):
                failed.add(answer.job)
            elif event.finish:
                done.append(answer)
        self.stats.failed += len(failed)
        done += [answer for answer in answers if answer.job in failed and answer not in done]
        decoder.drop([answer.row for answer in done if id(answer.row) not in finished])
        for answer in done:
            del self._answers[id(answer.row)]
        self._count(answers, done, began)
        self.publish(events)

    def _event(
        self, answer: Answer, certainty: Certainty, letters: tuple[float, ...] | None
    ) -> Piece | Failure:
        """What the row's newest token means to its job."""
        row, job = answer.row, answer.job
        token = row.ids[-1]
        if not math.isfinite(row.logprobs[-1]):
            return Failure("the model's logits are not finite: its weights have diverged")
        said = answer.transcript.take(token)
        text, finish = said.text, "stop" if said.stopped or row.stopped else None
        if finish is None and row.finished:
            finish = "length"
        if finish and not said.stopped:
            last = answer.transcript.close()
            text, finish = text + last.text, "stop" if last.stopped else finish
        if finish and job.letters:
            letters = final_letters(answer, self.engine)
        logprob, top = certainty.about(row, token)
        return Piece(row.sample, token, text, said.tool, logprob, top, letters, finish)  # type: ignore[arg-type]

    def _count(self, answers: Sequence[Answer], done: Sequence[Answer], began: float) -> None:
        now, stats = time.monotonic(), self.stats
        stats.steps += 1
        stats.tokens += len(answers)
        stats.busy_seconds += now - began
        stats.finished += len(done)
        stats.finish_times.extend([now] * len(done))
        stats.first_token_seconds.extend(
            now - answer.job.arrived
            for answer in answers
            if len(answer.row.ids) == 1 and answer.row.sample == 0
        )

    def _fail_all(self, error: Exception) -> None:
        jobs = {*self._entering, *(answer.job for answer in self._answers.values())}
        self._entering = []
        self._answers.clear()
        self.stats.failed += len(jobs)
        self.publish([(job, Failure(f"the model could not go on: {type(error).__name__}")) for job in jobs])


def _extent(engine: Engine, max_rows: int) -> Extent:
    """Room for prompts and answers of any length that the model has, for as many rows as the cache holds."""
    config, length = engine.model.config, engine.model.config.sequence_len
    itemsize = torch.empty(0, dtype=engine.model.compute_dtype).element_size()
    row_bytes = 2 * length * numbers_per_token(config) * itemsize
    rows = max(1, min(max_rows, engine.cache_bytes // row_bytes))
    small = rows > 8 and engine.model.device.type == "cpu"
    return Extent(rows, length, rows, length + 1, CPU_CHUNK if small else length + 1)


class Pool:
    """The schedulers of all devices."""

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        assert schedulers
        self.schedulers = list(schedulers)
        self._of: dict[Job, Scheduler] = {}

    @property
    def engine(self) -> Engine:
        return self.schedulers[0].engine

    def start(self) -> None:
        for scheduler in self.schedulers:
            scheduler.start()

    def close(self) -> None:
        for scheduler in self.schedulers:
            scheduler.close()

    def submit(self, job: Job) -> int:
        """Put the job where there is least to do; the number of that scheduler."""
        number, scheduler = min(enumerate(self.schedulers), key=lambda pair: pair[1].load)
        scheduler.submit(job)
        self._of[job] = scheduler
        return number

    def release(self, job: Job) -> None:
        """The job is done, or its client left."""
        if scheduler := self._of.pop(job, None):
            scheduler.cancel(job)

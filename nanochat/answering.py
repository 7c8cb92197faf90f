"""
From a request to tokens: what every route does before and while the scheduler works.

A `Host` knows the model behind the server and its defaults; `Host.ask` turns prompts into jobs and gives back a `Ticket`,
whose events arrive in the event loop while generation runs in threads of its own. Whoever takes a ticket closes it: then
the rows of a client that left are given to others.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from nanochat.common import UserError
from nanochat.jobs import Event, Failure, Job, Piece, hand_out
from nanochat.sampling import Sampling

if TYPE_CHECKING:
    from nanochat.api_schema import Message
    from nanochat.serving import Pool
    from nanochat.tokenizer import Tokenizer


COLDEST = 1e-4  # below it no token but the likeliest is ever drawn, and fp32 cannot hold the weights: greedy


class ContextOverflow(UserError):
    """The prompt leaves no room for an answer; `field` of the request is what is too long."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class ModelFailed(Exception):
    """The model could not finish; the message is fit for clients."""


class Question(Protocol):
    """A multiple-choice question as a user wrote it."""

    @property
    def letters(self) -> Sequence[str]: ...
    @property
    def options(self) -> Sequence[str]: ...
    @property
    def prompt(self) -> str:
        """The question as the model was trained to be asked."""


def _no_question(text: str) -> Question | None:
    return None


def _no_answer(text: str, letters: Sequence[str]) -> str | None:
    return None


@dataclass(frozen=True)
class Exam:
    """What the server knows of multiple-choice questions; by default nothing. Tasks hand it in from above."""

    read: Callable[[str], Question | None] = _no_question
    mark: Callable[[str, Sequence[str]], str | None] = _no_answer
    """the letter that an answer's text gives"""
    gallery: Sequence[dict[str, Any]] = ()
    """questions to try: question, options, letters, gold, prompt"""
    source: str = ""


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing."""

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 256


@dataclass
class Host:
    """The model behind the server."""

    pool: Pool
    model_id: str
    source: str = "sft"
    step: int = 0
    defaults: Defaults = field(default_factory=Defaults)
    exam: Exam = field(default_factory=Exam)
    created: int = field(default_factory=lambda: int(time.time()))
    """when the model began to be served, in Unix seconds"""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.pool.engine.tokenizer

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.pool.engine.model.config.sequence_len

    def deliver_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the schedulers' events arrive in this event loop."""

        def publish(events: list[tuple[Job, Event]]) -> None:
            loop.call_soon_threadsafe(hand_out, events)

        for scheduler in self.pool.schedulers:
            scheduler.publish = publish

    def sampling(self, temperature: float | None, top_k: int | None, top_p: float | None) -> Sampling:
        default = self.defaults
        temperature = default.temperature if temperature is None else temperature
        return Sampling(
            temperature if temperature >= COLDEST else 0.0,
            default.top_k if top_k is None else min(top_k, self.pool.engine.model.config.vocab_size),
            default.top_p if top_p is None else top_p,
        )

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the model goes on from. Raises UserError for a conversation that it cannot answer."""
        turns = as_turns(messages)
        if turns[-1]["role"] != "user":
            raise UserError("the last message must be the user's: it is what the model answers")
        return self.fitting(
            self.tokenizer.render_for_completion({"messages": turns}),
            "messages have",
            "shorten them, or begin a new conversation",
        )

    def fitting(self, ids: list[int], have: str = "prompt has", cure: str = "shorten it") -> list[int]:
        """The same ids. Raises ContextOverflow where they leave no room for an answer."""
        if len(ids) >= self.context:
            raise ContextOverflow(
                f"this model's context is {self.context} tokens and your {have} {len(ids)}: {cure}",
                have.split()[0],
            )
        return ids

    def ask(
        self, prompts: Sequence[Sequence[int]], *, seed: int | None, num_samples: int = 1, **what: Any
    ) -> Ticket:
        """Put a job for each prompt in line. Raises Busy or UserError, and then none is."""
        seed = secrets.randbits(63) if seed is None else seed
        ticket = Ticket(self.pool, len(prompts) * num_samples)
        try:
            for number, prompt in enumerate(prompts):
                ticket.add(prompt, number * num_samples, seed=seed, num_samples=num_samples, **what)
        except BaseException:
            ticket.close()
            raise
        return ticket


def as_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """
    Messages as the tokenizer takes them: `developer` is `system`, and neighbours of one role become one message, because
    the model has only seen turns that alternate.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        text = message.text()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + text
        else:
            turns.append({"role": role, "content": text})
    return turns


class Ticket:
    """One client's answers on their way; choice number = prompt's number * num_samples + sample's number."""

    def __init__(self, pool: Pool, num_choices: int) -> None:
        self.pool, self.num_choices = pool, num_choices
        self.num_prompt_tokens = 0
        self.gpu = 0
        self._jobs: list[Job] = []
        self._inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def add(self, prompt: Sequence[int], first: int, **what: Any) -> None:
        job = Job(prompt, lambda event: self._inbox.put_nowait((first, event)), **what)
        self.gpu = self.pool.submit(job)
        self._jobs.append(job)
        self.num_prompt_tokens += len(prompt)

    async def batches(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """(choice, piece) as they come, those that are there already together. Raises ModelFailed."""
        left = self.num_choices
        while left:
            waiting = [await self._inbox.get()]
            while not self._inbox.empty():
                waiting.append(self._inbox.get_nowait())
            batch = []
            for first, event in waiting:
                if isinstance(event, Failure):
                    raise ModelFailed(event.message)
                batch.append((first + event.sample, event))
                left -= event.finish is not None
            yield batch

    def close(self) -> None:
        """Nobody waits for these answers any more."""
        for job in self._jobs:
            self.pool.release(job)
        self._jobs = []

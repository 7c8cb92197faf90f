"""
How sure the model is while it answers: looks that a client asks for, between the steps of the decoder.

Letters: what the model would say if the answer were due now. `Answer:` is run through it behind what it has said so far,
from the keys and values that are there, and forgotten again. Where the answer really stands, they are read as RL's
telemetry reads them (letters.py).

Certainty: the model's own distribution of a token, temperature 1 and nothing cut, whatever it is then sampled from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanochat.jobs import Job
from nanochat.letters import answer_position, letter_logits
from nanochat.rows import Row
from nanochat.transcript import Transcript

if TYPE_CHECKING:
    from nanochat.decoder import Decoder
    from nanochat.engine import Engine
    from nanochat.tokenizer import Tokenizer

LETTERS_EVERY = 2  # tokens between looks at the letters


@dataclass(slots=True, eq=False)
class Answer:
    """A sample in flight."""

    job: Job
    row: Row
    transcript: Transcript


def letters_now(
    decoder: Decoder, answers: Sequence[Answer], tokenizer: Tokenizer
) -> dict[int, tuple[float, ...]]:
    """Probabilities of the letters, by id of the row, for answers that are watched and have not come to their letter."""
    watched, cues = [], []
    for answer in answers:
        if answer.job.letters and len(answer.row.ids) % LETTERS_EVERY == 0:
            ids = answer.row.ids
            position, appended = answer_position(tokenizer, ids)
            if appended:
                watched.append(answer)
                cues.append(position[len(ids) :])
    if not watched:
        return {}
    logits = decoder.peek([answer.row for answer in watched], cues)
    return {
        id(answer.row): shares_of(row[tokenizer.letter_ids(answer.job.letters)])
        for answer, row in zip(watched, logits, strict=True)
    }


def final_letters(answer: Answer, engine: Engine) -> tuple[float, ...]:
    """The letters where the finished answer gives its own."""
    tokenizer, row = engine.tokenizer, answer.row
    ids, _ = answer_position(tokenizer, row.ids[:-1] if row.stopped else row.ids)
    sequence = [*row.request.prompt, *ids]
    return shares_of(letter_logits(engine.model, [sequence], [tokenizer.letter_ids(answer.job.letters)])[0])


@dataclass(frozen=True, slots=True)
class Certainty:
    """The model's own log-probabilities before a step, for the rows whose job wants them."""

    places: dict[int, int]
    logprobs: Tensor | None
    top: Any = None

    @classmethod
    def of(cls, decoder: Decoder, answers: Sequence[Answer]) -> Certainty:
        asked = [answer for answer in answers if answer.job.num_top is not None]
        if not asked:
            return cls({}, None)
        logprobs = torch.log_softmax(decoder.logits([answer.row for answer in asked]), -1)  # (r,V)
        most = max(answer.job.num_top or 0 for answer in asked)
        top = logprobs.topk(most) if most else None
        values = (top.indices.tolist(), top.values.tolist()) if top else None
        numbers = {id(answer.row): number for number, answer in enumerate(asked)}
        counts = [answer.job.num_top or 0 for answer in asked]
        return cls(numbers, logprobs, (values, counts))

    def about(self, row: Row, token: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """The log-probability of the token that was drawn, and the likeliest ones."""
        number = self.places.get(id(row))
        if number is None or self.logprobs is None:
            return None, ()
        values, counts = self.top
        pairs = zip(values[0][number], values[1][number], strict=True) if values else ()
        return self.logprobs[number, token].item(), tuple(pairs)[: counts[number]]


def shares_of(logits: Tensor) -> tuple[float, ...]:
    """Probabilities among the letters alone."""
    return tuple(torch.softmax(logits.float(), -1).tolist())

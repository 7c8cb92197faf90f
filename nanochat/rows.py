"""
What is asked of the decoder, a sample as it grows, and the tokens that steer it: stop tokens and the tool.

No tensors here. The tool is a small state machine per row: an expression is what the model itself sampled between
<|python_start|> and <|python_end|>; its value, if it has one, is queued and then forced, token by token.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanochat.calculator import evaluate
from nanochat.sampling import Sampling

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample: its tokens, and what the sampler thought of each."""

    ids: list[int]
    """The stop token included, when it was sampled."""
    logprobs: list[float]
    """Under the distribution sampled from; 0.0 where the token was forced."""
    mask: list[int]
    """1 where sampled, 0 where the tool forced it."""
    truncated: bool
    """Ended by max_tokens or the model's sequence_len, not by a stop token."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt and which of its samples to make."""

    prompt: Sequence[int]
    seed: int
    samples: range
    max_tokens: int
    sampling: Sampling
    forbid_first: tuple[int, ...] = ()
    use_tools: bool = True
    index: int = 0
    """The caller's own number for it."""


@dataclass(slots=True, eq=False)
class Row:
    """A sample being generated; it grows with every step until it is finished."""

    request: Request
    sample: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    expression: list[int] | None = None
    stopped: bool = False

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen."""
        request = self.request
        return request.sampling if self.ids else request.sampling.with_banned(request.forbid_first)

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.ids) >= self.request.max_tokens

    def completion(self) -> Completion:
        if not math.isfinite(sum(self.logprobs)):
            raise FloatingPointError("the model's logits are not finite: its weights have diverged")
        return Completion(self.ids, self.logprobs, self.mask, truncated=not self.stopped)


class Marks:
    """The special tokens that steer generation, and the tool behind them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stops = frozenset((tokenizer.special("<|assistant_end|>"), tokenizer.bos_id))
        self.answer = tokenizer.special("<|assistant_start|>")
        self.question = tokenizer.special("<|user_start|>")
        self.python = tuple(tokenizer.special(f"<|python_{end}|>") for end in ("start", "end"))
        self.output = tuple(tokenizer.special(f"<|output_{end}|>") for end in ("start", "end"))
        self.all = self.stops.union(self.python)

    def in_answer(self, prompt: Sequence[int]) -> bool:
        """Whether what follows `prompt` is the assistant's turn."""
        turns = [token for token in prompt if token in (self.answer, self.question) or token in self.stops]
        return bool(turns) and turns[-1] == self.answer

    def take_all(self, row: Row, tokens: Sequence[int], logprobs: Sequence[float]) -> int:
        """`take` one after the other, until the row ends or calls the tool; how many were taken."""
        for count, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True), start=1):
            forced_before = bool(row.forced)
            self.take(row, token, logprob)
            if row.finished or (row.forced and not forced_before):
                return count
        return len(tokens)

    def take(self, row: Row, token: int, logprob: float) -> None:
        """Append a token to a row: the forced one if one is due, else the sampled one, and see what follows from it."""
        if row.forced:
            row.ids.append(row.forced.popleft())
            row.logprobs.append(0.0)
            row.mask.append(0)
            return
        row.ids.append(token)
        row.logprobs.append(logprob)
        row.mask.append(1)
        row.stopped = token in self.stops
        if not row.request.use_tools:
            return
        if token == self.python[0]:
            row.expression = []
        elif row.expression is not None and token == self.python[1]:
            result = evaluate(self.tokenizer.decode(row.expression))
            row.expression = None
            if result is not None:
                row.forced.extend((self.output[0], *self.tokenizer.encode(result), self.output[1]))
        elif row.expression is not None:
            row.expression.append(token)

"""
Many rows in flight: admit requests, step, and samples come out finished.

Rows may be admitted and dropped between any two steps, so that everything at once (`Engine.generate`), one row
(`Engine.stream`) and a server are thin loops around the same `Decoder`.

Finished rows leave at once, the last live rows moving into their places: linears, head and sampling see live rows only.
On a GPU, where looking costs a wait, tokens are looked at every `check_every` steps; what a row drew after its end
is thrown away, and a row that called the tool is set back to where it called.

Shapes: R rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.gpt import GPT
from nanochat.kv_cache import DecodeAttend, Grouping, KVCache
from nanochat.rows import Marks, Request, Row
from nanochat.sampling import Sampling, choose, row_keys, signed

CPU_LOGITS, GPU_LOGITS = 2**21, 2**28  # numbers of logits held at once: 8 MiB of fp32 stay in a CPU's cache
CPU_PREFILL, GPU_PREFILL = 2**10, 2**16  # prompt tokens run at once, padding included


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step needs to know of which rows there are."""

    grouping: Grouping
    prompt_lengths: Tensor  # (Q,)
    shortest_prompt: int
    longest_prompt: int
    ways: list[tuple[Sampling, Tensor]]
    """Each way of sampling, with the rows that use it."""


class Decoder:
    """
    Rows in flight and their device state. Between steps every row's last token may still be `pending`: drawn, and not
    yet run through the model, so that the last token of a finished row never is.
    """

    def __init__(self, model: GPT, cache: KVCache, marks: Marks, *, check_every: int = 1) -> None:
        self.model, self.cache, self.marks, self.check_every = model, cache, marks, check_every
        self.rows: list[Row] = []
        self.owners: list[int] = []  # each row's question, an index into:
        self.questions: list[Request] = []
        self.state: dict[str, Tensor] = {}  # one entry per row: token, written, start, key, context, hidden
        self.pending = False
        self.ahead = 0  # tokens drawn on the device that the rows' lists do not have yet
        self.plan: Plan | None = None

    def has_room(self, requests: Sequence[Request]) -> bool:
        """Whether all of these may be admitted now."""
        extent = self.cache.extent
        return (
            len(self.questions) + len(requests) <= extent.questions
            and len(self.rows) + sum(len(request.samples) for request in requests) <= extent.rows
            and all(len(request.prompt) <= extent.prompt for request in requests)
            and all(request.max_tokens + self.check_every <= extent.completion for request in requests)
        )

    @torch.inference_mode()
    def admit(self, requests: Sequence[Request]) -> list[Row]:
        """Prefill the prompts and add their rows, which the next step will draw for."""
        assert self.has_room(requests), f"{len(requests)} requests do not fit into {self.cache.extent}"
        if not requests:
            return []
        self._settle()
        requests = sorted(requests, key=lambda request: len(request.prompt))
        hidden = torch.cat([self._prefill(chunk) for chunk in self._prefill_chunks(requests)])  # (requests,D)
        rows = [Row(request, sample) for request in requests for sample in request.samples]
        repeats = [number for number, request in enumerate(requests) for _ in request.samples]
        device, smear = hidden.device, self.model.config.smear
        numbers = torch.tensor(
            [[signed(row.request.seed), row.sample, len(row.request.prompt)] for row in rows]
        )
        context = [_context(row.request.prompt, smear) for row in rows]
        seeds, samples, start = numbers.to(device).unbind(1)
        new = {
            "token": torch.zeros_like(start),
            "written": torch.zeros_like(start),
            "start": start,
            "key": row_keys(seeds, samples),
            "context": torch.tensor(context, dtype=torch.int64, device=device),
            "hidden": hidden[torch.tensor(repeats, device=device)],
        }
        self.state = {name: torch.cat([self.state[name], x]) if self.rows else x for name, x in new.items()}
        self.owners += [len(self.questions) + number for number in repeats]
        self.questions += requests
        self.rows += rows
        self.plan = None
        return rows

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Draw the next token of every row, or the next `check_every`; finished rows leave and are returned."""
        count = min(self.check_every, max(row.request.max_tokens - len(row.ids) for row in self.rows))
        if first := any(row.request.forbid_first and not row.ids for row in self.rows):
            count = 1  # and from there on they choose freely
        forced = self._forced(count) if any(row.forced for row in self.rows) else None
        drawn = []
        for number in range(count):
            self._settle()
            tokens, logprobs = self._draw()
            if forced is not None:
                tokens = torch.where(forced[number] >= 0, forced[number], tokens)
            self.state["token"], self.pending, self.ahead = tokens, True, number + 1
            drawn.append((tokens, logprobs))
        self.ahead = 0
        if first:
            self.plan = None
        self._take(*(torch.stack(column, dim=1).tolist() for column in zip(*drawn, strict=True)))
        finished = [row for row in self.rows if row.finished]
        self.drop(finished)
        return finished

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> Tensor:
        """The model's own logits (r,V) in fp32 for the next token of these rows, before temperature and top-k."""
        self._settle()
        return self.model.logits(self.state["hidden"][self._places(rows)])

    @torch.inference_mode()
    def peek(self, rows: Sequence[Row], ahead: Sequence[Sequence[int]]) -> Tensor:
        """The logits (r,V) that would follow if each of these rows went on with the tokens of `ahead`; none of them does."""
        self._settle()
        places, smear, device = self._places(rows), self.model.config.smear, self.model.device
        before = [[*row.request.prompt, *row.ids] for row in rows]
        longest = max(map(len, ahead))
        ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in ahead], device=device)
        context = None
        if smear:
            whole = [past + tokens for past, tokens in zip(before, ids.tolist(), strict=True)]
            tails = [[_context(row[: at - longest], smear) for at in range(longest)] for row in whole]
            context = torch.tensor(tails, device=device)
        starts = torch.tensor(list(map(len, before)), device=device)
        owners = [self.owners[place] for place in places]
        prompts = [len(row.request.prompt) for row in rows]
        attend = self.cache.peek_attend(places, owners, prompts, [len(row.ids) for row in rows])
        positions = starts[:, None] + torch.arange(longest, device=device)
        hidden = self.model.hidden(ids, positions=positions, context=context, attend=attend)  # (r,T,D)
        last = torch.tensor([len(tokens) - 1 for tokens in ahead], device=device)
        return self.model.logits(hidden[torch.arange(len(rows), device=device), last])

    def _places(self, rows: Sequence[Row]) -> list[int]:
        number_of = {id(row): number for number, row in enumerate(self.rows)}
        return [number_of[id(row)] for row in rows]

    @torch.inference_mode()
    def drop(self, rows: Sequence[Row]) -> None:
        """Remove rows, finished or not: the last ones move into their places, and so do questions without rows."""
        if not rows:
            return
        leaving = set(map(id, rows))
        kept = [number for number, row in enumerate(self.rows) if id(row) not in leaving]
        longest = max((len(row.ids) for row in self.rows), default=0)
        order, sources, targets = _close_gaps(kept)
        self.cache.move_rows(sources, targets, longest)
        self.rows = [self.rows[number] for number in order]
        self.pending = self.pending and bool(self.rows)
        self.owners = [self.owners[number] for number in order]
        index = torch.tensor(order, dtype=torch.int64, device=self.model.device)
        self.state = {name: x.index_select(0, index) for name, x in self.state.items()}
        order, sources, targets = _close_gaps(sorted(set(self.owners)))
        self.cache.move_questions(sources, targets)
        self.questions = [self.questions[number] for number in order]
        place = {old: new for new, old in enumerate(order)}
        self.owners = [place[owner] for owner in self.owners]
        self.plan = None

    def _prefill_chunks(self, requests: Sequence[Request]) -> Iterator[tuple[int, Sequence[Request]]]:
        """Runs of requests, shortest first, whose padded prompts stay within a budget; each with its first slot."""
        budget = GPU_PREFILL if self.model.device.type == "cuda" else CPU_PREFILL
        start = 0
        for end in range(1, len(requests) + 1):
            full = end < len(requests) and (end + 1 - start) * len(requests[end].prompt) > budget
            if full or end == len(requests):
                yield len(self.questions) + start, requests[start:end]
                start = end

    def _prefill(self, chunk: tuple[int, Sequence[Request]]) -> Tensor:
        """Run prompts, store their keys and values, and return the states (requests,D) of their last tokens."""
        first, requests = chunk
        length, device = max(len(request.prompt) for request in requests), self.model.device
        padded = [[*request.prompt, *[0] * (length - len(request.prompt))] for request in requests]
        ids = torch.tensor(padded, device=device)
        hidden = self.model.hidden(ids, attend=self.cache.prefill_attend(first))
        last = torch.tensor([len(request.prompt) - 1 for request in requests], device=device)
        return hidden[torch.arange(len(requests), device=device), last]

    def _plan(self) -> Plan:
        """What follows from which rows there are; kept on the device until that changes."""
        if self.plan is None:
            device = self.model.device
            lengths = [len(request.prompt) for request in self.questions]
            grouping = Grouping.of(self.owners, self.model.config, device)
            ways: dict[Sampling, list[int]] = {}
            for number, row in enumerate(self.rows):
                ways.setdefault(row.sampling, []).append(number)
            indices = [torch.tensor(numbers, device=device) for numbers in ways.values()]
            self.plan = Plan(
                grouping,
                torch.tensor(lengths, device=device),
                min(lengths),
                max(lengths),
                list(zip(ways, indices, strict=True)),
            )
        return self.plan

    def _settle(self) -> None:
        """Run the pending token of every row through the model."""
        if not self.pending:
            return
        state, plan, smear = self.state, self._plan(), self.model.config.smear
        written = [len(row.ids) + self.ahead - 1 for row in self.rows]
        attend = DecodeAttend(
            cache=self.cache,
            grouping=plan.grouping,
            prompt_lengths=plan.prompt_lengths,
            shortest_prompt=plan.shortest_prompt,
            longest_prompt=plan.longest_prompt,
            written=state["written"],
            shortest=min(written),
            longest=max(written),
        )
        ids, positions = state["token"].unsqueeze(1), (state["start"] + state["written"]).unsqueeze(1)
        context = state["context"].unsqueeze(1) if smear else None
        hidden = self.model.hidden(ids, positions=positions, context=context, attend=attend)  # (R,1,D)
        state["hidden"] = hidden.squeeze(1)
        state["written"] = state["written"] + 1
        state["context"] = torch.cat([ids, state["context"]], dim=1)[:, :smear]
        self.pending = False

    def _draw(self) -> tuple[Tensor, Tensor]:
        """The next token of every row and its log-probability, rows of one way of sampling at a time."""
        ways = self._plan().ways
        if len(ways) == 1:
            return self._draw_rows(slice(None), ways[0][0])
        tokens = torch.empty_like(self.state["token"])
        logprobs = torch.empty(len(self.rows), device=tokens.device)
        for sampling, index in ways:
            tokens[index], logprobs[index] = self._draw_rows(index, sampling)
        return tokens, logprobs

    def _draw_rows(self, index: Tensor | slice, sampling: Sampling) -> tuple[Tensor, Tensor]:
        hidden, keys, positions = (self.state[name][index] for name in ("hidden", "key", "written"))
        config = self.model.config
        size = max(1, (GPU_LOGITS if hidden.is_cuda else CPU_LOGITS) // config.vocab_size)
        parts = []
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            raw = self.model.lm_head(hidden[part]).float()  # (r,V)
            parts.append(choose(raw, keys[part], positions[part], sampling, softcap=config.softcap))
        tokens, logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
        return tokens, logprobs

    def _forced(self, count: int) -> Tensor:
        """The next `count` forced tokens (count,R) of every row, -1 where the row chooses."""
        columns = [[*row.forced, *[-1] * count][:count] for row in self.rows]
        return torch.tensor(columns, device=self.model.device).T

    def _take(self, drawn: list[list[int]], logprobs: list[list[float]]) -> None:
        """Write what was drawn into the rows, up to each one's end or its call of the tool."""
        called = []
        for number, (row, tokens, values) in enumerate(zip(self.rows, drawn, logprobs, strict=True)):
            within = len(row.ids) + len(tokens) <= row.request.max_tokens
            if within and not row.forced and row.expression is None and self.marks.all.isdisjoint(tokens):
                row.ids += tokens
                row.logprobs += values
                row.mask += [1] * len(tokens)
            elif self.marks.take_all(row, tokens, values) < len(tokens) and not row.finished:
                called.append(number)
        if called:
            self._set_back(called)

    def _set_back(self, numbers: Sequence[int]) -> None:
        """Forget what these rows drew beyond their own last token."""
        index = torch.tensor(numbers, device=self.model.device)
        rows = [self.rows[number] for number in numbers]
        tails = [_context([*row.request.prompt, *row.ids[:-1]], self.model.config.smear) for row in rows]
        for name, values in {
            "token": [row.ids[-1] for row in rows],
            "written": [len(row.ids) - 1 for row in rows],
            "context": tails,
        }.items():
            self.state[name][index] = torch.tensor(values, dtype=torch.int64, device=self.model.device)


def _context(ids: Sequence[int], count: int) -> list[int]:
    """The last `count` ids, the last first, -1 where there is none."""
    return [ids[-back] if back <= len(ids) else -1 for back in range(1, count + 1)]


def _close_gaps(kept: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Which old number stands at each new one when the last of `kept` fill the gaps: (order, moved from, moved to)."""
    there = set(kept)
    targets = [number for number in range(len(kept)) if number not in there]
    sources = [number for number in kept if number >= len(kept)]
    order = list(range(len(kept)))
    for source, target in zip(sources, targets, strict=True):
        order[target] = source
    return order, sources, targets

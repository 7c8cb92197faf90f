"""
Keys and values of everything generated so far, kept so that a question is stored, and read, once for all its samples.

Two parts. The prefix: one block per question, made by one prefill, whatever the number of samples. The suffix: one
block per row (a sample being generated), its completion so far. A decode step attends to both:

    prefix   queries of a question's rows stand together, so that one product per (question, head) reads its keys once
    suffix   each row reads its own keys
    joint    sum(exp) and sum(exp * value) of both parts are added, then divided: one softmax over both

No maximum is subtracted before exp. Queries and keys are normalised, hence |score| <= sqrt(head size) * qk_scale**2,
which is 16 where nanochat is; beyond 80 the cache refuses the model rather than overflow.

Completions are stored in chunks of a few places, each chunk one run of memory over all rows: a CPU reads such runs from
memory at 18 GB/s, and the first 32 of 64 places of every row (8 KB here, 8 KB there) at 5.

Storage is one flat buffer, laid out anew for every request and kept between requests. Stale numbers in it are never
summed: every place that is not written is masked.

Shapes: Q questions, N rows of the question that has most, R rows, P prompt positions, C chunks of S completion positions,
H query heads, G key-value heads, M = H / G queries to a key, hd head size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError
from nanochat.gpt import Attend, GPTConfig, causal_attend


@dataclass(frozen=True, slots=True)
class Extent:
    """How much a cache must hold."""

    questions: int
    prompt: int
    rows: int
    completion: int
    chunk: int
    """Completion positions stored together; `completion` itself where memory is no matter."""

    @property
    def num_chunks(self) -> int:
        return -(-self.completion // self.chunk)

    def numel(self, config: GPTConfig) -> int:
        """Numbers to store, keys and values together."""
        places = self.questions * self.prompt + self.rows * self.num_chunks * self.chunk
        return numbers_per_token(config) * places


def numbers_per_token(config: GPTConfig) -> int:
    """Key and value numbers of one position, all layers."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim


class KVCache:
    """The prefix and suffix stores; which slot is whose is the decoder's business."""

    def __init__(self, config: GPTConfig, extent: Extent, storage: Tensor) -> None:
        if config.head_dim**0.5 * config.qk_scale**2 > 80:
            raise UserError(
                f"the engine cannot run qk_scale={config.qk_scale}: exp of the scores would overflow"
            )
        self.config, self.extent = config, extent
        layers, heads, size = config.n_layer, config.n_kv_head, config.head_dim
        prefix = (2, layers, extent.questions, heads, extent.prompt, size)
        suffix = (2, layers, extent.num_chunks, extent.rows, heads, extent.chunk, size)
        count = torch.Size(prefix).numel()
        self.prefix_k, self.prefix_v = storage[:count].view(prefix)  # (L,Q,G,P,hd) each
        self.suffix_k, self.suffix_v = storage[count : count + torch.Size(suffix).numel()].view(
            suffix
        )  # (L,R,G,S,hd)

    def prefill_attend(self, first: int) -> Attend:
        """Attention over prompts (B,T), padded on the right, that also stores them as questions first .. first+B-1."""
        causal = causal_attend(self.config)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            last, length = first + q.size(0), q.size(1)
            self.prefix_k[layer, first:last, :, :length] = k.transpose(1, 2)
            self.prefix_v[layer, first:last, :, :length] = v.transpose(1, 2)
            return causal(layer, q, k, v)

        return attend

    def move_questions(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            for store in (self.prefix_k, self.prefix_v):
                store[:, target] = store[:, source]

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` places of rows; no row is both source and target."""
        chunks = -(-length // self.extent.chunk)
        for source, target in zip(sources, targets, strict=True):
            for store in (self.suffix_k, self.suffix_v):
                store[:, :chunks, target] = store[:, :chunks, source]

    def peek_attend(
        self, rows: Sequence[int], questions: Sequence[int], prompts: Sequence[int], written: Sequence[int]
    ) -> Attend:
        """
        Attention of tokens (B,T) that go on from `rows` and are not stored: a look ahead that leaves no trace.

        `questions`, `prompts` and `written` (B,) say of each row its question's place, that prompt's length and how
        many positions of its completion are stored. Tokens are padded on the right.
        """
        lengths = [prompt + done for prompt, done in zip(prompts, written, strict=True)]
        places = list(zip(rows, questions, prompts, written, lengths, strict=True))
        masks: dict[int | None, Tensor] = {}

        def stored(prefix: Tensor, suffix: Tensor, new: Tensor) -> Tensor:
            """Keys or values (B,G,longest+T,hd): what is stored, padding up to the longest, what is new."""
            whole = new.new_zeros(len(rows), new.size(2), max(lengths) + new.size(1), new.size(3))
            for number, (row, question, prompt, done, length) in enumerate(places):
                whole[number, :, :prompt] = prefix[question, :, :prompt]
                whole[number, :, prompt:length] = suffix[:, row].transpose(0, 1).flatten(1, 2)[:, :done]
            whole[:, :, max(lengths) :] = new.transpose(1, 2)
            return whole

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            window = self.config.window(layer)
            if window not in masks:
                masks[window] = _peek_mask(torch.tensor(lengths, device=q.device), q.size(1), window)
            keys = stored(self.prefix_k[layer], self.suffix_k[layer], k)
            values = stored(self.prefix_v[layer], self.suffix_v[layer], v)
            grouped = q.size(2) != k.size(2)
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), keys, values, attn_mask=masks[window], enable_gqa=grouped
            )
            return y.transpose(1, 2)

        return attend


def _peek_mask(lengths: Tensor, new: int, window: int | None) -> Tensor:
    """Where (B,1,T,longest+T) each of `new` tokens after rows of `lengths` (B,) may look."""
    longest = int(lengths.max())
    place = torch.arange(longest, device=lengths.device).expand(len(lengths), -1)  # (B,longest)
    ahead = lengths[:, None] + torch.arange(new, device=lengths.device)  # (B,T)
    there = torch.cat([place < lengths[:, None], torch.ones_like(ahead, dtype=torch.bool)], dim=1)
    behind = ahead[:, :, None] - torch.cat([place, ahead], dim=1)[:, None, :]  # (B,T,longest+T)
    mask = there[:, None, :] & (behind >= 0)
    return (mask if window is None else mask & (behind < window)).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Where each row's queries stand when rows are grouped by question; unused places repeat row 0."""

    rows: Tensor  # (Q,N) the row at each place
    gather: Tensor  # (Q*G*N*M,) for each place, the index into queries (R*H)
    scatter: Tensor  # (R*H,) for each query, its place

    @classmethod
    def of(cls, owners: Sequence[int], config: GPTConfig, device: torch.device) -> Grouping:
        """From each row's question."""
        width = [0] * (max(owners) + 1)
        members = []
        for owner in owners:
            members.append(width[owner])
            width[owner] += 1
        groups, most, heads = config.n_kv_head, max(width), config.n_head // config.n_kv_head
        rows = torch.zeros(len(width), most, dtype=torch.int64)
        question, member = torch.tensor(owners), torch.tensor(members)
        rows[question, member] = torch.arange(len(owners))
        group, head = torch.arange(groups)[:, None], torch.arange(heads)
        gather = rows[:, None, :, None] * config.n_head + group[:, :, None] * heads + head  # (Q,G,N,M)
        place = (question[:, None, None] * groups + group) * most + member[:, None, None]  # (R,G,1)
        scatter = place * heads + head  # (R,G,M)
        return cls(rows.to(device), gather.flatten().to(device), scatter.flatten().to(device))


@dataclass(slots=True)
class DecodeAttend:
    """
    Attention of one decode step: stores each row's new key and value, then attends to its prefix and suffix.

    `written` (R,) completion positions each row has stored before; `shortest` and `longest` bound it on the host.
    """

    cache: KVCache
    grouping: Grouping
    prompt_lengths: Tensor  # (Q,)
    shortest_prompt: int
    longest_prompt: int
    written: Tensor  # (R,)
    shortest: int
    longest: int
    masks: dict[tuple[str, int], Tensor | None] = field(default_factory=dict)  # layers share them

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._store(layer, k.squeeze(1), v.squeeze(1))
        config = self.cache.config
        # A window that reaches back to the first token hides nothing.
        everything = self.longest_prompt + self.longest + 1
        window = min(config.window(layer) or everything, everything)
        queries = (q.squeeze(1) * config.head_dim**-0.5).flatten(0, 1)  # (R*H,hd)
        total, weighted = self._suffix(layer, queries, window)
        prefix_total, prefix_weighted = self._prefix(layer, queries, window)
        y = (weighted + prefix_weighted) / (total + prefix_total)
        return y.to(q.dtype).view(q.shape)

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        rows, chunk = k.size(0), self.cache.extent.chunk
        for store, new in ((self.cache.suffix_k[layer], k), (self.cache.suffix_v[layer], v)):
            if self.shortest == self.longest:
                store[self.longest // chunk, :rows, :, self.longest % chunk] = new
            else:
                index = torch.arange(rows, device=k.device)
                store[self.written // chunk, index, :, self.written % chunk] = new

    def _suffix(self, layer: int, queries: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Sum of exp (R*H,1) and of exp * value (R*H,hd) over each row's own completion."""
        extent, size = self.cache.extent, queries.size(1)
        rows, heads = len(self.written), self.cache.config.n_kv_head
        first, last = max(0, self.shortest + 1 - window) // extent.chunk, self.longest // extent.chunk + 1
        # Chunks are read whole, runs of memory being cheap; the one chunk of an undivided store is not.
        width = extent.chunk if extent.num_chunks > 1 else self.longest + 1
        k, v = (  # (R*G,width,hd) of every chunk, views
            [store[layer, number, :rows, :, :width].flatten(0, 1) for number in range(first, last)]
            for store in (self.cache.suffix_k, self.cache.suffix_v)
        )
        queries = queries.view(rows * heads, -1, size)  # (R*G,M,hd)
        weights = torch.stack([scores(queries, keys) for keys in k]).exp_()  # (c,R*G,M,width)
        hidden = self._suffix_hidden(first, last, width, window)
        if hidden is not None:
            weights.view(last - first, rows, -1, width).masked_fill_(hidden, 0.0)
        total = weights.sum(-1).sum(0)
        weighted = torch.bmm(weights[0].to(v[0].dtype), v[0])
        for share, values in zip(weights[1:], v[1:], strict=True):
            weighted.baddbmm_(share.to(values.dtype), values)
        return total.view(-1, 1), weighted.view(-1, size)

    def _prefix(self, layer: int, queries: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """The same over the prompts, a product for all rows of a question."""
        grouping, length, size = self.grouping, self.longest_prompt, queries.size(1)
        questions, heads = len(self.prompt_lengths), self.cache.config.n_kv_head
        k = self.cache.prefix_k[layer, :questions, :, :length].flatten(0, 1)  # (Q*G,P,hd), a view
        v = self.cache.prefix_v[layer, :questions, :, :length].flatten(0, 1)
        grouped = queries.index_select(0, grouping.gather).view(questions * heads, -1, size)  # (Q*G,N*M,hd)
        weights = scores(grouped, k).exp_()  # (Q*G,N*M,P)
        hidden = self._prefix_hidden(window)
        if hidden is not None:
            weights.view(questions, heads, grouping.rows.size(1), -1, length).masked_fill_(hidden, 0.0)
        total = weights.sum(-1).view(-1, 1).index_select(0, grouping.scatter)
        weighted = torch.bmm(weights.to(v.dtype), v).view(-1, size)
        return total, weighted.index_select(0, grouping.scatter)

    def _suffix_hidden(self, first: int, last: int, width: int, window: int) -> Tensor | None:
        """Which places (c,R or 1,1,width) of the chunks a row may not see: not yet written, or out of its window."""
        if ("suffix", window) not in self.masks:
            chunk, uniform = self.cache.extent.chunk, self.shortest == self.longest
            chunks = torch.arange(first, last, device=self.written.device) * chunk
            place = chunks[:, None, None, None] + torch.arange(width, device=self.written.device)
            written = (self.written[:1] if uniform else self.written)[:, None, None]
            whole = (
                uniform
                and (last - 1) * chunk + width == self.longest + 1
                and self.longest + 1 - first * chunk <= window
            )
            self.masks["suffix", window] = None if whole else (place > written) | (written - place >= window)
        return self.masks["suffix", window]

    def _prefix_hidden(self, window: int) -> Tensor | None:
        """Which prompt places (Q,1,N or 1,1,P) are padding, or out of the window."""
        ragged = self.shortest_prompt < self.longest_prompt
        windowed = window <= self.longest_prompt + self.longest
        if ("prefix", window) not in self.masks:
            place = torch.arange(self.longest_prompt, device=self.written.device)
            lengths = self.prompt_lengths[:, None, None]
            hidden = place >= lengths  # (Q,1,P)
            if windowed:
                hidden = hidden | (lengths + self.written[self.grouping.rows].unsqueeze(2) - place >= window)
            self.masks["prefix", window] = hidden[:, None, :, None] if ragged or windowed else None
        return self.masks["prefix", window]


def scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Products (B,m,n) in fp32 of queries (B,m,hd) and keys (B,n,hd): exp must not see bf16's three digits."""
    if queries.dtype == torch.float32:
        return torch.bmm(queries, keys.transpose(1, 2))
    if queries.is_cuda:
        return torch.bmm(queries, keys.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(queries.float(), keys.float().transpose(1, 2))

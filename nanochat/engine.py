"""
Generation: many samples of many prompts in one call, or one sample token by token.

What makes it fast is in decoder.py (rows leave when finished), kv_cache.py (a question is prefilled, stored and read
once for its samples) and sampling.py (drawing on the device). What is promised here:

- A sample depends on its prompt, its seed and its number; what else is in the call changes nothing.
- Its log-probabilities are those of the distribution it was sampled from, the stop token's included: stopping is an
  action like any other, to be trained.
- A request too large for the cache is run piece by piece, new questions entering as rows finish.

When the model samples <|python_start|> expression <|python_end|> in its answer, the calculator's result is forced as
<|output_start|> result <|output_end|>, with mask 0 and log-probability 0; an expression without a value forces nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nanochat.common import UserError, progress
from nanochat.decoder import Decoder
from nanochat.gpt import GPT, Block, Linear
from nanochat.head import TiledHead
from nanochat.kv_cache import Extent, KVCache, numbers_per_token
from nanochat.rows import Completion, Marks, Request, Row
from nanochat.sampling import Sampling

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer

__all__ = ["Completion", "Engine"]

CPU_CACHE_BYTES = 2**30
CPU_CHUNK = 16
CPU_TILED_ROWS = 32  # from so many rows on a tiled head pays for its tiling
GPU_CHECK_EVERY = 16


class Engine:
    """A model and a tokenizer, ready to generate. Weights are read anew at every call, so training may go on between."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        cache_bytes: int | None = None,
        check_every: int | None = None,
        compiled: bool = False,
    ) -> None:
        """
        `cache_bytes`: keys and values held at once. `check_every`: steps between looks for stop tokens. `compiled`: compile
        what stands around attention, which halves the kernels of a step: for many calls on a GPU, since it takes a minute.
        """
        self.model, self.tokenizer, self.marks = model, tokenizer, Marks(tokenizer)
        self.cache_bytes = cache_bytes or _default_cache_bytes(model.device)
        self.check_every = check_every or (1 if model.device.type == "cpu" else GPU_CHECK_EVERY)
        self.compiled = compiled
        self.spare: list[Tensor] = []  # cache storage that nobody is using

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int = 1,
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seeds: Sequence[int],
        forbid_first: Sequence[int] = (),
        use_tools: bool = True,
        description: str = "",
    ) -> list[list[Completion]]:
        """
        `num_samples` completions of every prompt, in order. Temperature 0 is greedy (log-probabilities are then those
        of temperature 1); no completion begins with an id of `forbid_first`. With a `description`, progress is shown.
        """
        if not prompts:
            raise UserError("prompts is empty: give at least one")
        if num_samples < 1:
            raise UserError(f"num_samples={num_samples} must be at least 1")
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed per prompt")
        sampling = Sampling(temperature, top_k, top_p)
        requests = [
            self.request(
                prompt, seed, range(num_samples), max_tokens, sampling, forbid_first, use_tools, index
            )
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        extent, pieces = self._plan(requests)
        results: dict[tuple[int, int], Completion] = {}
        with self.decoder(extent, check_every=self.check_every) as decoder:
            rows = _finished(decoder, deque(pieces))
            if description:
                rows = progress(rows, total=len(prompts) * num_samples, description=description)
            for row in rows:
                results[row.request.index, row.sample] = row.completion()
        return [[results[index, sample] for sample in range(num_samples)] for index in range(len(prompts))]

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        forbid_first: Sequence[int] = (),
        use_tools: bool = True,
    ) -> Iterator[tuple[int, float]]:
        """The tokens of one completion as they come, each with its log-probability; the same as generate's sample 0."""
        sampling = Sampling(temperature, top_k, top_p)
        request = self.request(prompt, seed, range(1), max_tokens, sampling, forbid_first, use_tools, 0)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[tuple[int, float]]:
        places = request.max_tokens + 1
        extent = Extent(1, len(request.prompt), 1, places, chunk=places)
        with self.decoder(extent, check_every=1) as decoder:
            [row] = decoder.admit([request])
            while decoder.rows:
                decoder.step()
                yield row.ids[-1], row.logprobs[-1]
            row.completion()  # refuses logits that are not finite

    @contextmanager
    def decoder(self, extent: Extent, *, check_every: int) -> Iterator[Decoder]:
        """A Decoder of that extent, on storage that goes back to the engine afterwards."""
        model = self._policy(extent.rows)
        numel = extent.numel(model.config)
        storage = self._borrow(numel)
        yield Decoder(model, KVCache(model.config, extent, storage), self.marks, check_every=check_every)
        # Not in a `finally`: after an error (weights that diverged, say) the storage may hold NaN, and is dropped.
        if not self.spare:
            self.spare.append(storage)

    def release(self) -> None:
        """Give the cache's memory back; the next call takes it anew. For a trainer, between rollouts and update."""
        self.spare.clear()

    def _borrow(self, numel: int) -> Tensor:
        try:
            storage = self.spare.pop()  # atomic: two streams in two threads never get the same one
        except IndexError:
            storage = None
        if storage is None or storage.numel() < numel:
            del storage
            storage = torch.zeros(numel, dtype=self.model.compute_dtype, device=self.model.device)
        return storage

    def _policy(self, num_rows: int) -> GPT:
        """
        The model as decoding wants it. On a GPU a step reads all matrices, so half the bytes count: they are cast to the
        compute dtype once. On a CPU with many rows the head is the widest product: it is tiled.
        """
        model = self.model
        cast = model.lm_head.weight.dtype != model.compute_dtype
        tile = model.device.type == "cpu" and num_rows >= CPU_TILED_ROWS
        if not (cast or tile or self.compiled):
            return model
        # Parameters are shared with the copy (embeddings and smear are mixed in fp32), then matrices replaced.
        policy = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        within_blocks = [m for block in policy.blocks for m in block.modules() if isinstance(m, Linear)]
        for matrix in (policy.lm_head, *within_blocks) if cast else ():
            weight = matrix.weight.detach().to(model.compute_dtype)
            matrix.weight = nn.Parameter(weight, requires_grad=False)
        for block in policy.blocks if self.compiled else ():
            block.before = partial(_compiled(Block.before), block)  # type: ignore[method-assign]
            block.after = partial(_compiled(Block.after), block)  # type: ignore[method-assign]
        if tile:
            policy.lm_head = TiledHead(policy.lm_head.weight)  # type: ignore[assignment]
        return policy

    def request(
        self,
        prompt: Sequence[int],
        seed: int,
        samples: range,
        max_tokens: int,
        sampling: Sampling,
        forbid_first: Sequence[int],
        use_tools: bool,
        index: int,
    ) -> Request:
        """Check what the user gave, and cut the completion where the model's rows end."""
        config = self.model.config
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens} must be at least 1")
        if not prompt:
            raise UserError(f"prompt {index} is empty: it needs at least one token, such as <|bos|>")
        if len(prompt) >= config.sequence_len:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens and the model's sequence_len is {config.sequence_len}: shorten it"
            )
        for name, ids in ((f"prompt {index}", prompt), ("forbid_first", forbid_first)):
            if ids and (min(ids) < 0 or max(ids) >= config.vocab_size):
                raise UserError(
                    f"{name} holds ids outside 0..{config.vocab_size - 1}: is it another tokenizer's?"
                )
        if len(set(forbid_first)) == config.vocab_size:
            raise UserError(
                "forbid_first holds the whole vocabulary: leave the completion something to begin with"
            )
        limit = min(max_tokens, config.sequence_len - len(prompt))
        tools = use_tools and self.marks.in_answer(prompt)
        return Request(tuple(prompt), seed, samples, limit, sampling, tuple(forbid_first), tools, index)

    def _plan(self, requests: Sequence[Request]) -> tuple[Extent, list[Request]]:
        """How much to hold at once within cache_bytes, and the requests, split where one has too many samples."""
        prompt = max(len(request.prompt) for request in requests)
        completion = max(request.max_tokens for request in requests) + self.check_every
        itemsize = torch.empty(0, dtype=self.model.compute_dtype).element_size()
        tokens = self.cache_bytes // (numbers_per_token(self.model.config) * itemsize)
        samples = len(requests[0].samples)
        size = min(samples, max(1, (tokens - prompt) // completion))
        pieces = [
            dataclasses.replace(request, samples=request.samples[start : start + size])
            for request in requests
            for start in range(0, samples, size)
        ]
        questions = min(len(pieces), max(1, tokens // (prompt + size * completion)))
        rows = questions * size
        # A few rows' completions stay in a CPU's cache, where pieces only cost calls; a GPU has no use for them either.
        chunk = CPU_CHUNK if rows > 8 and self.model.device.type == "cpu" else completion
        return Extent(questions, prompt, rows, completion, chunk), pieces


def _finished(decoder: Decoder, waiting: deque[Request]) -> Iterator[Row]:
    """Decode until nothing waits and nothing runs; each sample as it ends."""
    while waiting or decoder.rows:
        decoder.admit(_next_in(waiting, decoder))
        yield from decoder.step()


def _next_in(waiting: deque[Request], decoder: Decoder) -> list[Request]:
    """The requests to admit now: all that fit, once a quarter of the rows is free, since prefills like company."""
    admitted: list[Request] = []
    if decoder.rows and len(decoder.rows) > 0.75 * decoder.cache.extent.rows:
        return admitted
    while waiting and decoder.has_room([*admitted, waiting[0]]):
        admitted.append(waiting.popleft())
    return admitted


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled once for all blocks, calls and numbers of rows."""
    return torch.compile(function, dynamic=True)


def _default_cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    return max(CPU_CACHE_BYTES, torch.cuda.mem_get_info(device)[0] // 4)

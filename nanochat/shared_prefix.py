"""A question's prompt is run once for all of its completions, forward and backward.

The samples of one question share their prompt, so a plain batch computes the same states `group size` times. Here a
microbatch is ONE row that holds every prompt once and then every completion:

    prompt 1 | prompt 2 | completion 1a | completion 1b | completion 2a | ...      G (P + R) tokens become P + G R

Linear layers and norms see the row without any padding. Attention goes through gpt's `attend` hook: prompts attend
within themselves, completions to their own prompt and to themselves. Positions and the tokens before each token
(`context`, for previous-token mixing) are given, so every completion gets the values, and every weight the gradient,
that it would have alone (tests/test_rl.py: to 2e-6). `shared=False` packs plain padded rows instead, the oracle.

The last token of a completion is a target and never an input; the first is predicted at the prompt's last token.
Idea: PrefixGrouper, arXiv 2506.05433.

Legend: B rows, T tokens of a row, Q prompts of P tokens at most, S completions of R inputs at most, N targets,
H heads of size hd, D model dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from nanochat.gpt import GPT, Attend, GPTConfig
    from nanochat.rl import Episode


@dataclass(frozen=True, slots=True)
class PrefixLayout:
    """Where prompts and completions stand in the single row; -1 is padding."""

    prompts: Tensor  # (Q, P) index into the row
    completions: Tensor  # (S, R)
    owner: Tensor  # (S,) which prompt a completion continues
    index: Tensor  # (N,) both of them flattened, with 0 for padding; N = Q P + S R
    inverse: Tensor  # (T,) where each token of the row stands among the N
    padding: Tensor  # which of the N hold no token


@dataclass(frozen=True, slots=True)
class RLBatch:
    """One microbatch: the inputs, and what is asked of each trained token."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    context: Tensor  # (B, T, k) ids before each token, nearest first, -1 where there is none
    layout: PrefixLayout | None  # None: plain rows
    predict: Tensor  # (N,) index into the flattened (B, T) of the token that predicts each target
    targets: Tensor  # (N,)
    owner: Tensor  # (N,) which of the batch's episodes a target belongs to
    advantages: Tensor  # (N,)
    weights: Tensor  # (N,) what a token counts in the loss
    sampler_logprobs: Tensor  # (N,)
    reference_logprobs: Tensor | None
    episodes: tuple[Episode, ...]

    @property
    def num_targets(self) -> int:
        return self.targets.numel()

    def to(self, device: torch.device | str) -> RLBatch:
        layout = self.layout and PrefixLayout(**_moved(self.layout, device))
        return RLBatch(**{**_moved(self, device), "layout": layout})

    def hidden(self, model: GPT) -> Tensor:
        """States (N, D) from which the targets are predicted: the head runs on no other position."""
        attend = prefix_attend(model.config, self.layout) if self.layout else None
        context = self.context if self.context.size(-1) else None
        states = model.hidden(self.ids, positions=self.positions, context=context, attend=attend)
        return states.flatten(0, 1)[self.predict]


def _moved(holder: RLBatch | PrefixLayout, device: torch.device | str) -> dict[str, Any]:
    values = {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}


class _ToBlocks(torch.autograd.Function):
    """
    (T, ...) to (N, ...), the padded blocks of the layout. Its gradient, and that of _ToRow, is again a picking of rows,
    where torch, which cannot know that no row is picked twice, would add row by row: a twentieth of the update.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: PrefixLayout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].index_select(0, ctx.layout.inverse), None  # nothing depends on padding


class _ToRow(torch.autograd.Function):
    """(N, ...) back to (T, ...)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, layout: PrefixLayout) -> Tensor:
        ctx.layout = layout
        return y.index_select(0, layout.inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        spread = grads[0].index_select(0, ctx.layout.index)
        return spread.index_fill_(0, ctx.layout.padding, 0.0), None


def prefix_attend(config: GPTConfig, layout: PrefixLayout) -> Attend:
    """Attention over the row of a PrefixLayout."""
    masks: dict[tuple[str, int | None], Tensor] = {}

    def mask(kind: str, window: int | None, make: Callable[[PrefixLayout, int | None], Tensor]) -> Tensor:
        if (kind, window) not in masks:
            masks[kind, window] = make(layout, window)
        return masks[kind, window]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = config.window(layer)
        grouped = q.size(2) != k.size(2)
        num_prompts, num_completions = layout.prompts.numel(), layout.completions.numel()
        blocks = [
            _ToBlocks.apply(x.flatten(0, 1), layout).split([num_prompts, num_completions]) for x in (q, k, v)
        ]
        pq, pk, pv = (
            x.unflatten(0, layout.prompts.shape).transpose(1, 2) for x, _ in blocks
        )  # (Q, H, P, hd)
        if window is None or window >= pq.size(2):
            y = F.scaled_dot_product_attention(pq, pk, pv, is_causal=True, enable_gqa=grouped)
        else:
            allowed = mask("prompt", window, _prompt_mask)
            y = F.scaled_dot_product_attention(pq, pk, pv, attn_mask=allowed, enable_gqa=grouped)
        y = y.transpose(1, 2).flatten(0, 1)  # (Q P, H, hd)
        if num_completions:
            sq, sk, sv = (x.unflatten(0, layout.completions.shape).transpose(1, 2) for _, x in blocks)
            keys = torch.cat([_of_owners(pk, layout), sk], dim=2)  # (S, H, P + R, hd)
            values = torch.cat([_of_owners(pv, layout), sv], dim=2)
            allowed = mask("completion", window, _completion_mask)
            own = F.scaled_dot_product_attention(sq, keys, values, attn_mask=allowed, enable_gqa=grouped)
            y = torch.cat([y, own.transpose(1, 2).flatten(0, 1)])
        return cast(Tensor, _ToRow.apply(y, layout)).unsqueeze(0)  # (1, T, H, hd)

    return attend


def _of_owners(x: Tensor, layout: PrefixLayout) -> Tensor:
    """What the prompts have (Q, ...), for each completion (S, ...)."""
    return x.expand(len(layout.owner), *x.shape[1:]) if len(x) == 1 else x.index_select(0, layout.owner)


def _prompt_mask(layout: PrefixLayout, window: int | None) -> Tensor:
    index = torch.arange(layout.prompts.size(1), device=layout.prompts.device)
    behind = index[:, None] - index[None, :]
    return (behind >= 0) & (behind < (window or len(index)))  # (P, P)


def _completion_mask(layout: PrefixLayout, window: int | None) -> Tensor:
    """True where completion token r may look at prompt token j or at completion token j: (S or 1, 1, R, P + R)."""
    device = layout.prompts.device
    lengths = (layout.prompts >= 0).sum(1)  # (Q,)
    # With a single prompt, all completions share one mask: padding stands behind every token that counts.
    lengths = lengths[layout.owner] if len(lengths) > 1 else lengths  # (S or 1,)
    own = torch.arange(layout.completions.size(1), device=device)
    before = torch.arange(layout.prompts.size(1), device=device)
    to_prompt = lengths[:, None, None] + own[None, :, None] - before[None, None, :]  # distance (S, R, P)
    real = (before < lengths[:, None])[:, None, :].expand_as(to_prompt)
    to_own = (own[:, None] - own[None, :]).expand(len(lengths), -1, -1)  # distance (S, R, R)
    allowed = torch.cat([real, to_own >= 0], dim=2)
    if window is not None:
        allowed = allowed & (torch.cat([to_prompt, to_own], dim=2) < window)
    return allowed.unsqueeze(1)


def microbatches(
    groups: Sequence[Sequence[Episode]],
    *,
    token_budget: int,
    smear: int,
    weight: Callable[[int], float] = lambda num_tokens: 1.0,
    shared: bool = True,
) -> list[RLBatch]:
    """Pack the episodes of `groups` into batches of about `token_budget` input tokens, alike lengths together.

    `weight` gives what a token of a completion with so many trained tokens counts. A group over the budget is split,
    at the price of its prompt once per part; a single episode over the budget makes a batch of its own.
    """
    if shared:
        parts = [part for group in groups for part in _split(sorted(group, key=_length), token_budget)]
        parts.sort(key=lambda part: _length(part[-1]))
        plans = _bins(parts, lambda plan: sum(_shared_cost(part) for part in plan), token_budget)
        # Largest first: what a smaller one needs fits where a larger one was, and memory does not grow from each to the next.
        plans.sort(key=lambda plan: sum(map(_shared_cost, plan)), reverse=True)
        return [_shared_batch(plan, smear, weight) for plan in plans]
    episodes = sorted((e for group in groups for e in group), key=lambda e: len(e.prompt_ids) + _length(e))
    rows = _bins(
        [[e] for e in episodes],
        lambda plan: len(plan) * max(_shared_cost(part) for part in plan),
        token_budget,
    )
    return [_plain_batch([e for part in plan for e in part], smear, weight) for plan in rows]


def tokens_of_rows(groups: Sequence[Sequence[Episode]], num_rows: int) -> int:
    """A token budget: what `num_rows` plain rows of the longest episode's length would take; 0 without episodes."""
    lengths = (len(e.prompt_ids) + _length(e) for group in groups for e in group)
    return num_rows * max(lengths, default=0)


def _length(episode: Episode) -> int:
    return len(episode.completion.ids)


def _shared_cost(part: Sequence[Episode]) -> int:
    return len(part[0].prompt_ids) + sum(_length(e) - 1 for e in part)


def _split(group: Sequence[Episode], budget: int) -> Iterator[list[Episode]]:
    part: list[Episode] = []
    for episode in group:
        if part and _shared_cost([*part, episode]) > budget:
            yield part
            part = []
        part.append(episode)
    if part:
        yield part


def _bins(
    parts: Sequence[list[Episode]], cost: Callable[[list[list[Episode]]], int], budget: int
) -> list[list[list[Episode]]]:
    plans: list[list[list[Episode]]] = []
    for part in parts:
        if plans and cost([*plans[-1], part]) <= budget:
            plans[-1].append(part)
        else:
            plans.append([part])
    return plans


def _shared_batch(parts: Sequence[Sequence[Episode]], smear: int, weight: Callable[[int], float]) -> RLBatch:
    episodes = [e for part in parts for e in part]
    owner = [index for index, part in enumerate(parts) for _ in part]
    starts: list[int] = []  # of each prompt, then of each completion
    ids: list[int] = []
    positions: list[int] = []
    context: list[list[int]] = []
    for sequence, skip in [(list(part[0].prompt_ids), 0) for part in parts] + [
        ([*e.prompt_ids, *e.completion.ids[:-1]], len(e.prompt_ids)) for e in episodes
    ]:
        starts.append(len(ids))
        ids += sequence[skip:]
        positions += range(skip, len(sequence))
        context += _context(sequence, smear)[skip:]
    starts.append(len(ids))
    spans = [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]
    prompts, completions = _padded(spans[: len(parts)]), _padded(spans[len(parts) :])
    flat = torch.cat([prompts.flatten(), completions.flatten()])
    layout = PrefixLayout(
        prompts=prompts,
        completions=completions,
        owner=torch.tensor(owner),
        index=flat.clamp(min=0),
        inverse=flat.argsort(stable=True)[(flat < 0).sum() :],
        padding=(flat < 0).nonzero().flatten(),
    )
    predict = [[spans[i][-1], *span] for i, span in zip(owner, spans[len(parts) :], strict=True)]
    inputs = (
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor([context]).view(1, len(ids), smear),
    )
    return _batch(inputs, layout, predict, episodes, weight)


def _plain_batch(episodes: Sequence[Episode], smear: int, weight: Callable[[int], float]) -> RLBatch:
    rows = [[*e.prompt_ids, *e.completion.ids[:-1]] for e in episodes]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    context = [_context(row, smear) + [[-1] * smear] * (width - len(row)) for row in rows]
    positions = torch.arange(width).expand_as(ids)
    predict = [
        range(i * width + len(e.prompt_ids) - 1, i * width + len(row))
        for i, (e, row) in enumerate(zip(episodes, rows, strict=True))
    ]
    inputs = (ids, positions, torch.tensor(context).view(*ids.shape, smear))
    return _batch(inputs, None, predict, episodes, weight)


def _batch(
    inputs: tuple[Tensor, Tensor, Tensor],
    layout: PrefixLayout | None,
    predict: Sequence[Sequence[int]],
    episodes: Sequence[Episode],
    weight: Callable[[int], float],
) -> RLBatch:
    """Keep the sampled tokens as targets; tokens that the tool wrote are inputs only."""
    at, targets, owner, advantages, weights, logprobs = [], [], [], [], [], []
    for index, (episode, places) in enumerate(zip(episodes, predict, strict=True)):
        completion = episode.completion
        share = weight(sum(completion.mask))
        for place, token, logprob, sampled in zip(
            places, completion.ids, completion.logprobs, completion.mask, strict=True
        ):
            if sampled:
                at.append(place)
                targets.append(token)
                owner.append(index)
                advantages.append(episode.advantage)
                weights.append(share)
                logprobs.append(logprob)
    ids, positions, context = inputs
    return RLBatch(
        ids=ids,
        positions=positions,
        context=context,
        layout=layout,
        predict=torch.tensor(at, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        owner=torch.tensor(owner, dtype=torch.int64),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        weights=torch.tensor(weights, dtype=torch.float32),
        sampler_logprobs=torch.tensor(logprobs, dtype=torch.float32),
        reference_logprobs=None,
        episodes=tuple(episodes),
    )


def _context(sequence: Sequence[int], smear: int) -> list[list[int]]:
    return [
        [sequence[t - back] if t >= back else -1 for back in range(1, smear + 1)]
        for t in range(len(sequence))
    ]


def _padded(spans: Sequence[range]) -> Tensor:
    """Index rows filled with -1 on the right: (number of spans, longest span)."""
    width = max(map(len, spans), default=0)
    rows = [[*span] + [-1] * (width - len(span)) for span in spans]
    return torch.tensor(rows, dtype=torch.int64).view(len(spans), width)

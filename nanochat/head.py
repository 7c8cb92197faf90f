"""Log-probabilities and losses of the output head, without ever holding all logits.

At 65,536 tokens of vocabulary the logits of one row of 2,048 take 512 MiB in fp32, and their gradient as much
again: more than the rest of a small model. So positions go through the head a chunk at a time, and nothing of
size V outlives its chunk.

Two ways of doing that, for two needs. A loss that is a weighted sum of log-probabilities, the weights known
beforehand (cross entropy; an on-policy policy gradient), has a gradient known as soon as the chunk's softmax
is, so `weighted_loss` computes it in the forward pass: three products of the size of the head, as many as the plain
way. `token_logprobs` lets any function of the log-probabilities follow (clipped ratios, KL) and pays a fourth
product, since it computes each chunk again in the backward pass. Same idea: https://arxiv.org/abs/2411.09009.

Shapes: N positions, n of them in a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# Logits held at once, in numbers: 4 MiB of fp32 stays in a CPU's cache, 1 GiB keeps a GPU busy.
CPU_CHUNK, GPU_CHUNK = 2**20, 2**28
TILE = 1024  # tokens of the vocabulary in a tile of TiledHead


def softcapped_terms(
    raw: Tensor, targets: Tensor, scale: Tensor, softcap: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """
    Log-probability (n,) of each target, and d(sum(scale * them)) / d(raw), from uncapped logits `raw` (n,V), which are
    overwritten. With low = (1 - tanh) / 2 the slope of tanh is 4 low (1 - low).
    """
    low, weights = _capped(raw, softcap, temperature)
    chosen = weights.gather(-1, targets.unsqueeze(-1))
    total = weights.exp_().sum(-1, keepdim=True)
    factor = (scale * (4.0 / temperature)).unsqueeze(-1)
    slope = weights.mul_(-factor / total).scatter_add_(-1, targets.unsqueeze(-1), factor)
    slope.mul_(low.addcmul_(low, low, value=-1.0))
    return (chosen - total.log()).squeeze(-1), slope.to(raw.dtype)


def softcapped_logprobs(raw: Tensor, targets: Tensor, softcap: float, temperature: float) -> Tensor:
    """Log-probability (n,) of each target from uncapped logits `raw` (n,V), which are overwritten."""
    _, logits = _capped(raw, softcap, temperature)
    chosen = logits.gather(-1, targets.unsqueeze(-1))
    return (chosen - logits.exp_().sum(-1, keepdim=True).log()).squeeze(-1)


def _capped(raw: Tensor, softcap: float, temperature: float) -> tuple[Tensor, Tensor]:
    """
    low = (1 - tanh(raw / softcap)) / 2, in fp32, and the capped logits over the temperature up to a number per row.

    low is a sigmoid, which costs a fifth of tanh. Capped logits lie within 2 * softcap of each other, so that exp needs no
    maximum subtracted unless the temperature is very low (exp(-87) is the least that fp32 holds).
    """
    low = raw.float().mul_(-2.0 / softcap).sigmoid_()
    sharpness = 2.0 * softcap / temperature
    logits = low * -sharpness
    if sharpness > 65.0:
        logits.sub_(logits.amax(-1, keepdim=True))
    return low, logits


@cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled: on a GPU a dozen passes over the logits become two."""
    return torch.compile(function, dynamic=False)


def chunks(num_rows: int, vocab_size: int, device: torch.device, chunk: int | None) -> Iterator[slice]:
    rows = chunk or max(1, (GPU_CHUNK if device.type == "cuda" else CPU_CHUNK) // vocab_size)
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))


class _WeightedLoss(torch.autograd.Function):
    """Forward computes the gradients too; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        softcap: float,
        temperature: float,
        chunk: int | None,
        fuse: bool,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        matrix = weight.to(hidden.dtype)
        terms = fused(softcapped_terms) if fuse else softcapped_terms
        logprobs = torch.empty(len(hidden), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if with_grad else None
        d_weight = torch.zeros(weight.shape, device=weight.device) if with_grad else None
        for rows in chunks(len(hidden), len(weight), hidden.device, chunk):
            raw = hidden[rows] @ matrix.T  # (n,V)
            if d_hidden is None or d_weight is None:
                logprobs[rows] = softcapped_logprobs(raw, targets[rows], softcap, temperature)
                continue
            logprobs[rows], slope = terms(raw, targets[rows], scale[rows], softcap, temperature)
            d_hidden[rows] = slope @ matrix
            add_outer(d_weight, slope, hidden[rows])
        if d_hidden is not None and d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(logprobs)
        return -(scale * logprobs).sum(), logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_hidden, d_weight = ctx.saved_tensors
        # minus: the slopes are those of the log-probabilities, the loss is their negative
        return -grads[0].to(d_hidden.dtype) * d_hidden, -grads[0] * d_weight, *[None] * 7


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps nothing of size V; backward computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float,
        temperature: float,
        chunk: int | None,
    ) -> Tensor:
        matrix = weight.to(hidden.dtype)
        logprobs = torch.empty(len(hidden), device=hidden.device)
        for rows in chunks(len(hidden), len(weight), hidden.device, chunk):
            logprobs[rows] = softcapped_logprobs(hidden[rows] @ matrix.T, targets[rows], softcap, temperature)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.settings = softcap, temperature, chunk
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, targets = ctx.saved_tensors
        softcap, temperature, chunk = ctx.settings
        matrix = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, device=weight.device)
        for rows in chunks(len(hidden), len(weight), hidden.device, chunk):
            raw = hidden[rows] @ matrix.T
            _, slope = softcapped_terms(raw, targets[rows], grads[0][rows], softcap, temperature)
            d_hidden[rows] = slope @ matrix
            add_outer(d_weight, slope, hidden[rows])
        return d_hidden, d_weight, *[None] * 4


def add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (V,D) fp32 += left (n,V)^T right (n,D), in one pass where the dtypes allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total.add_(left.T @ right)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Log-probability (N,) in fp32 of each target under softmax(logits / temperature)."""
    result: Tensor = _TokenLogprobs.apply(hidden, weight, targets, softcap, temperature, chunk)
    return result


def weighted_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor | None = None,
    *,
    softcap: float,
    temperature: float = 1.0,
    chunk: int | None = None,
    fuse: bool = False,
) -> tuple[Tensor, Tensor]:
    """-sum(scale * log-probabilities) over targets >= 0, and the log-probabilities (N,), detached, 0 elsewhere.

    scale (N,) is a constant: no gradient flows into it; default 1.
    """
    live = targets >= 0
    scale = live.float() if scale is None else torch.where(live, scale.detach().float(), 0.0)
    arguments = (softcap, temperature, chunk, fuse, torch.is_grad_enabled())
    if hidden.is_cuda:
        # Dropping the dead positions would cost a wait for the GPU, more than carrying them.
        loss, logprobs = _WeightedLoss.apply(hidden, weight, targets.clamp(min=0), scale, *arguments)
        return loss, torch.where(live, logprobs, 0.0)
    loss, some = _WeightedLoss.apply(hidden[live], weight, targets[live], scale[live], *arguments)
    return loss, torch.zeros_like(scale).masked_scatter_(live, some)


class TiledHead(nn.Module):
    """
    The head's matrix as transposed tiles, for a CPU that decodes many rows again and again: at 256 rows a quarter faster
    than one wide product, whose output does not stay in the cache. Its numbers are those of the matrix at the time.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        """From a matrix (V,D)."""
        super().__init__()
        self.weight = weight  # shared, for whoever asks for device or dtype
        self.tiles = [tile.T.contiguous() for tile in weight.detach().split(TILE)]  # (D,tokens) each

    def forward(self, x: Tensor) -> Tensor:
        """Uncapped logits (R,V) of states (R,D); no gradient."""
        raw = x.new_empty(len(x), len(self.weight))
        for tile, columns in zip(self.tiles, raw.split(TILE, dim=1), strict=True):
            torch.mm(x, tile, out=columns)
        return raw

"""
Choosing the next token, on the device, with a random stream of its own for every row.

A row's randomness is a value: the uniform number at (key, position) is a hash of the two, so a sample depends on its
seed, its number and its position, and not on its neighbours, on the batch's shape or on what was drawn before.

Drawing is by inverse CDF in two levels: sums over blocks of 128 tokens, the block, then the token within it. It
reads the weights once, where torch.multinomial costs more than the model (96 ms against 2 ms for 256 rows of 8,192)
and Gumbel noise over the vocabulary needs as many random numbers as there are logits.

Every draw comes with its log-probability under the distribution that was sampled from: softmax(logits / temperature),
renormalised over what top-k and then top-p left. Temperature 0 is greedy, and the log-probability is then that of
temperature 1: greedy decoding's own distribution would say 0 everywhere and tell nothing.

Shapes: R rows, V vocabulary, K tokens kept, B tokens in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.common import UserError

BLOCK = 128
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: splitmix64's increment
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = 2**64 - 1
COLDEST = 1e-30  # 2 * softcap / temperature must stay within fp32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row chooses: 0 turns top_k off, 1.0 turns top_p off, `banned` ids are never chosen."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature={self.temperature} must be 0 (greedy) or positive; 1.0 is the model's own"
            )
        if (
            0.0 < self.temperature < COLDEST
        ):  # logits / temperature would leave fp32, and look like diverged weights
            raise UserError(f"temperature={self.temperature} is too near 0 to compute with; use 0 (greedy)")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be at least 0; 0 keeps every token")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1; 1 keeps every token")

    def with_banned(self, banned: tuple[int, ...]) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, banned)


# --- random numbers: splitmix64 (Steele, Lea, Flood 2014), https://prng.di.unimi.it/splitmix64.c -----------------


def signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    value &= MASK
    return value - 2**64 if value >> 63 else value


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> copies the sign bit


def mix(x: Tensor) -> Tensor:
    """Scramble int64 so that neighbouring inputs share nothing (products wrap at 64 bits)."""
    x = (x ^ _logical_shift(x, 30)) * signed(MIX_1)
    x = (x ^ _logical_shift(x, 27)) * signed(MIX_2)
    return x ^ _logical_shift(x, 31)


def row_keys(seeds: Tensor, samples: Tensor) -> Tensor:
    """The key of each row's stream, from its prompt's seed and its number among the prompt's samples; int64."""
    return mix(mix(seeds) + (samples + 1) * signed(GOLDEN))


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1) for each (key, position): 48 bits in float64, or 23 in float32 where the device has no float64."""
    bits, dtype = (23, torch.float32) if keys.device.type == "mps" else (48, torch.float64)
    return _logical_shift(mix(keys + (positions + 1) * signed(GOLDEN)), 64 - bits).to(dtype) * 2.0**-bits


# --- drawing -----------------------------------------------------------------------------------------------------


def capped_exp_(raw: Tensor, *, softcap: float, temperature: float) -> Tensor:
    """
    exp(capped logits / temperature) up to a factor per row, in place of the uncapped logits raw (R,V).

    softcap * tanh(x / softcap) = softcap - 2 * softcap * sigmoid(-2 x / softcap), which costs a fifth of tanh. Capped
    logits need no maximum subtracted before exp, unless the temperature is very low. And where y is far below zero,
    sigmoid(y) is exp(y) (at -20 to 2e-9), in half the time that torch's exp takes on a CPU.
    """
    sharpness = 2 * softcap / temperature
    raw.mul_(-2 / softcap).sigmoid_().mul_(-sharpness)  # within [-sharpness, 0]
    if sharpness > 65:  # exp(-87) is the least that fp32 holds
        raw.sub_(raw.amax(-1, keepdim=True))
    return raw.sub_(20.0).sigmoid_()


def draw(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from each row of unnormalised weights (R,V) by u (R,) in [0,1): token (R,) and the row's total (R,)."""
    vocab = weights.size(1)
    sums = [part.sum(-1) for part in _blocks(weights)]
    edges = torch.cat(sums, dim=1).to(u.dtype).cumsum(-1)  # (R,V/B)
    total = edges[:, -1:]
    target = u.unsqueeze(1) * total
    block = (edges <= target).sum(-1, keepdim=True).clamp_(max=edges.size(1) - 1)  # (R,1)
    start = torch.where(block > 0, edges.gather(1, (block - 1).clamp_(min=0)), 0.0)
    # Where the target lies within its block, as a fraction: the block's tokens may add up a little differently.
    share = (target - start) / (edges.gather(1, block) - start)
    index = block * BLOCK + torch.arange(BLOCK, device=weights.device)  # (R,B)
    inside = (
        weights.gather(1, index.clamp(max=vocab - 1)).to(u.dtype).masked_fill_(index >= vocab, 0.0).cumsum(-1)
    )
    share.clamp_(0.0, 1.0 - 4 * torch.finfo(u.dtype).eps)  # below 1: never a token of no weight
    token = (inside <= share * inside[:, -1:]).sum(-1, keepdim=True).clamp_(max=BLOCK - 1)
    return index.gather(1, token).squeeze(1), total.squeeze(1)


def _blocks(weights: Tensor) -> list[Tensor]:
    """The columns of (R,V) as (R,V/B,B), and what is left over as (R,1,rest)."""
    whole = weights.size(1) // BLOCK * BLOCK
    parts = [weights[:, :whole].unflatten(1, (whole // BLOCK, BLOCK))] if whole else []
    return parts + ([weights[:, whole:].unsqueeze(1)] if whole < weights.size(1) else [])


def choose(
    raw: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling, *, softcap: float
) -> tuple[Tensor, Tensor]:
    """
    The next token of each row and its log-probability, from the head's uncapped fp32 output raw (R,V), which is
    overwritten. `positions` (R,) counts the row's own tokens. Every row is drawn by itself.
    """
    if sampling.banned:
        raw[:, list(sampling.banned)] = float("-inf")
    if sampling.temperature == 0.0:
        tokens = raw.argmax(-1)  # capping keeps the order
        weights = _weights_(raw, sampling, softcap, temperature=1.0)
        total = weights.sum(-1, dtype=torch.float32)
    elif sampling.top_k or sampling.top_p < 1.0:
        return _choose_among_kept(raw, keys, positions, sampling, softcap)
    else:
        weights = _weights_(raw, sampling, softcap, temperature=sampling.temperature)
        tokens, total = draw(weights, uniform(keys, positions))
    return tokens, _logprobs(weights, tokens, total)


def _weights_(raw: Tensor, sampling: Sampling, softcap: float, *, temperature: float) -> Tensor:
    """capped_exp_, and nothing for banned ids (the cap would turn their -inf into a finite logit)."""
    banned = raw == float("-inf") if sampling.banned else None
    weights = capped_exp_(raw, softcap=softcap, temperature=temperature)
    return weights if banned is None else weights.masked_fill_(banned, 0.0)


def _logprobs(weights: Tensor, tokens: Tensor, total: Tensor) -> Tensor:
    chosen = weights.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return (chosen.to(total.dtype) / total).log().float()


def _choose_among_kept(
    raw: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling, softcap: float
) -> tuple[Tensor, Tensor]:
    """Top-k first, then top-p of what is left: the fewest likeliest tokens that hold `top_p` of it."""
    num_kept = min(sampling.top_k or raw.size(1), raw.size(1))
    kept, ids = raw.topk(num_kept, dim=-1)  # (R,K), likeliest first
    weights = _weights_(kept, sampling, softcap, temperature=sampling.temperature)
    if sampling.top_p < 1.0:
        before = weights.cumsum(-1) - weights
        before[:, 0] = -1.0  # the likeliest token always stays, even where top_p is too small for fp32
        weights = weights.masked_fill_(before >= sampling.top_p * weights.sum(-1, keepdim=True), 0.0)
    slots, total = draw(weights, uniform(keys, positions))
    return ids.gather(1, slots.unsqueeze(1)).squeeze(1), _logprobs(weights, slots, total)

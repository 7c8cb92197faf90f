"""What one step does to weights: Muon's rule and AdamW's, as functions of tensors.

Muon (https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest orthogonal matrix, so
every direction moves at the same speed. Five polynomials reach that matrix: Polar Express, the best ones in the
worst case (https://arxiv.org/abs/2505.16932). Matrices of one shape are stacked and iterated together.

Both rules take `alive`, 1 or 0 in a tensor: with 0 the step is not taken, weights and momenta stay bit for bit. So a
step can be skipped by what only the device knows (a gradient that is not finite) without asking it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Per iteration, a, b, c of X <- aX + b(XX')X + c(XX')^2 X, from the paper's optimiser, for singular values from 1e-3.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# The coefficients assume singular values of at most 1: 2 % of room for rounding.
POLAR_MARGIN = 1.02
# Muon's momentum climbs for 300 steps: early gradients are soon stale.
MOMENTUM_START, MOMENTUM_STEPS = 0.85, 300.0


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrix to each of `matrices` (n,rows,columns), iterated in `dtype`."""
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * POLAR_MARGIN + 1e-12)  # a zero matrix stays zero
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT  # the products below are of the shorter side's size
    # bf16 is too coarse for the Gram matrix, which squares the singular values
    by_gram = dtype == torch.float32 and x.size(-1) >= 2 * x.size(-2)
    x = _polar_by_gram(x) if by_gram else _polar(x)
    return x.mT if tall else x


def _polar(x: Tensor) -> Tensor:
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _polar_by_gram(x: Tensor) -> Tensor:
    """The same, for a wide x: its long side enters only the first and the last product, near twice as fast at 1 : 4.

    With P = aI + bA + cA^2 and A = XX', the step X <- PX makes of A the matrix PAP: so iterate on A and gather the Ps.
    """
    square = x @ x.mT
    factor = product = torch.empty_like(square)  # both are set in the first round
    for index, (a, b, c) in enumerate(POLAR_EXPRESS):
        if index:
            square = factor @ square @ factor
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor @ product if index else factor
    return product @ x


def muon_update(
    weights: Tensor,
    grads: Tensor,
    momenta: Tensor,
    step: Tensor,
    alive: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    momentum: float,
    dtype: torch.dtype,
) -> Tensor:
    """Move `weights` (n,rows,columns) in place; return the change. `step` counts from 1, this one included."""
    keep = MOMENTUM_START + (momentum - MOMENTUM_START) * torch.clamp((step - 1) / MOMENTUM_STEPS, 0.0, 1.0)
    momenta.lerp_(grads, (1 - keep) * alive)
    direction = orthogonalize(torch.lerp(grads, momenta, keep), dtype).to(
        weights.dtype
    )  # Nesterov's look ahead
    # A tall matrix needs longer steps for its outputs to change as much: sqrt(fan out / fan in).
    size = lr * alive * max(1.0, weights.size(-2) / weights.size(-1)) ** 0.5
    change = -size * direction - (lr * weight_decay * alive) * weights
    weights.add_(change)
    return change


def adamw_update(
    weights: Tensor,
    grads: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    alive: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Move `weights` (n,) in place; return the change. `step` counts from 1, this one included."""
    count = step.clamp(min=1.0)  # 0 only where the first step of all is not taken, and would divide by zero
    mean.lerp_(grads, (1 - betas[0]) * alive)
    square.lerp_(grads.square(), (1 - betas[1]) * alive)
    root = (square / (1 - betas[1] ** count)).sqrt_().add_(eps)
    change = (mean / root).mul_(-lr * alive / (1 - betas[0] ** count))
    change.sub_(weights * (lr * weight_decay * alive))
    weights.add_(change)
    return change


@cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled: an elementwise update becomes one pass over memory."""
    return torch.compile(function, dynamic=False)

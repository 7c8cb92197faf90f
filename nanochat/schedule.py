"""Learning-rate schedules: from a step to the multiplier of every group's initial rate. Pure functions, no state.

A stage picks one and binds its numbers, so that the loop sees only `schedule(step)`:

    schedule = partial(trapezoid, num_steps=config.num_iterations, warmdown=0.4)

Step counts from 0 and the multiplier at step s is used by the s-th update, so the first step of a warm-up already
moves a little and the last step of a warm-down still does.
"""

from __future__ import annotations

import math


def trapezoid(
    step: int, *, num_steps: int, warmup: float = 0.0, warmdown: float = 0.4, final: float = 0.0
) -> float:
    """Up over the first `warmup` share of the steps, flat, then straight down to `final` over the last `warmdown`.

    Most of a run at the full rate and a long descent: better than cosine wherever the run may be prolonged, since
    the flat part does not depend on its end (https://arxiv.org/abs/2405.18392).
    """
    num_up, num_down = round(warmup * num_steps), round(warmdown * num_steps)
    if step < num_up:
        return (step + 1) / (num_up + 1)
    left = num_steps - step
    if left >= num_down or num_down == 0:
        return 1.0
    return final + (1.0 - final) * max(0, left) / num_down


def cosine(step: int, *, num_steps: int, warmup: float = 0.0, final: float = 0.0) -> float:
    """Up over the first `warmup` share of the steps, then down to `final` along half a cosine."""
    num_up = round(warmup * num_steps)
    if step < num_up:
        return (step + 1) / (num_up + 1)
    share = min(1.0, (step - num_up) / max(1, num_steps - num_up))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * share))


def linear_to_zero(step: int, *, num_steps: int) -> float:
    """Straight down from 1; zero is reached just after the last step. RL uses it."""
    return max(0.0, 1.0 - step / num_steps)


def constant(step: int) -> float:
    """Always 1."""
    return 1.0

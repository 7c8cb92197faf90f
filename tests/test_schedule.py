from __future__ import annotations

from functools import partial

import pytest

from nanochat.schedule import constant, cosine, linear_to_zero, trapezoid


def test_trapezoid_known_answer() -> None:
    shape = partial(trapezoid, num_steps=10, warmup=0.2, warmdown=0.4, final=0.2)
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]
    assert [shape(step) for step in range(10)] == pytest.approx(expected)


def test_linear_to_zero_known_answer() -> None:
    assert [linear_to_zero(step, num_steps=4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_cosine_known_answer() -> None:
    shape = partial(cosine, num_steps=5, warmup=0.2, final=0.1)
    assert [shape(step) for step in range(6)] == pytest.approx(
        [0.5, 1.0, 0.1 + 0.9 * 0.8535534, 0.55, 0.1 + 0.9 * 0.1464466, 0.1]
    )


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("shape", [trapezoid, cosine, linear_to_zero])
def test_every_step_of_a_run_moves_and_none_exceeds_the_full_rate(shape: object, num_steps: int) -> None:
    assert callable(shape)
    values = [shape(step, num_steps=num_steps) for step in range(num_steps)]
    assert all(0 < value <= 1 for value in values)
    assert 0 <= shape(num_steps + 5, num_steps=num_steps) <= 1  # beyond the end nothing breaks


def test_without_warm_up_and_warm_down_the_rate_is_constant() -> None:
    assert {trapezoid(step, num_steps=9, warmdown=0.0) for step in range(9)} == {constant(3)} == {1.0}

"""The engine and the calculator: a call's result is forced where it belongs and nowhere else, and costs no log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.characters import (
    ANSWER,
    BOS,
    OUTPUT,
    OUTPUT_END,
    PYTHON,
    PYTHON_END,
    SHAPES,
    STOP,
    USER,
    Characters,
    ask,
    call,
    make_engine,
    make_model,
    make_prompts,
    teacher_forced,
)


@pytest.mark.parametrize("check_every", [1, 2, 3, 4, 5, 16, 64])
def test_the_result_is_forced_with_mask_and_logprob_zero(check_every: int) -> None:
    encode = Characters().encode
    forced = [OUTPUT, *encode("42"), OUTPUT_END]
    completion = ask(call("6*7", after=len(forced)), check_every=check_every)
    said = [*encode("ab"), PYTHON, *encode("6*7"), PYTHON_END]
    assert completion.ids == [*said, *forced, *encode("a"), STOP]
    assert completion.mask == [1] * len(said) + [0] * len(forced) + [1, 1]
    assert [
        logprob == 0.0 for logprob, mask in zip(completion.logprobs, completion.mask, strict=True) if not mask
    ] == [True] * len(forced)
    assert not completion.truncated


@pytest.mark.parametrize("check_every", [1, 4])
def test_two_calls_give_two_results(check_every: int) -> None:
    encode = Characters().encode
    first, second = [OUTPUT, *encode("3"), OUTPUT_END], [OUTPUT, *encode("-1"), OUTPUT_END]
    script = [*call("1+2", after=3, rest=""), *call("1-2", after=4, rest="c")]
    completion = ask(script, check_every=check_every)
    assert completion.ids == [
        *[*encode("ab"), PYTHON, *encode("1+2"), PYTHON_END, *first],
        *[*encode("ab"), PYTHON, *encode("1-2"), PYTHON_END, *second, *encode("c"), STOP],
    ]


@pytest.mark.parametrize("expression", ["", "1/0", "abc", "1+", "(((", "9**9**9"])
def test_an_expression_without_a_value_forces_nothing(expression: str) -> None:
    completion = ask(call(expression))
    assert completion.ids == [*call(expression), STOP]
    assert all(completion.mask)


def test_without_use_tools_nothing_is_forced() -> None:
    assert ask(call("6*7"), use_tools=False).ids == [*call("6*7"), STOP]


@pytest.mark.parametrize("prompt", [[BOS, 12], [BOS, USER, 12], [BOS, ANSWER, 12, STOP, 12]], ids=str)
def test_outside_an_answer_nothing_is_forced(prompt: list[int]) -> None:
    assert ask(call("6*7"), prompt).ids == [*call("6*7"), STOP]


def test_an_end_without_a_start_forces_nothing() -> None:
    script = [*Characters().encode("6*7"), PYTHON_END, *Characters().encode("a")]
    assert ask(script).ids == [*script, STOP]


@pytest.mark.parametrize("max_tokens", range(1, 15))
@pytest.mark.parametrize("check_every", [1, 5])
def test_a_forced_result_respects_max_tokens(max_tokens: int, check_every: int) -> None:
    whole = ask(call("6*7", after=4), check_every=check_every)
    cut = ask(call("6*7", after=4), check_every=check_every, max_tokens=max_tokens)
    assert cut.ids == whole.ids[:max_tokens]
    assert cut.mask == whole.mask[:max_tokens]
    assert cut.truncated == (max_tokens < len(whole.ids))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("check_every", [1, 6])
def test_rows_that_called_the_tool_go_on_as_a_plain_forward_would(
    shape: dict[str, Any], check_every: int
) -> None:
    """A forced result is put in after every digit that a random model samples, so rows call at different times."""
    model = make_model(**shape)
    engine = make_engine(model, check_every=check_every)
    engine.marks.python = (20, 21)  # common characters open and close an expression
    engine.marks.all = engine.marks.stops | {20, 21}
    engine.marks.tokenizer = SevenForAll()  # type: ignore[assignment]
    prompts = [[*prompt, ANSWER] for prompt in make_prompts(5)]
    groups = engine.generate(prompts, num_samples=16, max_tokens=40, seeds=range(5))
    calls = 0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            expected = teacher_forced(model, prompt, completion, 1.0) * torch.tensor(completion.mask)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)
            calls += completion.mask.count(0)
    assert calls > 15


class SevenForAll(Characters):
    """Every expression reads 7."""

    def decode(self, ids: Sequence[int]) -> str:
        return "7"

"""A compiled decode step gives the same samples, and is compiled once for all layers, calls and numbers of rows."""

from __future__ import annotations

import pytest
import torch

from nanochat.config import StageConfig
from nanochat.engine import Engine
from nanochat.train import compiles
from tests.characters import Characters, make_model
from tests.gloo import single


def test_the_flag_compiles_where_it_wins() -> None:
    cpu = single()
    assert StageConfig().compile == "auto"
    assert [compiles(choice, cpu) for choice in ("on", "auto", "off")] == [True, False, False]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # torch's compiler, of torch
@pytest.mark.parametrize("smear", [0, 2])
def test_compiled_samples_are_the_plain_ones(smear: int) -> None:
    model, tokenizer = make_model(smear=smear), Characters()
    prompts = [[0, 1, 9 + n, 2, 3][: 3 + n] for n in range(3)]
    for samples in (4, 7, 2):  # no number of rows is compiled for anew
        asked = {"num_samples": samples, "max_tokens": 8, "seeds": range(3), "use_tools": False}
        plain = Engine(model, tokenizer).generate(prompts, **asked)  # type: ignore[arg-type]
        torch._dynamo.utils.counters.clear()
        ours = Engine(model, tokenizer, compiled=True).generate(prompts, **asked)  # type: ignore[arg-type]
        for a, b in zip(sum(ours, []), sum(plain, []), strict=True):
            assert a.ids == b.ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0  # the last call found all it needs

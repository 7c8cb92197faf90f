"""`pytest --fuzz=50`: fifty times as many examples in every property test, for a long night. And what several files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

INTERNAL = (
    "_hypothesis_internal_use_settings"  # where hypothesis keeps what @settings said; it has no public name
)

# By default an example that takes 200 ms fails, and so does data that is made slowly: on a crowded machine both say nothing.
# The rest is what hypothesis chose for this place, continuous integration or not.
settings.register_profile(
    "patient",
    settings(),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, *settings().suppress_health_check],
)
settings.load_profile("patient")

# W&B's helper process has 30 s to start, after which a run goes on without it: as it should, but not in tests.
os.environ.setdefault("WANDB__SERVICE_WAIT", "300")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=1, help="multiply the examples of every property test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Workers take whole files in this order; with the slow ones first, none is left alone with one at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    factor = config.getoption("--fuzz")
    if factor == 1:
        return
    for function in {getattr(item, "function", None) for item in items}:
        if function is not None and is_hypothesis_test(function):
            said = getattr(function, INTERNAL, settings.default)
            more = settings(said, max_examples=factor * said.max_examples, deadline=None)
            setattr(function, INTERNAL, more)


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Any]:
    """The other side of ssh (cloud_fakes.OtherSide), on which nothing runs any more when the test ends."""
    from cloud_fakes import other_side

    there = other_side(tmp_path / "side")
    yield there
    there.switch_off()

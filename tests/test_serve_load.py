"""A crowd: two hundred clients for a minute get answers and no 5xx, and batching is worth its name. Figures are printed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.serve import Heard, crowd, percentile
from tests.talking import make_host, serving


def test_clients_of_the_benchmark_count_what_the_server_counts() -> None:
    with serving(make_host()) as url:
        heard = asyncio.run(crowd(int(url.rpartition(":")[2]), 6, 0.5, 12))
    assert set(heard.statuses) == {200} and heard.num_answers == heard.statuses[200] >= 6
    assert 1 <= heard.num_tokens / heard.num_answers <= 12
    assert len(heard.first) == heard.num_answers


def test_percentiles() -> None:
    assert [percentile([3.0, 1.0, 2.0], percent) for percent in (0, 50, 99)] == [1.0, 2.0, 3.0]
    assert Heard(num_tokens=10, seconds=2.0).tokens_per_second == 5.0


def benchmark(*words: str) -> dict[str, Any]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=2700,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_two_hundred_clients_get_answers_or_are_told_to_wait() -> None:
    told = benchmark(
        "--crowd=200",
        "--crowd_seconds=4",
        "--repeats=1",
        "--seconds=1",
        "--n_embd=64",
        "--depth=2",
        "--max_tokens=8",
    )
    heard = told["crowd_200"]
    assert set(heard["statuses"]) <= {"200", "429"}
    assert heard["answers"] >= 200, "however slow the machine: who stands in line when time is up is served"
    assert 0 < heard["first_token_p50_ms"] <= heard["first_token_p99_ms"]


@pytest.mark.long
def test_two_hundred_clients_for_a_minute_and_sixteen_against_one() -> None:
    told = benchmark("--crowd=200", "--crowd_seconds=60", "--seconds=6", "--n_embd=128", "--max_tokens=32")
    heard = told["crowd_200"]
    assert set(heard["statuses"]) <= {"200", "429"}, "no 5xx, whatever the crowd"
    assert heard["answers"] >= 200
    for name in (
        "first_token_p50_ms",
        "first_token_p99_ms",
        "between_tokens_p50_ms",
        "between_tokens_p99_ms",
    ):
        assert heard[name] > 0, "printed; how long a crowd waits is the machine's affair"
    assert told["speedup"] >= 4, "sixteen clients at once against one at a time"

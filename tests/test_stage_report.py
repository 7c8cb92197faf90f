"""What a stage logs of a step, and when: on a GPU no step is waited for before the next is queued."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.stage import Stage
from nanochat.train import Step, StepResult
from tests.gloo import single


class Event:
    """A CUDA event that remembers being waited for."""

    def __init__(self) -> None:
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


def make_stage(rows: list[tuple[int, dict[str, Any]]]) -> Stage:
    tracker = SimpleNamespace(log=lambda index, metrics: rows.append((index, metrics)))
    config = SimpleNamespace(run="dummy", log_every=4, save_every=-1, keep_last=1)
    return Stage("base", config, single(), tracker, tag="d1", made_by="", tokenizer="", resumed=None)  # type: ignore[arg-type]


def make_step(index: int, event: Event | None, *, last: bool = False) -> Step:
    result = StepResult(torch.tensor([float(index), 1.0, 0.0, 0.0]), event)
    return Step(index, 1.0, 0.5, 0.1, 64, 0, last, result)


MODEL = GPT(GPTConfig.for_depth(1, vocab_size=16, sequence_len=8))


def test_on_a_cpu_every_step_is_logged_at_once() -> None:
    rows: list[tuple[int, dict[str, Any]]] = []
    stage = make_stage(rows)
    for index in range(1, 4):
        stage.report(make_step(index, None), 9, MODEL, 8)
        assert [row[0] for row in rows] == list(range(1, index + 1))
    assert rows[-1][1]["train/loss"] == 3.0 and rows[-1][1]["time/data_seconds"] == 0.1


def test_on_a_gpu_a_step_is_waited_for_once_the_next_is_queued(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[tuple[int, dict[str, Any]]] = []
    stage, events = make_stage(rows), [Event() for _ in range(7)]
    waited = []
    for index, event in enumerate(events, start=1):
        stage.report(make_step(index, event, last=index == 7), 7, MODEL, 8)
        waited.append([e.waited for e in events].count(True))
    assert waited == [1, 1, 2, 4, 4, 5, 7]  # the first, every fourth and the last are printed
    assert [row[0] for row in rows] == list(range(1, 8))
    assert [row[1]["train/loss"] for row in rows] == list(range(1, 8))


def test_what_is_held_is_logged_before_an_evaluation_and_a_checkpoint() -> None:
    rows: list[tuple[int, dict[str, Any]]] = []
    stage = make_stage(rows)
    stage.report(make_step(2, Event()), 9, MODEL, 8)
    assert rows == []
    stage.log(2, {"val/bpb": 1.0})
    assert [index for index, _ in rows] == [2, 2] and "train/loss" in rows[0][1]

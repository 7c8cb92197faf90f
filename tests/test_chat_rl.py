"""What the RL stage decides before and around a step: which questions, which seeds, how many steps, which folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import UserError
from nanochat.engine import Completion
from scripts.chat_rl import Config, count_steps, names, sample
from tests.gloo import single
from tests.rl_fakes import ByteTokenizer, Choices, ScriptedEngine


class Recorded(ScriptedEngine):
    """Nobody answers, so every group is dead; the seeds of all calls are kept."""

    def __init__(self) -> None:
        super().__init__(ByteTokenizer(), lambda prompt, sample: "no idea")
        self.seeds: list[int] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], *, seeds: Sequence[int], **more: Any
    ) -> list[list[Completion]]:
        self.seeds += seeds
        return super().generate(prompts, seeds=seeds, **more)


def drawn(config: Config, step: int, engine: Any = None) -> list[int]:
    """The questions of a step, of eight."""
    groups = sample(engine or Recorded(), Choices(8), config, single(), step)
    return [group[0].question for group in groups]


SMALL = Config(examples_per_step=4, num_samples=2, permute_options=False)


def test_one_epoch_of_steps_asks_every_question_once() -> None:
    assert count_steps(SMALL, 8) == 2
    assert sorted(drawn(SMALL, 1) + drawn(SMALL, 2)) == list(range(8)), "the first step is 1"
    assert sorted(drawn(SMALL, 3) + drawn(SMALL, 4)) == list(range(8))


def test_a_question_that_refills_a_step_is_sampled_anew() -> None:
    engine = Recorded()
    config = Config(examples_per_step=8, num_samples=2, permute_options=False, dynamic_sampling=True)
    questions = drawn(config, 1, engine)
    assert len(questions) == 32 and set(questions[:8]) == set(questions[8:16]), (
        "each attempt asks all eight again"
    )
    assert len(set(engine.seeds)) == 32, "with the seeds of before it would repeat what it said"


def test_steps_are_as_many_as_asked_for_or_as_the_questions_give() -> None:
    assert count_steps(Config(max_steps=7), 1000) == 7
    assert count_steps(Config(num_epochs=3), 160) == 30
    assert count_steps(Config(), 5) == 1, "few questions are asked again within the step"


def test_wrong_answers_are_never_paid_for() -> None:
    with pytest.raises(UserError, match=r"--wrong_reward=0.25 would pay"):
        Config(wrong_reward=0.25)


def test_folders_and_records_follow_start_and_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert names(Config(model_tag="d8")) == ("d8", "rl")
    assert names(Config(model_tag="d8", reward_control="random")) == ("d8-random", "rl_random")
    assert names(Config(model_tag="d8", save_tag="mine", label="second")) == ("mine", "second")
    assert names(Config(model_tag="d8", source="rl", save_tag="more")) == ("more", "rl")
    with pytest.raises(UserError, match=r"--source=rl .* d8 .*--save_tag"):
        names(Config(model_tag="d8", source="rl"))
    with pytest.raises(UserError, match="there is no sft checkpoint"):
        names(Config())

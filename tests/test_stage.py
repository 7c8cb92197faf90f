"""A stage in this process: cut after any step it ends as if it had not been, on one rank and on two."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.common import UserError, World
from nanochat.config import TrainConfig
from nanochat.dataloader import document_batches
from nanochat.gpt import GPT, GPTConfig
from nanochat.interruption import Stopped
from nanochat.optim import make_optimizer
from nanochat.schedule import trapezoid
from nanochat.stage import Stage, identity, open_stage
from nanochat.train import next_token_loss, train_steps
from scripts.chat_rl import Config
from tests.gloo import run_ranks, single

STEPS = 5
CONFIG = TrainConfig(run="cut", save_every=1, keep_last=2, log_every=1)
TEXTS = [chr(97 + number % 26) * (3 + number % 17) for number in range(200)]


class Bytes:
    bos_id = 0

    def encode_batch(self, texts: list[str], *, bos: bool = False) -> list[list[int]]:
        return [[self.bos_id] * bos + [ord(c) % 50 for c in text] for text in texts]


class Cut(Exception):
    """Stands for kill -9, as far as what is on the disk goes."""


def train(world: World, base: str, *, cut: int = 0, poison: int = 0, stop: int = 0) -> dict[str, Tensor]:
    """Train, or go on, up to the end or until after step `cut`; step `poison` has a loss that is not finite."""
    os.environ["NANOCHAT_BASE_DIR"] = base
    torch.manual_seed(0)
    model = GPT(GPTConfig.for_depth(2, vocab_size=50, sequence_len=12, n_embd=20, n_head=2))
    optimizer = make_optimizer(model, matrix_lr=0.02, embedding_lr=0.02, unembedding_lr=0.004, world=world)

    with open_stage("base", CONFIG, world, tag="t") as stage:
        stage.restore(model, optimizer)
        batches = document_batches(
            TEXTS, Bytes(), batch_size=4 // world.size, sequence_len=12, world=world, state=stage.data_state
        )
        for step in train_steps(
            model, optimizer, batches, partial(loss, stage, poison=poison), num_steps=STEPS, grad_accum=2,
            schedule=partial(trapezoid, num_steps=STEPS, warmdown=0.5), world=world, start=stage.start,
            guard=stage.guard,
        ):  # fmt: skip
            stage.report(step, STEPS, model, 12)
            if step.index == stop and world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
                while not stage.requests.received:
                    time.sleep(0.01)
            if stage.saves(step):
                stage.save(
                    step.index,
                    model,
                    optimizer,
                    data_state=batches.state(),
                    best_value=-step.loss,
                    val=step.loss,
                )
            if step.index == cut:
                raise Cut
    state = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for bucket in optimizer.buckets:
        state |= {f"{bucket.key}/{name}": tensor for name, tensor in bucket.state.items()}
    return state


def loss(stage: Stage, model: GPT, batch: Any, *, poison: int) -> Tensor:
    done = stage.tracker.files.step if stage.tracker.files else -1
    return next_token_loss(model, batch) * (float("nan") if poison and done + 1 == poison else 1.0)


def cut_then_go_on(world: World, base: str, cut: int, stop: int = 0) -> dict[str, Tensor]:
    expected = Stopped if stop else Cut
    with pytest.raises(expected):
        train(world, base, cut=cut, stop=stop)
    return train(world, base)


def learnt(base: Path) -> list[dict[str, Any]]:
    lines = (base / "runs" / "cut" / "base" / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "time" and not k.startswith(("time/", "perf/"))}
        for line in lines
    ]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run that nobody disturbed: its base dir, and what it ended with."""
    folder = tmp_path_factory.mktemp("uncut")
    return folder, train(single(), str(folder))


@pytest.mark.parametrize("cut", range(1, STEPS + 1))
def test_a_run_cut_after_any_step_ends_as_an_uncut_one_bit_for_bit(
    cut: int, uncut: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, expected = uncut
    assert same(cut_then_go_on(single(), str(tmp_path), cut), expected)
    assert learnt(tmp_path) == learnt(folder)
    assert [row["step"] for row in learnt(tmp_path)] == list(range(1, STEPS + 1))
    best = [(base / "base_checkpoints" / "t" / "best").read_text() for base in (folder, tmp_path)]
    assert best[0] == best[1]


def disturbed(world: World, base: str) -> dict[str, dict[str, Tensor]]:
    return {
        "uncut": train(world, f"{base}/uncut"),
        "cut": cut_then_go_on(world, f"{base}/cut", 2),
        "stopped": cut_then_go_on(world, f"{base}/stopped", 0, stop=3),
    }


def test_on_two_ranks_as_well_cut_or_one_of_them_asked_to_stop(tmp_path: Path) -> None:
    for ends in run_ranks(disturbed, 2, str(tmp_path)):
        assert same(ends["cut"], ends["uncut"]) and same(ends["stopped"], ends["uncut"])
    assert learnt(tmp_path / "cut") == learnt(tmp_path / "stopped") == learnt(tmp_path / "uncut")


def test_steps_that_were_skipped_are_still_counted_after_a_cut(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(single(), str(tmp_path), cut=3, poison=2)
    train(single(), str(tmp_path))
    assert [row["train/skipped_steps"] for row in learnt(tmp_path)] == [0, 1, 1, 1, 1]


def test_a_stage_says_what_it_said_once_and_remembers_its_last_evaluation(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(single(), str(tmp_path), cut=3)
    os.environ["NANOCHAT_BASE_DIR"] = str(tmp_path)
    for _ in range(2):
        with open_stage("base", CONFIG, single(), tag="t") as stage:
            stage.tracker.note("data", "the same words")
            assert stage.start == 3 and set(stage.remembered("val")) == {"val"}
    assert (tmp_path / "runs/cut/base/notes.jsonl").read_text().count("the same words") == 1


def test_what_a_checkpoint_costs_is_logged_for_each(uncut: tuple[Path, dict[str, Tensor]]) -> None:
    lines = (uncut[0] / "runs" / "cut" / "base" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == STEPS and all(
        0 < row["time/save_write_seconds"] <= row["time/save_seconds"] for row in rows
    )


def test_two_stages_cannot_hold_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("nanochat.locks.PATIENCE_SECONDS", 0.0)
    with open_stage("base", CONFIG, single(), tag="t"):
        other_run = TrainConfig(run="other")
        with (
            pytest.raises(UserError, match="^base t is in use by process"),
            open_stage("base", other_run, single(), tag="t"),
        ):
            pass
        with (
            pytest.raises(UserError, match="^run cut, stage base, is in use"),
            open_stage("base", CONFIG, single(), tag="u"),
        ):
            pass
        with open_stage("base", other_run, single(), tag="u"):
            pass


def test_a_checkpoint_that_validates_best_is_saved_between_and_only_where_some_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    values = {1: None, 2: 0.3, 3: 0.2, 4: 0.3, 5: 0.5, 6: None}
    for every, expected in ((4, [2, 4, 5, 6]), (-1, [6])):
        with open_stage(
            "rl", dataclasses.replace(CONFIG, run=f"every{every}", save_every=every), single(), tag=str(every)
        ) as stage:
            saved = []
            for step, value in values.items():
                if stage.saves_at(step, last=step == 6, best_value=value):
                    saved.append(step)
                    stage.best = max(filter(None, (stage.best, value)), default=None)
        assert saved == expected


def test_a_run_does_not_go_on_with_another_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = GPT(GPTConfig.for_depth(1, vocab_size=50, sequence_len=12, n_embd=20, n_head=2))
    optimizer = make_optimizer(model, matrix_lr=0.02, embedding_lr=0.02, unembedding_lr=0.004, world=single())
    starts = []
    for tokenizer in (
        "",
        "one",
        "one",
        "two",
    ):  # a checkpoint that names none, as older code left it, fits any
        with open_stage("base", CONFIG, single(), tag="t", tokenizer=tokenizer) as stage:
            starts.append(stage.start)
            stage.saves_at(stage.start + 1, last=True)
            stage.save(stage.start + 1, model, optimizer)
    assert starts == [0, 1, 2, 0]
    assert "they were made with another tokenizer" in capsys.readouterr().out


def test_what_is_only_looked_at_does_not_make_another_run() -> None:
    one = Config(kl_every=5, attn_every=-1, eval_samples=0)
    assert identity(one) == identity(dataclasses.replace(one, kl_every=9, attn_html=True, kl_batch=2))
    assert identity(one) != identity(dataclasses.replace(one, kl_coef=0.1))


def test_microbatches_make_another_run_only_where_they_are_the_whole_step() -> None:
    def made_by(total: int, rows: int, num_ranks: int) -> str:
        config = TrainConfig(total_batch_size=total, device_batch_size=rows)
        return identity(config, num_ranks=num_ranks)

    assert made_by(4096, 8, 1) == made_by(4096, 4, 2) == made_by(4096, 2, 1)
    assert made_by(-1, 8, 1) == made_by(-1, 4, 2) != made_by(-1, 4, 1)

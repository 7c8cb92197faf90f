from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanochat.common import UserError, World
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, make_adamw, make_optimizer
from nanochat.schedule import constant, linear_to_zero
from nanochat.train import (
    NonFiniteGuard,
    Step,
    StepResult,
    compile_model,
    next_token_loss,
    optimizer_step,
    peak_flops,
    train_steps,
)
from tests.gloo import run_ranks, single


@dataclass(frozen=True)
class Batch:
    inputs: Tensor
    targets: Tensor
    segments: Tensor | None = None
    positions: Tensor | None = None

    @property
    def num_targets(self) -> int:
        return int((self.targets >= 0).sum())

    def to(self, device: torch.device) -> Batch:
        return self


@dataclass(frozen=True)
class Points:
    inputs: Tensor
    targets: Tensor

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Points:
        return self


def squares(model: nn.Module, batch: Points) -> Tensor:
    return (model(batch.inputs).squeeze(-1) - batch.targets).square().sum()


def line(num_points: int, *, seed: int = 0) -> Points:
    x = torch.randn(num_points, 4, generator=torch.Generator().manual_seed(seed))
    return Points(x, x @ torch.tensor([1.0, -2.0, 3.0, 0.5]))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False)


def rows(num_rows: int) -> Batch:
    """Rows with very unequal numbers of targets."""
    ids = torch.randint(50, (num_rows, 12), generator=torch.Generator().manual_seed(5))
    targets = ids.roll(-1, 1)
    for row in range(num_rows):
        targets[row, : 3 * row % 11] = -1
    return Batch(ids, targets)


def part(batch: Batch, which: slice) -> Batch:
    return Batch(batch.inputs[which], batch.targets[which])


def tiny_gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig.for_depth(2, vocab_size=50, sequence_len=12, n_embd=20, n_head=2, smear=1))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


def optimizer_for(model: GPT, world: World, kind: str) -> MuonAdamW:
    if kind == "adamw":
        return make_adamw(model, lr=0.01, world=world)
    return make_optimizer(model, matrix_lr=0.02, embedding_lr=0.02, unembedding_lr=0.004, world=world)


def steps_on_rows(world: World, kind: str, num_parts: int) -> dict[str, Any]:
    """Three steps on 8 rows in all; this rank takes rows rank::size, in `num_parts` microbatches."""
    model = tiny_gpt()
    batch = part(rows(8), slice(world.rank, None, world.size))
    size = len(batch.inputs) // num_parts
    microbatches = [part(batch, slice(i * size, (i + 1) * size)) for i in range(num_parts)]
    steps = train_steps(
        model,
        optimizer_for(model, world, kind),
        iter(microbatches * 3),
        next_token_loss,
        num_steps=3,
        grad_accum=num_parts,
        schedule=constant,
        world=world,
        max_grad_norm=0.5,
        want_update_norm=True,
    )
    numbers = [[step.loss, step.grad_norm, step.update_norm, float(step.num_tokens)] for step in steps]
    return {"numbers": torch.tensor(numbers), "weights": {n: w.detach() for n, w in model.named_parameters()}}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    torch.testing.assert_close(ours["numbers"], theirs["numbers"], rtol=1e-5, atol=0)
    for name, weight in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_accumulating_unequal_microbatches_equals_the_big_batch(num_parts: int) -> None:
    assert_same(steps_on_rows(single(), "adamw", num_parts), steps_on_rows(single(), "adamw", 1))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_two_ranks_equal_one(kind: str) -> None:
    alone = steps_on_rows(single(), kind, 1)
    for rank in run_ranks(steps_on_rows, 2, kind, 2):
        assert_same(rank, alone)


def test_the_loss_is_the_mean_over_all_targets() -> None:
    model, batch = tiny_gpt(), rows(8)
    expected = nn.functional.cross_entropy(
        model(batch.inputs).flatten(0, 1), batch.targets.flatten(), ignore_index=-1
    )
    assert steps_on_rows(single(), "adamw", 4)["numbers"][0, 0] == pytest.approx(expected.item(), rel=1e-6)


def test_a_clip_of_zero_is_no_clip_and_the_model_learns() -> None:
    weights = []
    for clip in (None, 0.0, -1.0):
        model, points = linear(), line(16)
        optimizer = make_adamw(model, lr=0.1, world=single(), eps=1.0)
        optimizer_step(
            model,
            optimizer,
            [points],
            squares,
            normalizer=16,
            lr_scale=1.0,
            max_grad_norm=clip,
            world=single(),
        )
        weights.append(model.weight.detach())
    assert not torch.equal(weights[0], linear().weight)
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_clipping_equals_torchs() -> None:
    ours, theirs, points = linear(), linear(), line(16)
    optimizer = make_adamw(
        ours, lr=0.1, world=single(), eps=1.0
    )  # so large an eps that the gradient's size shows
    result = optimizer_step(
        ours, optimizer, [points], squares, normalizer=16, lr_scale=1.0, max_grad_norm=0.3, world=single()
    )
    (squares(theirs, points) / 16).backward()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
    torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0).step()
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-7, rtol=0)


def run_line(
    batches: Iterator[Points], num_steps: int, loss_fn: Callable[[Any, Any], Tensor] = squares, **more: Any
) -> tuple[list[Step], nn.Linear]:
    model = linear()
    optimizer = make_adamw(model, lr=0.1, world=single())
    settings: dict[str, Any] = {"grad_accum": 1, "schedule": constant, "world": single()} | more
    return list(train_steps(model, optimizer, batches, loss_fn, num_steps=num_steps, **settings)), model


def test_a_line_is_learnt_and_steps_count_from_one() -> None:
    schedule = partial(linear_to_zero, num_steps=120)
    steps, _ = run_line((line(32, seed=s) for s in range(120)), 120, schedule=schedule)
    assert steps[0].loss > 5
    assert steps[-1].loss < 0.01
    assert [step.index for step in steps] == list(range(1, 121))
    assert [step.last for step in steps] == [False] * 119 + [True]
    assert [step.lr_scale for step in steps[:2]] == [1.0, 119 / 120]
    assert all(step.num_tokens == 32 * 4 and 0 <= step.data_seconds <= step.seconds for step in steps)


def test_a_run_that_starts_later_makes_the_rest_of_the_steps_at_their_own_rate() -> None:
    steps, _ = run_line(iter([line(4)] * 2), 10, start=8, schedule=partial(linear_to_zero, num_steps=10))
    assert [(step.index, step.lr_scale, step.last) for step in steps] == [
        (9, pytest.approx(0.2), False),
        (10, pytest.approx(0.1), True),
    ]


def test_due() -> None:
    result = StepResult(torch.zeros(4))
    steps = [Step(i, 1.0, 0.1, 0.0, 1, 0, i == 7, result) for i in range(1, 8)]
    assert [step.index for step in steps if step.due(3)] == [3, 6, 7]
    assert [step.index for step in steps if step.due(100)] == [7]
    assert not any(step.due(every) for step in steps for every in (0, -1))


def test_data_that_ends_is_the_users_error() -> None:
    with pytest.raises(UserError, match="ended at step 3"):
        run_line(iter([line(4)] * 2), 5)


def poisoned(model: nn.Module, batch: Points) -> Tensor:
    """Squares; not a number for a batch that begins with a large point."""
    return squares(model, batch) * (float("nan") if batch.inputs[0, 0] > 100 else 1.0)


def bad_line() -> Points:
    points = line(4)
    points.inputs[0, 0] = 1000.0
    return points


def test_a_step_that_is_not_finite_is_skipped_and_counted() -> None:
    good = [line(4, seed=s) for s in range(4)]
    steps, model = run_line(
        iter([good[0], bad_line(), good[1], bad_line(), bad_line(), good[2]]), 6, poisoned
    )
    assert [step.skipped for step in steps] == [False, True, False, True, True, False]
    assert [step.num_skipped for step in steps] == [0, 1, 1, 2, 3, 3]
    _, expected = run_line(iter(good[:3]), 3)
    assert model.weight.equal(expected.weight)


def test_a_gradient_that_is_not_finite_counts_as_well_as_a_loss() -> None:
    def steep(model: nn.Linear, batch: Points) -> Tensor:
        return model.weight.sum().sub(model.weight.sum().detach()).abs().sqrt()  # 0 here, its slope infinite

    steps, model = run_line(iter([line(4)]), 1, steep)
    assert steps[0].loss == 0.0 and steps[0].skipped
    assert model.weight.equal(linear().weight)


def test_three_in_a_row_end_the_run_and_leave_the_batch(tmp_path: Path) -> None:
    batches = [line(4), *[bad_line()] * 2, line(4), *[bad_line()] * 3, line(4)]
    with pytest.raises(
        UserError, match="3 steps in a row, the last being step 7 .*nonfinite_000007_rank0.pt"
    ):
        run_line(iter(batches), 8, poisoned, guard=NonFiniteGuard(folder=tmp_path))
    (saved,) = torch.load(tmp_path / "nonfinite_000007_rank0.pt", weights_only=True)
    assert saved["inputs"].equal(bad_line().inputs)


def test_a_step_without_targets_changes_nothing_and_is_no_failure() -> None:
    model = tiny_gpt()
    before = [weight.detach().clone() for weight in model.parameters()]
    masked = Batch(rows(2).inputs, torch.full((2, 12), -1))
    for optimizer in (optimizer_for(model, single(), "muon"), optimizer_for(model, single(), "adamw")):
        for microbatches in ([masked], []):
            result = optimizer_step(
                model, optimizer, microbatches, next_token_loss, normalizer=0, lr_scale=1.0, world=single()
            )
            assert result.loss == 0.0 and not result.skipped
    assert all(weight.equal(old) for weight, old in zip(model.parameters(), before, strict=True))


def test_peak_flops_by_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA A10") == 125e12
    assert peak_flops("NVIDIA GH200 480GB") == 989e12
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA RTX A4000") is None and peak_flops("NVIDIA RTX A1000 Laptop GPU") is None
    assert peak_flops("Abacus 3000") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler warns of torch itself
@pytest.mark.filterwarnings("ignore:`torch._prims_common:FutureWarning")
def test_compiled_training_equals_eager() -> None:
    batch = rows(4)
    segments = torch.tensor([0] * 5 + [1] * 4 + [-1] * 3).expand(4, 12).contiguous()
    results = []
    for model in (tiny_gpt(), compile_model(tiny_gpt())):
        optimizer = optimizer_for(model, single(), "muon")
        optimizer.fuse = model.fused_head
        for packed in (batch, Batch(batch.inputs, batch.targets, segments)):
            optimizer_step(
                model, optimizer, [packed], next_token_loss, normalizer=30.0, lr_scale=1.0, world=single()
            )
        results.append([weight.detach() for weight in model.parameters()])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanochat.common import UserError, World
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, consolidate, make_adamw, make_optimizer, recut
from nanochat.updates import orthogonalize
from tests.gloo import run_ranks, single


def tiny_gpt(*, seed: int = 0) -> GPT:
    """Shapes that 2 ranks cannot share out evenly: 61 * 15 + ... numbers, 3 matrices of one shape per kind."""
    torch.manual_seed(seed)
    config = GPTConfig.for_depth(3, vocab_size=61, sequence_len=8, n_embd=20, n_head=2, n_kv_head=1, smear=1)
    model = GPT(config)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    return model


def optimizer_for(model: GPT, world: World, kind: str = "muon") -> MuonAdamW:
    if kind == "adamw":
        return make_adamw(model, lr=0.01, weight_decay=0.1, world=world)
    rates: dict[str, float] = {"matrix_lr": 0.02, "embedding_lr": 0.2, "unembedding_lr": 0.004}
    return make_optimizer(model, **rates, weight_decay=0.1, world=world)


def gradients(model: GPT, num_steps: int) -> Iterator[None]:
    """Fill in `num_steps` different gradients, one after the other, the same for every caller."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(num_steps):
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        yield


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, atol: float = 1e-6) -> None:
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 12), (2, 12, 48), (1, 1, 9)])
def test_orthogonalize_gives_all_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    result = orthogonalize(torch.randn(shape))
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.85
    assert values.max() < 1.15


def test_orthogonalize_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1, 24, 16)
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    inner = u.mT @ orthogonalize(matrix).double() @ vh.mT  # diagonal when the vectors are the same
    torch.testing.assert_close(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), atol=1e-5, rtol=0)
    assert (inner.diagonal(dim1=-2, dim2=-1) - 1).abs().max() < 0.15


@pytest.mark.parametrize("rank", [1, 4, 24])
def test_wide_matrices_take_a_shorter_way_to_the_same_place(rank: int) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 24, rank) @ torch.randn(2, rank, 96) * 1e-3
    expected = orthogonalize(matrices.double(), torch.float64)
    torch.testing.assert_close(orthogonalize(matrices).double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(orthogonalize(matrices.mT).double(), expected.mT, atol=1e-4, rtol=0)


def test_orthogonalize_leaves_zero_alone() -> None:
    assert orthogonalize(torch.zeros(2, 4, 6)).eq(0).all()


def test_muon_moves_equally_far_for_a_gradient_a_million_times_smaller() -> None:
    lengths = []
    for size in (1.0, 1e-6):
        model = tiny_gpt()
        optimizer = optimizer_for(model, single())
        before = weights(model)
        next(gradients(model, 1))
        for weight in model.parameters():
            assert weight.grad is not None
            weight.grad *= size
        optimizer.step()
        name = "transformer.h.0.attn.c_q.weight"
        lengths.append((weights(model)[name] - before[name]).norm())
    assert lengths[1] == pytest.approx(lengths[0].item(), rel=1e-3)


def test_adamw_equals_torchs() -> None:
    ours, theirs = tiny_gpt(), tiny_gpt()
    optimizer = make_adamw(ours, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-10, world=single())
    oracle = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-10)
    for _, _ in zip(gradients(ours, 5), gradients(theirs, 5), strict=True):
        optimizer.step()
        oracle.step()
    assert_close(weights(ours), weights(theirs))


def test_every_parameter_is_in_one_group_and_rates_grow_as_width_shrinks() -> None:
    model = tiny_gpt()
    optimizer = optimizer_for(model, single())
    names = [name for group in optimizer.param_groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    by_name = {name: group for group in optimizer.param_groups for name, _ in group["params"]}
    assert by_name["transformer.wte.weight"]["initial_lr"] == pytest.approx(0.2 * (20 / 768) ** -0.5)
    assert by_name["lm_head.weight"]["initial_lr"] == pytest.approx(0.004 * (20 / 768) ** -0.5)
    assert by_name["smear.weight"]["kind"] == "adamw"
    matrices = by_name["transformer.h.2.mlp.c_proj.weight"]
    assert matrices["kind"] == "muon" and matrices["initial_lr"] == 0.02 and matrices["weight_decay"] == 0.1


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("poison", [False, True])
def test_scale_zero_changes_nothing_even_when_gradients_are_not_finite(kind: str, poison: bool) -> None:
    model = tiny_gpt()
    optimizer = optimizer_for(model, single(), kind)
    for _ in gradients(model, 2):
        optimizer.step()
    before, state = weights(model), str(optimizer.state_dict())
    for _ in gradients(model, 1):
        if poison:
            for weight in model.parameters():
                assert weight.grad is not None
                weight.grad.view(-1)[0] = float("nan")
        optimizer.step(scale=0.0)
    assert_close(weights(model), before, atol=0)
    assert str(optimizer.state_dict()) == state


def test_scale_multiplies_the_gradient_and_norms_are_of_all_parameters() -> None:
    one, other = tiny_gpt(), tiny_gpt()
    first, second = optimizer_for(one, single(), "adamw"), optimizer_for(other, single(), "adamw")
    next(gradients(one, 1))
    next(gradients(other, 1))
    expected = torch.cat(
        [weight.grad.flatten() for weight in one.parameters() if weight.grad is not None]
    ).norm()
    assert first.grad_norm() == pytest.approx(expected.item(), rel=1e-6)
    for weight in other.parameters():
        assert weight.grad is not None
        weight.grad *= 0.25
    before = weights(one)
    moved = first.step(scale=0.25, want_norm=True)
    second.step()
    assert_close(weights(one), weights(other))
    difference = torch.cat([(weights(one)[name] - tensor).flatten() for name, tensor in before.items()])
    assert moved is not None and moved == pytest.approx(difference.norm().item(), rel=1e-3)


def sharded_run(world: World, kind: str, num_steps: int) -> dict[str, Any]:
    """Train on gradients of which each rank holds an unequal part."""
    model = tiny_gpt()
    optimizer = optimizer_for(model, world, kind)
    norms = []
    share = 1.0 if world.size == 1 else (0.75, 0.25)[world.rank]
    for _ in gradients(model, num_steps):
        for weight in model.parameters():
            assert weight.grad is not None
            weight.grad *= share
        norms.append(optimizer.grad_norm())
        optimizer.step(scale=0.5)
    return {"weights": weights(model), "norms": torch.stack(norms), "state": optimizer.state_dict()}


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_two_ranks_step_as_one(kind: str) -> None:
    alone = sharded_run(single(), kind, 3)
    ranks = run_ranks(sharded_run, 2, kind, 3)
    for rank in ranks:
        assert_close(rank["weights"], alone["weights"])
        torch.testing.assert_close(rank["norms"], alone["norms"], rtol=1e-5, atol=0)
    whole = consolidate([rank["state"] for rank in ranks])
    for key, bucket in alone["state"]["buckets"].items():
        assert_close(whole["buckets"][key]["tensors"], bucket["tensors"])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_recut_then_consolidate_is_the_identity(size: int) -> None:
    whole = sharded_run(single(), "muon", 2)["state"]
    again = consolidate([recut(whole, rank=rank, size=size) for rank in reversed(range(size))])
    for key, bucket in whole["buckets"].items():
        assert_close(again["buckets"][key]["tensors"], bucket["tensors"], atol=0)


def test_a_rank_without_gradients_counts_as_zero() -> None:
    model, other = tiny_gpt(), tiny_gpt()
    first, second = optimizer_for(model, single()), optimizer_for(other, single())
    first.step()
    for weight in other.parameters():
        weight.grad = torch.zeros_like(weight)
    second.step()
    assert_close(weights(model), weights(other), atol=0)


def test_state_survives_saving_and_goes_on_bit_for_bit() -> None:
    model = tiny_gpt()
    optimizer = optimizer_for(model, single())
    steps = gradients(model, 4)
    for _ in range(2):
        next(steps)
        optimizer.step()
    other = tiny_gpt(seed=1)
    other.load_state_dict(model.state_dict())
    resumed = optimizer_for(other, single())
    resumed.load_state_dict(optimizer.state_dict())
    for _ in steps:
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        optimizer.step()
        resumed.step()
    assert_close(weights(model), weights(other), atol=0)


def test_state_that_does_not_fit_is_refused() -> None:
    model = tiny_gpt()
    muon, adamw = optimizer_for(model, single()), optimizer_for(model, single(), "adamw")
    with pytest.raises(UserError, match="another model or kind"):
        muon.load_state_dict(adamw.state_dict())
    with pytest.raises(UserError, match="rank 1 of 2 does not fit rank 0 of 1"):
        muon.load_state_dict(recut(muon.state_dict(), rank=1, size=2))
    with pytest.raises(UserError, match="not whole: have 1 of 2"):
        consolidate([recut(muon.state_dict(), rank=0, size=2)])

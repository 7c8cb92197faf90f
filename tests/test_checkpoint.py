from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nanochat import checkpoint_manager, checkpoint_writer
from nanochat.architecture import OCT2025, GPTConfig
from nanochat.checkpoint_manager import (
    Checkpoint,
    RefusedCheckpoint,
    begin_save,
    best_step,
    find,
    load_model,
    load_optimizer,
    load_weights,
    newest,
    save,
)
from nanochat.common import UserError, World
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, make_adamw, make_optimizer
from tests.gloo import run_ranks, single


class FakeTokenizer:
    vocab_size = 61
    fingerprint = "ours"


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(checkpoint_manager, "load_tokenizer", FakeTokenizer)
    return tmp_path


def tiny_gpt(*, seed: int = 0, **more: Any) -> GPT:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"vocab_size": 61, "sequence_len": 8, "n_embd": 20, "n_head": 2, "n_kv_head": 1}
    model = GPT(GPTConfig.for_depth(3, **shape | more))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


def optimizer_for(model: GPT, world: World) -> MuonAdamW:
    return make_optimizer(model, matrix_lr=0.02, embedding_lr=0.02, unembedding_lr=0.004, world=world)


def some_steps(model: GPT, optimizer: MuonAdamW, seeds: range) -> None:
    """Steps whose gradients depend on nothing but the seed; every rank brings an equal share."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator) / optimizer.world.size
        optimizer.step()
        optimizer.zero_grad()


def save_tiny(
    step: int, *, source: str = "sft", tag: str = "d3", model: GPT | None = None, **more: Any
) -> Checkpoint:
    return save(source, tag, step, model=model or tiny_gpt(), meta={"val_bpb": 1.5}, world=single(), **more)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return list(a) == list(b) and all(a[name].equal(b[name]) for name in a)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_what_was_saved_is_loaded(base: Path) -> None:
    model = tiny_gpt(smear=2)
    checkpoint = save_tiny(200, model=model, optimizer=optimizer_for(model, single()))
    names = ["meta_000200.json", "model_000200.pt", "optim_000200_rank0.pt"]
    assert sorted(path.name for path in (base / "chatsft_checkpoints" / "d3").iterdir()) == names
    loaded, tokenizer, meta = load_model("sft", device="cpu")
    assert same(loaded, model) and loaded.config == model.config
    assert tokenizer.vocab_size == 61
    assert (meta["step"], meta["val_bpb"], meta["world_size"]) == (200, 1.5, 1)
    assert sorted(meta["files"]) == names[1:]
    assert find("sft") == find("sft", "d3", 200, optimizer=True) == checkpoint


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_device_may_be_a_string_or_a_device(device: str | torch.device) -> None:
    save_tiny(1)
    model, _, _ = load_model("sft", device, phase="train", model_tag="d3", step=1)
    assert model.device == torch.device("cpu") and model.training
    model, _, _ = load_model("sft", world=single(torch.bfloat16))
    assert model.compute_dtype == torch.bfloat16 and not model.training
    ids = torch.arange(8).unsqueeze(0)
    model(ids, ids).backward()  # loaded weights can be trained


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_october_2025_loads_and_computes_what_it_did(base: Path, prefix: str) -> None:
    model = tiny_gpt(**OCT2025)
    with torch.no_grad():
        model.embeddings.copy_(model.embeddings.bfloat16())
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state[f"{prefix}transformer.wte.weight"] = model.embeddings.detach().bfloat16()
    folder = base / "chatrl_checkpoints" / "d3"
    folder.mkdir(parents=True)
    torch.save(state, folder / "model_001560.pt")
    six = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    config = {name: getattr(model.config, name) for name in six}
    (folder / "meta_001560.json").write_text(json.dumps({"model_config": config}))
    loaded, _, meta = load_model("rl", device="cpu")
    assert meta["step"] == 1560
    assert loaded.config == model.config
    assert all(weight.dtype == torch.float32 for weight in loaded.parameters())
    ids = torch.arange(8).unsqueeze(0)
    assert loaded(ids).equal(model(ids))
    truncate(folder / "model_001560.pt")
    with pytest.raises(RefusedCheckpoint, match="is torn: .*model_001560.pt does not end as it should"):
        load_model("rl", device="cpu")


def test_an_old_optimizer_file_is_taken_over(base: Path) -> None:
    model = tiny_gpt()
    matrices = {name: weight for name, weight in model.named_parameters() if ".h." in name}
    adamw = torch.optim.AdamW([{"params": [model.lm_head.weight]}, {"params": [model.embeddings]}])
    model(torch.arange(8)[None], torch.arange(8)[None]).backward()
    adamw.step()
    by_size: dict[int, list[str]] = {}
    for name, weight in matrices.items():
        by_size.setdefault(weight.numel(), []).append(name)
    order = [name for size in by_size for name in by_size[size]]
    groups, start = [], 0
    for names in by_size.values():
        groups.append({"params": list(range(start, start + len(names)))})
        start += len(names)
    state = {
        i: {"momentum_buffer": torch.full_like(matrices[name], i).detach()} for i, name in enumerate(order)
    }
    folder = base / "base_checkpoints" / "d3"
    checkpoint = save_tiny(7, source="base", model=model)
    torch.save([adamw.state_dict(), {"state": state, "param_groups": groups}], folder / "optim_000007.pt")
    optimizer = optimizer_for(model, single())
    load_optimizer(checkpoint, optimizer)
    for bucket in optimizer.buckets:
        assert bucket.state["step"] == 1.0
        if bucket.group["kind"] == "muon":
            expected = torch.tensor([float(order.index(name)) for name in bucket.names])
            assert bucket.state["momenta"].amin((1, 2)).equal(expected)
        else:
            mean = adamw.state[bucket.params[0]]["exp_avg"]
            assert bucket.state["mean"].equal(mean.flatten())
    torch.save([adamw.state_dict(), {"state": {}, "param_groups": groups}], folder / "optim_000007.pt")
    with pytest.raises(UserError, match="trained on one GPU"):
        load_optimizer(checkpoint, optimizer)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda c: truncate(c.model_path), "is torn: .*model_000200.pt has"),
        (lambda c: flip_a_byte(c.model_path), "was altered: the hash of .*model_000200.pt"),
        (lambda c: c.meta_path.unlink(), "was not finished: meta_000200.json is missing"),
        (lambda c: truncate(c.meta_path), "meta_000200.json cannot be read"),
        (lambda c: c.meta_path.write_text("[]"), "has no model_config"),
        (lambda c: c.optimizer_path(0).unlink(), "is not whole: .*optim_000200_rank0.pt is missing"),
        (lambda c: flip_a_byte(c.optimizer_path(0)), "was altered: .*optim_000200_rank0.pt"),
    ],
)
def test_a_harmed_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    harm: Callable[[Checkpoint], Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_gpt()
    older = save_tiny(100, model=model, optimizer=optimizer_for(model, single()))
    newer = save_tiny(200, optimizer=optimizer_for(model, single()))
    harm(newer)
    assert find("sft", optimizer=True) == older
    printed = capsys.readouterr().out
    assert "refused: checkpoint chatsft_checkpoints/d3 step 200" in printed
    assert "using chatsft_checkpoints/d3 step 100 instead" in printed
    assert newest("sft", "d3") == older
    with pytest.raises(RefusedCheckpoint, match=reason):
        find("sft", "d3", 200, optimizer=True)
    if "optim" in reason:
        assert find("sft") == newer  # whoever only answers questions needs no optimizer


def test_nothing_whole_is_an_error_to_a_reader_and_a_new_beginning_to_a_run() -> None:
    assert newest("sft", "d3") is None
    save_tiny(100).meta_path.unlink()
    assert newest("sft", "d3") is None
    with pytest.raises(RefusedCheckpoint, match="step 100 was not finished: .*; no other can be used"):
        find("sft")


def test_what_is_missing_is_said_with_what_exists() -> None:
    with pytest.raises(UserError, match="no rl checkpoint under .*: there are no checkpoints at all"):
        load_model("rl")
    save_tiny(20)
    save_tiny(10)
    save_tiny(5, source="base", tag="mine")
    with pytest.raises(UserError, match="no rl checkpoint .*: there is base mine step 5; sft d3 step 10, 20"):
        load_model("rl")
    with pytest.raises(UserError, match="no sft checkpoint of d3 at step 30 .*sft d3 step 10, 20"):
        load_model("sft", step=30)
    with pytest.raises(UserError, match="no sft checkpoint of d4 "):
        load_model("sft", model_tag="d4")
    with pytest.raises(UserError, match="no stage 'chat' with checkpoints; use one of base, mid, sft, rl"):
        load_model("chat")
    with pytest.raises(UserError, match="must be the name of a folder"):
        load_model("sft", model_tag="../../etc")
    with pytest.raises(UserError, match="phase='evil' is not known"):
        load_model("sft", phase="evil")


def test_the_deepest_tag_wins_then_the_newest_and_steps_compare_as_numbers() -> None:
    save_tiny(3, tag="d12")
    save_tiny(1_000_000, tag="d12")
    save_tiny(999_999, tag="d12")
    save_tiny(5, tag="d4")
    save_tiny(9, tag="other")
    assert (find("sft").folder.name, find("sft").step) == ("d12", 1_000_000)
    for tag, second in (("b", 2), ("c", 3), ("a", 1)):
        checkpoint = save_tiny(1, source="mid", tag=tag)
        os.utime(checkpoint.folder, (second, second))
    assert find("mid").folder.name == "c"


def test_keep_last_keeps_the_last_and_the_best() -> None:
    model = tiny_gpt()
    for step in (1, 2, 3, 4, 5):
        save_tiny(step, optimizer=optimizer_for(model, single()), keep_last=2, best=step == 2)
    folder = find("sft").folder
    assert sorted({path.name.split("_")[1][:6] for path in folder.glob("*_*")}) == [
        "000002",
        "000004",
        "000005",
    ]
    assert len(list(folder.iterdir())) == 3 * 3 + 1
    assert best_step("sft", "d3") == 2 and best_step("sft", "d4") is None
    assert find("sft", "d3", 2, optimizer=True).step == 2


def test_saving_a_step_again_replaces_it() -> None:
    save_tiny(1)
    other = tiny_gpt(seed=1)
    checkpoint = save_tiny(1, model=other)
    assert same(load_weights(checkpoint), other)
    checkpoint.verify(optimizer=True)


def test_a_disk_that_is_full_beforehand_or_on_the_way_leaves_the_old_ones_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older = save_tiny(1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    usage = shutil.disk_usage("/")._replace(free=1000)
    for patch in (("shutil.disk_usage", lambda _: usage), ("os.fsync", full)):
        with monkeypatch.context() as patched:
            patched.setattr(*patch)
            with pytest.raises(
                UserError, match=r"step 2 was not saved.*disk is full: .* MB free, this needs 0\.1 MB"
            ):
                save_tiny(2)
        assert find("sft") == older
        assert sorted(path.name for path in older.folder.iterdir()) == ["meta_000001.json", "model_000001.pt"]


def test_a_disk_that_fills_up_inside_torchs_writer_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer._HashingFile, "write", full)
    with pytest.raises(UserError, match="disk is full"):
        save_tiny(2)


def test_killed_at_any_rename_the_older_one_stays_and_the_next_save_cleans_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_gpt()
    older = save_tiny(1, optimizer=optimizer_for(model, single()))
    for fatal in (1, 2, 3):
        count = 0
        replace = os.replace

        def killed(source: Any, target: Any, fatal: int = fatal, replace: Any = replace) -> None:
            nonlocal count
            count += 1
            if count == fatal:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                save_tiny(2, optimizer=optimizer_for(model, single()))
        assert newest("sft", "d3") == older
    save_tiny(2, optimizer=optimizer_for(model, single()))
    assert newest("sft", "d3") == Checkpoint(older.folder, 2)
    assert len(list(older.folder.iterdir())) == 6


def test_weights_may_be_trained_on_while_a_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = tiny_gpt(), tiny_gpt()
    optimizer = optimizer_for(model, single())
    may_write = threading.Event()
    write = checkpoint_writer._write

    def held_up(path: Path, state: dict[str, Any]) -> dict[str, Any]:
        assert may_write.wait(30)
        return write(path, state)

    monkeypatch.setattr(checkpoint_writer, "_write", held_up)
    pending = begin_save(
        "sft", "d3", 1, model=model, optimizer=optimizer, meta={}, world=single(), background=True
    )
    assert not pending.writing.done and newest("sft", "d3") is None
    some_steps(model, optimizer, range(3))
    may_write.set()
    checkpoint = pending.finish()
    assert same(load_weights(checkpoint), expected)
    assert newest("sft", "d3") == checkpoint
    fresh, saved = optimizer_for(expected, single()), optimizer_for(expected, single())
    load_optimizer(checkpoint, saved)
    assert all(
        ours.state[name].equal(theirs.state[name])
        for ours, theirs in zip(saved.buckets, fresh.buckets, strict=True)
        for name in ours.state
    )


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def test_a_pickle_that_would_run_code_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)
    checkpoint = save_tiny(1)
    torch.save({"transformer.wte.weight": Hostile()}, checkpoint.model_path)
    meta = json.loads(checkpoint.meta_path.read_text())
    del meta["files"]
    checkpoint.meta_path.write_text(json.dumps(meta))
    with pytest.raises(RefusedCheckpoint, match="model_000001.pt cannot be read: UnpicklingError"):
        load_model("sft", device="cpu")
    assert not (base / "owned").exists()


def test_a_tokenizer_of_the_same_size_but_other_tokens_is_refused() -> None:
    for step, meta in enumerate(({}, {"tokenizer": "ours"}), start=1):
        save("sft", "d3", step, model=tiny_gpt(), meta=meta, world=single())
        assert load_model("sft", device="cpu")[2]["step"] == step
    save("sft", "d3", 3, model=tiny_gpt(), meta={"tokenizer": "theirs"}, world=single())
    with pytest.raises(
        UserError, match="is not the one that checkpoint chatsft_checkpoints/d3 step 3 was trained with"
    ):
        load_model("sft", device="cpu")


def test_a_tokenizer_of_another_size_is_named() -> None:
    save_tiny(1, model=tiny_gpt(vocab_size=77))
    with pytest.raises(
        UserError, match="has 61 tokens, checkpoint chatsft_checkpoints/d3 step 1 was trained with 77"
    ):
        load_model("sft", device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state | {"value_embeds.1.weight": torch.zeros(2)},
            "does not have .value_embeds.1.weight",
        ),
        (
            lambda state: {k: v for k, v in state.items() if "lm_head" not in k},
            "lacks weights .*lm_head.weight",
        ),
        (
            lambda state: state | {"lm_head.weight": torch.zeros(61, 8)},
            r"lm_head.weight is \(61, 8\), .* \(61, 20\)",
        ),
        (lambda state: list(state), "does not hold a model's weights"),
    ],
)
def test_weights_of_another_architecture_are_refused(change: Callable[[Any], Any], message: str) -> None:
    checkpoint = save_tiny(1)
    torch.save(change(tiny_gpt().state_dict()), checkpoint.model_path)
    with pytest.raises(UserError, match=message):
        load_weights(checkpoint)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    field=st.sampled_from(
        ["model_config", "files", "step", "n_layer", "rope_base", "smear", "model_000001.pt", "bytes"]
    ),
    value=json_values,
)
def test_no_meta_file_ends_in_anything_but_our_own_error(field: str, value: Any) -> None:
    checkpoint = save_tiny(1)
    meta = json.loads(checkpoint.meta_path.read_text())
    inside = {
        "n_layer": "model_config",
        "rope_base": "model_config",
        "smear": "model_config",
        "model_000001.pt": "files",
    }
    target = (
        meta["files"]["model_000001.pt"]
        if field == "bytes"
        else meta[inside[field]]
        if field in inside
        else meta
    )
    target[field] = value
    checkpoint.meta_path.write_text(json.dumps(meta))
    try:
        load_weights(find("sft"))
    except UserError as error:
        assert "\n" not in str(error).strip()


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.binary(max_size=60))
def test_no_bytes_as_meta_end_in_anything_but_our_own_error(data: bytes) -> None:
    checkpoint = save_tiny(1)
    checkpoint.meta_path.write_bytes(data)
    with pytest.raises(RefusedCheckpoint):
        find("sft")


def test_a_run_cut_and_resumed_equals_an_uncut_one_bit_for_bit() -> None:
    whole = tiny_gpt()
    optimizer = optimizer_for(whole, single())
    some_steps(whole, optimizer, range(3))
    checkpoint = save_tiny(3, model=whole, optimizer=optimizer)
    some_steps(whole, optimizer, range(3, 6))
    resumed = load_weights(checkpoint)
    optimizer = optimizer_for(resumed, single())
    load_optimizer(checkpoint, optimizer)
    some_steps(resumed, optimizer, range(3, 6))
    assert same(resumed, whole)


def save_on_ranks(world: World, base: str) -> list[str]:
    os.environ["NANOCHAT_BASE_DIR"] = base
    model = tiny_gpt()
    optimizer = optimizer_for(model, world)
    some_steps(model, optimizer, range(3))
    save("base", "d3", 3, model=model, optimizer=optimizer, meta={}, world=world)
    return sorted(path.name for path in Path(base).glob("base_checkpoints/d3/*"))


def go_on_from_ranks(world: World, base: str) -> dict[str, Tensor]:
    os.environ["NANOCHAT_BASE_DIR"] = base
    checkpoint = find("base", optimizer=True)
    model = load_weights(checkpoint)
    optimizer = optimizer_for(model, world)
    load_optimizer(checkpoint, optimizer)
    some_steps(model, optimizer, range(3, 6))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_a_run_goes_on_with_another_number_of_ranks(base: Path) -> None:
    expected = tiny_gpt()
    some_steps(expected, optimizer_for(expected, single()), range(6))
    names = ["meta_000003.json", "model_000003.pt", "optim_000003_rank0.pt", "optim_000003_rank1.pt"]
    assert run_ranks(save_on_ranks, 2, str(base)) == [names, names]
    weights = go_on_from_ranks(single(), str(base))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=0)


def fail_on_rank_1(world: World, base: str) -> str:
    os.environ["NANOCHAT_BASE_DIR"] = base
    model = tiny_gpt()
    if world.rank == 1:
        shutil.disk_usage = lambda _: SimpleNamespace(free=10)  # type: ignore[assignment]
    try:
        save(
            "base",
            "d3",
            4,
            model=model,
            optimizer=make_adamw(model, lr=1.0, world=world),
            meta={},
            world=world,
        )
    except UserError as error:
        return str(error)
    return "saved"


def test_a_rank_that_cannot_save_is_told_by_all(base: Path) -> None:
    for message in run_ranks(fail_on_rank_1, 2, str(base)):
        assert "step 4 was not saved" in message and "disk is full" in message
    assert list((base / "base_checkpoints" / "d3").iterdir()) == []


def test_a_checkpoint_without_optimizer_cannot_be_gone_on_from() -> None:
    model = tiny_gpt()
    with pytest.raises(UserError, match="holds no optimizer state"):
        load_optimizer(save_tiny(1, model=model), optimizer_for(model, single()))

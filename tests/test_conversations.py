"""Conversations are packed whole, each once an epoch, the same for any number of ranks; resuming is exact."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_fakes import END, Bytes, Ranked, same, texts_of, world

from nanochat.common import UserError, World
from nanochat.config import ConversationConfig
from nanochat.curriculum import InTurn
from nanochat.dataloader import Batch, conversation_batches, document_batches, merge_states
from nanochat.supervised import supervised_steps


def chat(question: str, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def chats(count: int, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [
        chat(f"q{n}" + "?" * chance.randrange(longest), "r" * chance.randrange(1, longest))
        for n in range(count)
    ]


def conversations(task: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {"batch_size": 4, "sequence_len": 48, "world": world()}
    return conversation_batches(task, Bytes(), **{**defaults, **options})


def packed(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of every conversation in the batch."""
    assert batch.segments is not None and batch.positions is not None
    found = []
    for inputs, targets, segments, positions in zip(
        batch.inputs, batch.targets, batch.segments, batch.positions, strict=True
    ):
        for segment in range(int(segments.max()) + 1):
            there = segments == segment
            assert positions[there].tolist() == list(range(int(there.sum())))
            found.append((inputs[there].tolist(), targets[there].tolist()))
        assert (targets[segments < 0] == -1).all()
    return found


def alone(conversation: dict[str, Any], mask: str = "assistant") -> tuple[list[int], list[int]]:
    ids, trained = Bytes().render_conversation(conversation)
    if mask == "all":
        trained = [1] * len(ids)
    return ids[:-1], [i if t else -1 for i, t in zip(ids[1:], trained[1:], strict=True)]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.text(max_size=15), st.text(max_size=15)), min_size=1, max_size=40),
    st.integers(1, 5),
    st.sampled_from(["assistant", "all"]),
)
def test_an_epoch_holds_every_conversation_whole_and_once(
    pairs: list[tuple[str, str]], batch_size: int, mask: str
) -> None:
    task = [chat(*pair) for pair in pairs]
    batches = conversations(task, sequence_len=128, batch_size=batch_size, mask=mask, epochs=1)
    found = [conversation for batch in batches for conversation in packed(batch)]
    assert sorted(found) == sorted(alone(conversation, mask) for conversation in task)


def test_targets_are_counted_and_padding_is_none() -> None:
    batch = next(conversations([chat("ab", "cde")], batch_size=1, sequence_len=12))
    assert batch.num_targets == 4 and batch.inputs.shape == (1, 12)
    assert batch.targets.tolist() == [[-1, -1, -1, 99, 100, 101, END, -1, -1, -1, -1, -1]]
    assert batch.segments is not None and batch.segments.tolist() == [[0] * 7 + [-1] * 5]


def test_conversations_that_cannot_be_trained_on_are_counted() -> None:
    task = [chat("a", "b"), chat("a" * 100, "b"), {"messages": [{"role": "user", "content": "hi"}]}]
    batches = conversations(task, epochs=1)
    assert batches.skipped == {"longer than 48 tokens": 1, "nothing to train on": 1}
    assert [len(packed(batch)) for batch in batches] == [1]
    with pytest.raises(UserError, match="none of 1 conversations"):
        conversations(task[1:2])
    with pytest.raises(UserError, match="none of 0 conversations"):
        conversations([])


def test_a_conversation_that_just_fits_is_kept() -> None:
    ids, _ = Bytes().render_conversation(chat("abc", "defg"))
    task = [chat("abc", "defg")]
    assert packed(next(conversations(task, sequence_len=len(ids) - 1))) != []
    with pytest.raises(UserError):
        conversations(task, sequence_len=len(ids) - 2)


def dealt_lengths(task: Any, size: int) -> tuple[list[Any], ...]:
    lengths = np.array(
        [len(Bytes().render_conversation(task[n])[0]) - 1 for n in range(len(task))], dtype=np.int32
    )
    return ([lengths[rank::size] for rank in range(size)],)


def ranked(task: Any, rank: int, size: int) -> World:
    return Ranked(rank, rank, size, torch.device("cpu"), torch.float32, said=dealt_lengths(task, size))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_share_the_global_batch_of_conversations(size: int) -> None:
    task, total = chats(150), 12
    whole = conversations(task, batch_size=total, epochs=2)
    ranks = [
        conversations(task, batch_size=total // size, world=ranked(task, r, size), epochs=2)
        for r in range(size)
    ]
    count = 0
    for wanted in whole:
        parts = [next(rank) for rank in ranks]
        for name in ("inputs", "targets", "segments", "positions"):
            dealt = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(dealt, getattr(wanted, name))
        count += 1
    assert count == 9 and all(next(rank, None) is None for rank in ranks)


@pytest.mark.parametrize("steps", [0, 1, 5, 40])
def test_conversations_resume_exactly_with_another_number_of_ranks(steps: int) -> None:
    task = chats(60)
    uncut = conversations(task, batch_size=4)
    for _ in range(steps):
        next(uncut)
    state = json.loads(json.dumps(merge_states([uncut.state()])))
    ranks = [conversations(task, batch_size=2, world=ranked(task, r, 2), state=state) for r in range(2)]
    for _ in range(20):
        dealt = torch.stack([next(rank).inputs for rank in ranks], dim=1).flatten(0, 1)
        assert torch.equal(dealt, next(uncut).inputs)


def drilled(rank: int, size: int, batch_size: int, state: dict[str, Any] | None = None) -> Any:
    """Three steps of 12 rows of conversations, then documents, as base training has its drill."""
    task, place = chats(150), state or {}
    shape: dict[str, Any] = {"batch_size": batch_size, "sequence_len": 48}
    drill = conversations(task, **shape, world=ranked(task, rank, size), state=place.get("first"))
    texts = document_batches(
        texts_of(200), Bytes(), **shape, world=world(rank, size), state=place.get("then")
    )
    return InTurn(drill, texts, num_rows=36, world=world(rank, size), state=state)


@pytest.mark.parametrize("cut", range(6))
@pytest.mark.parametrize(
    ("before", "after"), [((1, 6), (2, 6)), ((2, 6), (1, 6)), ((2, 3), (4, 1)), ((1, 12), (1, 4))]
)
def test_a_run_cut_inside_a_drill_or_after_it_goes_on_with_other_ranks_and_microbatches(
    cut: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    def steps(ranks: list[Any], batch_size: int, count: int) -> list[Any]:
        taken = []
        for _ in range(count):
            pieces = [[next(rank).inputs for rank in ranks] for _ in range(12 // len(ranks) // batch_size)]
            taken.append(torch.cat([torch.stack(piece, dim=1).flatten(0, 1) for piece in pieces]))
        return taken

    def begin(shape: tuple[int, int], state: dict[str, Any] | None = None) -> list[Any]:
        size, batch_size = shape
        return [drilled(rank, size, batch_size, state) for rank in range(size)]

    uncut = steps(begin((1, 12)), 12, 6)
    ranks = begin(before)
    seen = steps(ranks, before[1], cut)
    state = json.loads(json.dumps(merge_states([rank.state() for rank in ranks])))
    seen += steps(begin(after, state), after[1], 6 - cut)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, uncut, strict=True))


def test_a_drill_s_place_that_counts_batches_is_refused_by_name() -> None:
    state = drilled(0, 1, 12).state()
    del state["rows"]
    with pytest.raises(UserError, match="counts batches"):
        drilled(0, 1, 12, state | {"taken": 1})


def test_each_epoch_has_an_order_of_its_own_and_the_seed_decides() -> None:
    task = chats(40)

    def order(seed: int) -> list[Any]:
        batches = conversations(task, batch_size=1, seed=seed)
        return [packed(next(batches)) for _ in range(2 * batches.num_rows)]

    both = order(1)
    first, second = both[: len(both) // 2], both[len(both) // 2 :]
    assert first != second and both == order(1) != order(2)


def test_rows_per_epoch_and_progress_are_known() -> None:
    batches = conversations(chats(60), batch_size=2, epochs=3)
    assert batches.epoch == 0.0
    rows = batches.num_rows
    next(batches)
    assert batches.epoch == 2 / rows
    assert 3 * rows <= 2 * (1 + sum(1 for _ in batches)) + 6


def test_the_steps_of_a_run_do_not_depend_on_the_epoch_that_it_goes_on_in() -> None:
    task = chats(3000)  # more than packing looks ahead: epochs differ in rows
    config = ConversationConfig(device_batch_size=1, num_epochs=3)
    batches = conversations(task, batch_size=1)
    asked = [supervised_steps(config, batches, 1, world(0, 1))]
    rows = []
    for _ in range(3):
        next(batches)
        rows.append(batches.num_rows)
        again = conversations(task, batch_size=1, state=batches.state())
        asked.append(supervised_steps(config, again, 1, world(0, 1)))
        for _ in range(batches.num_rows - 1):
            next(batches)
    assert len(set(rows)) > 1, "epochs are packed alike here, so this shows nothing"
    assert set(asked) == {sum(rows)}


def test_conversations_of_another_checkpoint_are_refused() -> None:
    state = conversations(chats(20)).state()
    for change in ({"task": chats(21)}, {"seed": 7}, {"sequence_len": 64}, {"mask": "all"}):
        with pytest.raises(UserError, match="give the same data and flags"):
            conversations(**{"task": chats(20), "state": state, **change})
    with pytest.raises(UserError, match="kind"):
        conversations(chats(20), state={"kind": "documents"})
    with pytest.raises(UserError, match="mask=none"):
        conversations(chats(20), mask="none")


def test_a_batch_moves_as_one() -> None:
    batch = next(conversations(chats(9))).to("cpu")
    assert batch.inputs.device.type == "cpu" and batch.segments is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_batch_reaches_the_gpu_unchanged() -> None:
    batch = next(conversations(chats(9)))
    assert same(batch, batch.to("cuda").to("cpu"))

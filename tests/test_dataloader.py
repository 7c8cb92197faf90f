"""Packing loses nothing and repeats nothing; any number of ranks sees the same global batches; resuming is exact."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError, World
from nanochat.dataloader import Batch, conversation_batches, document_batches, merge_states
from nanochat.packing import LANES, BestFit, Lane, plan_rows

BOS, END = 256, 257


class Bytes:
    """A tokenizer whose tokens are bytes."""

    bos_id = BOS

    def encode_batch(self, texts: list[str], *, bos: bool = False) -> list[list[int]]:
        return [[BOS] * bos + list(text.encode()) for text in texts]

    def render_conversation(self, conversation: Any) -> tuple[list[int], list[int]]:
        ids, mask = [BOS], [0]
        for message in conversation["messages"]:
            said = list(message["content"].encode()) + [END]
            ids += said
            mask += [int(message["role"] == "assistant")] * len(said)
        return ids, mask


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, rank, size, torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class Ranked(World):
    """One of several ranks run in turn: what the others would say is worked out beforehand."""

    said: tuple[list[Any], ...] = ()

    def gather(self, value: Any) -> list[Any]:
        return list(next(iter(self.said))) if self.said else [value] * self.size


def texts_of(count: int, seed: int = 0, longest: int = 120) -> list[str]:
    """Texts of printable ASCII, each beginning with a number of its own."""
    chance = random.Random(seed)
    return [f"<{n}>" + "x" * chance.randrange(longest) for n in range(count)]


def documents(texts: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {"batch_size": 4, "sequence_len": 32, "world": world()}
    return document_batches(texts, Bytes(), **{**defaults, **options})


def rows_of(batch: Batch) -> list[list[int]]:
    """The ids of each row, without padding."""
    rows = []
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        kept = [target for target in targets if target >= 0]
        rows.append(inputs[:1] + kept if kept else [])
    return rows


def same(one: Batch, other: Batch) -> bool:
    pairs = [(one.inputs, other.inputs), (one.targets, other.targets), (one.segments, other.segments)]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)  # type: ignore[arg-type]


# ---- best fit --------------------------------------------------------------------------------------------------------


def test_best_fit_gives_the_longest_that_fits_and_the_oldest_of_equals() -> None:
    pool: BestFit[str] = BestFit()
    for length, name in [(3, "a"), (5, "b"), (3, "c"), (9, "d")]:
        pool.add(length, name)
    assert pool.by_arrival() == ["a", "b", "c", "d"]
    assert [pool.take(8), pool.take(4), pool.take(4), pool.take(4)] == ["b", "a", "c", None]
    assert pool.take_shortest() == "d" and pool.take_shortest() is None and len(pool) == 0


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(1, 8))
def test_a_plan_holds_every_member_once_and_no_row_overflows(lengths: list[int], pool_size: int) -> None:
    rows = plan_rows(lengths, range(len(lengths)), 20, pool_size=pool_size)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[member] for member in row) <= 20 for row in rows)


def test_best_fit_packs_better_than_first_come_first_served() -> None:
    chance = random.Random(1)
    lengths = [chance.randrange(1, 100) for _ in range(2000)]
    in_turn, room = 1, 100
    for length in lengths:
        in_turn, room = (in_turn, room - length) if length <= room else (in_turn + 1, 100 - length)
    best = len(plan_rows(lengths, range(2000), 100))
    assert sum(lengths) / (100 * in_turn) < 0.8 < 0.98 < sum(lengths) / (100 * best)


# ---- documents -------------------------------------------------------------------------------------------------------


def unpacked(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The pieces of packed rows: a piece begins at every BOS."""
    pieces: list[list[int]] = []
    for row in rows:
        assert not row or row[0] == BOS
        for token in row:
            if token == BOS:
                pieces.append([])
            else:
                pieces[-1].append(token)
    return pieces


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text(max_size=90), min_size=1, max_size=60).filter(any), st.integers(2, 40), st.integers(1, 3)
)
def test_one_epoch_holds_every_token_of_every_document_once(
    texts: list[str], length: int, batch_size: int
) -> None:
    batches = documents(texts, sequence_len=length, batch_size=batch_size, epochs=1)
    rows = [row for batch in batches for row in rows_of(batch)]
    tokens = Counter(token for piece in unpacked(rows) for token in piece)
    assert tokens == Counter(token for text in texts for token in text.encode())


def test_the_pieces_of_a_long_document_can_be_put_together_again() -> None:
    texts = [chr(33 + n) * 150 for n in range(40)]
    rows = [row for batch in documents(texts, epochs=1) for row in rows_of(batch)]
    lengths = Counter[int]()
    for piece in unpacked(rows):
        assert len(set(piece)) <= 1, "a piece mixes two documents"
        lengths.update(piece)
    assert lengths == Counter({33 + n: 150 for n in range(40)})


def test_rows_are_full_begin_with_bos_and_targets_are_the_next_tokens() -> None:
    for batch in itertools.islice(documents(texts_of(100)), 20):
        assert batch.inputs.shape == batch.targets.shape == (4, 32) and batch.inputs.dtype == torch.int64
        assert (batch.inputs[:, 0] == BOS).all() and (batch.targets >= 0).all() and batch.num_targets == 128
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_a_document_that_fits_is_rarely_cut() -> None:
    texts = texts_of(4000, longest=28)
    rows = [row for batch in documents(texts, epochs=1) for row in rows_of(batch)]
    whole = {bytes(piece).decode() for piece in unpacked(rows)}
    assert sum(text in whole for text in texts) / len(texts) > 0.75


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(size: int) -> None:
    texts, total = texts_of(300), 48
    alone = documents(texts, batch_size=total)
    ranks = [documents(texts, batch_size=total // size, world=world(rank, size)) for rank in range(size)]
    for _ in range(4):
        wanted, parts = next(alone), [next(rank) for rank in ranks]
        dealt = torch.stack([part.inputs for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(dealt, wanted.inputs)


def test_gradient_accumulation_takes_the_same_rows_in_smaller_pieces() -> None:
    texts = texts_of(300)
    big, small = documents(texts, batch_size=12), documents(texts, batch_size=3)
    for _ in range(3):
        pieces = [next(small).inputs for _ in range(4)]
        assert torch.equal(torch.cat(pieces), next(big).inputs)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (2, 1), (4, 3), (3, 8), (16, 1)])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_going_on_from_a_saved_state_gives_the_batches_of_an_uncut_run(
    before: int, after: int, steps: int
) -> None:
    texts, total = texts_of(200), 48
    uncut = documents(texts, batch_size=total)
    for _ in range(steps):
        next(uncut)
    ranks = [
        documents(texts, batch_size=total // before, world=world(rank, before)) for rank in range(before)
    ]
    for _ in range(steps):
        for rank in ranks:
            next(rank)
    state = json.loads(json.dumps(merge_states([rank.state() for rank in ranks])))
    resumed = [
        documents(texts, batch_size=total // after, world=world(rank, after), state=state)
        for rank in range(after)
    ]
    for _ in range(5):
        dealt = torch.stack([next(rank).inputs for rank in resumed], dim=1).flatten(0, 1)
        assert torch.equal(dealt, next(uncut).inputs)


def test_asking_for_the_state_changes_nothing() -> None:
    asked, unasked = documents(texts_of(99), world=world(1, 3)), documents(texts_of(99), world=world(1, 3))
    for _ in range(10):
        asked.state()
        assert same(next(asked), next(unasked))


def test_a_mixture_resumes_too_and_keeps_its_shares() -> None:
    sources = [(0.8, ["a" * 300, "a" * 200]), (0.2, ["b" * n for n in range(1, 30)])]
    batches = documents(sources, batch_size=16)
    tokens = Counter(
        token for batch in itertools.islice(batches, 40) for token in batch.inputs.flatten().tolist()
    )
    assert abs(tokens[ord("b")] / (tokens[ord("a")] + tokens[ord("b")]) - 0.2) < 0.01
    resumed = documents(sources, batch_size=16, state=json.loads(json.dumps(batches.state())))
    assert all(same(next(batches), next(resumed)) for _ in range(20))


def test_empty_documents_are_passed_over() -> None:
    texts = ["", "ab", "", "", "cd", ""] * 10
    rows = [row for batch in documents(texts, epochs=1) for row in rows_of(batch)]
    assert Counter(map(bytes, unpacked(rows))) == Counter({b"ab": 10, b"cd": 10})


def test_nothing_readable_is_refused_and_never_an_endless_loop() -> None:
    with pytest.raises(UserError, match="no readable document"):
        documents(["", ""])
    with pytest.raises(UserError, match="no readable"):
        next(documents([""] * (LANES - 1) + ["only the last lane can read"]))


@pytest.mark.parametrize("change", [{"sequence_len": 16}, {"texts": texts_of(101)}])
def test_a_state_of_other_data_or_another_shape_is_refused(change: dict[str, Any]) -> None:
    state = documents(texts_of(100)).state()
    with pytest.raises(UserError, match="the checkpoint's data position was made with"):
        documents(**{"texts": texts_of(100), "state": state, **change})


def test_a_state_of_one_rank_of_two_does_not_pass_for_the_whole() -> None:
    state = documents(texts_of(100), world=world(0, 2)).state()
    with pytest.raises(UserError, match="position of one rank only"):
        documents(texts_of(100), state=state)


def test_finite_ranks_stop_together() -> None:
    texts = texts_of(3)  # two of the ranks' lanes hold one document, the others none
    ranks = [documents(texts, batch_size=1, epochs=1, world=Ranked(r, r, 2, torch.device("cpu"), torch.float32)) for r in (0, 1)]  # fmt: skip
    seen = [0, 0]
    while not all(lane.exhausted for rank in ranks for lane in rank._lanes.values()):
        everyone = [all(lane.exhausted for lane in rank._lanes.values()) for rank in ranks]
        for number, rank in enumerate(ranks):
            object.__setattr__(rank._world, "said", (everyone,))
            next(rank)
            seen[number] += 1
    assert seen[0] == seen[1] > 0


def test_packing_documents_costs_little() -> None:
    texts = texts_of(2000, longest=3000)
    batches = documents(texts, batch_size=8, sequence_len=512)
    next(batches)
    began = time.perf_counter()
    tokens = sum(next(batches).num_targets for _ in range(60))
    assert tokens / (time.perf_counter() - began) > 200_000  # per second; a loaded machine does more


def test_a_lane_asks_only_for_its_own_documents() -> None:
    asked: list[int] = []

    class Watched(list[str]):
        def __getitem__(self, number: Any) -> Any:
            asked.append(number)
            return super().__getitem__(number)

    lane = Lane(
        3, [(1.0, Watched(texts_of(400)))], lambda texts: Bytes().encode_batch(texts, bos=True), capacity=33
    )
    for _ in range(30):
        lane.row()
    assert {number % LANES for number in asked} == {3}


# ---- conversations ---------------------------------------------------------------------------------------------------


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
    return Ranked(rank, rank, size, torch.device("cpu"), torch.float32, dealt_lengths(task, size))


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


def test_conversations_of_another_checkpoint_are_refused() -> None:
    state = conversations(chats(20)).state()
    for change in ({"task": chats(21)}, {"seed": 7}, {"sequence_len": 64}, {"mask": "all"}):
        with pytest.raises(UserError, match="give the same data and flags"):
            conversations(**{"task": chats(20), "state": state, **change})
    with pytest.raises(UserError, match="kind"):
        conversations(chats(20), state=documents(texts_of(9)).state())
    with pytest.raises(UserError, match="mask=none"):
        conversations(chats(20), mask="none")


def test_a_batch_moves_as_one() -> None:
    batch = next(conversations(chats(9))).to("cpu")
    assert batch.inputs.device.type == "cpu" and batch.segments is not None
    assert next(documents(texts_of(9))).to("cpu").segments is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_batch_reaches_the_gpu_unchanged() -> None:
    batch = next(conversations(chats(9)))
    assert same(batch, batch.to("cuda").to("cpu"))

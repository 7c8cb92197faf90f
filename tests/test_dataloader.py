"""Packing documents loses and repeats nothing; any number of ranks sees the same batches; resuming is exact."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_fakes import BOS, Bytes, Ranked, same, texts_of, world

from nanochat.common import UserError
from nanochat.dataloader import Batch, document_batches, merge_states
from nanochat.packing import LANES, BestFit, Lane, plan_rows


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
    began = time.process_time()
    tokens = sum(next(batches).num_targets for _ in range(60))
    assert (
        tokens / (time.process_time() - began) > 200_000
    )  # per second of ours, whatever else the machine does


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

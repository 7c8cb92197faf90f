"""
Text becomes batches: documents packed into full rows, conversations packed without a cut.

A row is a row of the run, not of a rank: rows are numbered over the whole run, a step takes the next block of them, and
rank r of n gets rows r, r + n, ... of the block. So the same global batch is trained on 1, 2 or 8 ranks, and a run may
be resumed with another number of them. Both loaders are determined by (data, seed, row number); their state is a few
numbers, and going on from it gives bit for bit the batches that an uninterrupted run would have had.

State is per rank for documents, because each rank packs only its own lanes: save `merge_states(world.gather(state))`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from nanochat.common import UserError, World, derive_seed, progress
from nanochat.packing import LANES, Lane, plan_rows
from nanochat.shards import Texts, check_weights, open_texts

CACHED_TOKENS = 32_000_000


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch of one rank. B rows of T positions."""

    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, -1 = not trained
    segments: torch.Tensor | None  # (B, T) int64, number of the conversation in its row, -1 = padding
    positions: torch.Tensor | None  # (B, T) int64, counted from 0 in each conversation
    num_targets: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; the copy to a GPU does not wait."""
        device = torch.device(device)

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None or device.type != "cuda":
                return None if tensor is None else tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)

        inputs, targets = moved(self.inputs), moved(self.targets)
        assert inputs is not None and targets is not None
        return Batch(inputs, targets, moved(self.segments), moved(self.positions), self.num_targets)


class DocumentTokenizer(Protocol):
    """What packing documents needs of a tokenizer."""

    @property
    def bos_id(self) -> int: ...
    def encode_batch(self, texts: list[str], *, bos: bool = False) -> list[list[int]]: ...


class ConversationTokenizer(Protocol):
    """What packing conversations needs of a tokenizer."""

    @property
    def bos_id(self) -> int: ...
    def render_conversation(self, conversation: Any) -> tuple[list[int], list[int]]: ...


class Conversations(Protocol):
    """A task, or a list of conversations."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


# ---- documents -----------------------------------------------------------------------------------------------------


class DocumentBatches(Iterator[Batch]):
    """
    Batches of BOS-started documents, every row full.

    `texts`: a split ("train", "val"), numbered texts, or weighted ones, which are mixed by their share of tokens.
    Endless unless `epochs` is given; then every token comes exactly `epochs` times and the last rows are padded.
    """

    def __init__(
        self,
        texts: str | Texts | Sequence[tuple[float, Texts]],
        tokenizer: DocumentTokenizer,
        *,
        batch_size: int,
        sequence_len: int,
        world: World,
        epochs: int | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        sources = _sources(texts)
        check_weights([weight for weight, _ in sources])
        if epochs is not None and len(sources) > 1:
            raise UserError(
                "a number of epochs is meant for one source of text, not for a mixture; leave it out"
            )
        if any(weight > 0 and not any(_readable(texts)) for weight, texts in sources):
            raise UserError("a source of pretraining text holds no readable document; see the lines above")
        self._sources, self._world, self._tokenizer = sources, world, tokenizer
        self._batch_size, self._capacity, self._epochs = batch_size, sequence_len + 1, epochs
        self._about = {
            "kind": "documents",
            "sequence_len": sequence_len,
            "num_documents": [len(texts) for _, texts in sources],
            "weights": [float(weight) for weight, _ in sources],
        }
        _check_state(state, self._about)
        self._row = int(state["row"]) if state else 0
        self._states: dict[str, Any] | None = state["lanes"] if state else None
        self._lanes: dict[int, Lane] = {}
        for lane in sorted({(self._row + world.rank + k * world.size) % LANES for k in range(LANES)}):
            self._lanes[lane] = self._open_lane(lane)

    def __next__(self) -> Batch:
        if self._epochs is not None:
            done = all(lane.exhausted for lane in self._lanes.values())
            if all(self._world.gather(done)):  # one rank's lanes may last longer; all ranks stop together
                raise StopIteration
        first = self._row + self._world.rank
        numbers = [first + k * self._world.size for k in range(self._batch_size)]
        rows = np.full((self._batch_size, self._capacity), self._tokenizer.bos_id, dtype=np.int64)
        trained = np.zeros((self._batch_size, self._capacity), dtype=bool)
        for place, number in enumerate(numbers):
            row = self._advance(number).row()
            rows[place, : len(row)] = row
            trained[place, : len(row)] = True
        self._row += self._batch_size * self._world.size
        targets = np.where(trained[:, 1:], rows[:, 1:], -1)
        num_targets = int(trained[:, 1:].sum())
        return Batch(
            torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets), None, None, num_targets
        )

    def state(self) -> dict[str, Any]:
        """Where this rank stands; merged over all ranks by `merge_states` it is where the run stands."""
        lanes = {}
        for lane, packing in self._lanes.items():
            while packing.num_rows < (self._row - lane + LANES - 1) // LANES:
                packing.row()  # rows of other ranks that share this lane
            lanes[str(lane)] = packing.state()
        return {**self._about, "row": self._row, "lanes": lanes}

    def _open_lane(self, lane: int) -> Lane:
        if self._states is not None and str(lane) not in self._states:
            raise UserError(
                "the checkpoint holds the data position of one rank only; it fits the same number of ranks, "
                "or must be saved with merge_states over all of them"
            )
        return Lane(
            lane,
            self._sources,
            lambda texts: self._tokenizer.encode_batch(texts, bos=True),
            capacity=self._capacity,
            epochs=self._epochs,
            state=self._states[str(lane)] if self._states is not None else None,
        )

    def _advance(self, number: int) -> Lane:
        """The lane of row `number`, about to give it."""
        lane = self._lanes[number % LANES]
        while lane.num_rows < number // LANES:
            lane.row()
        return lane


def _sources(texts: str | Texts | Sequence[tuple[float, Texts]]) -> list[tuple[float, Texts]]:
    if isinstance(texts, str):
        return [(1.0, open_texts(texts))]
    if isinstance(texts, (list, tuple)) and texts and isinstance(texts[0], tuple):
        return [(weight, source) for weight, source in texts]
    return [(1.0, cast(Texts, texts))]


def _readable(texts: Texts) -> Iterator[bool]:
    return (bool(texts[number]) for number in range(len(texts)))


document_batches = DocumentBatches


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of a run from the states of its ranks; any number of ranks can go on from it."""
    merged = dict(states[0])
    if "then" in merged:
        merged["then"] = merge_states([state["then"] for state in states])
    if "lanes" in merged:
        merged["lanes"] = {lane: kept for state in states for lane, kept in state["lanes"].items()}
    return merged


def _check_state(state: dict[str, Any] | None, about: dict[str, Any]) -> None:
    """Refuse to go on where the data or the shape of the rows is not that of the checkpoint."""
    for key, value in about.items() if state is not None else ():
        if state is not None and state.get(key) != value:
            raise UserError(
                f"the checkpoint's data position was made with {key}={state.get(key)} and now it is {value}; "
                "give the same data and flags, or start anew with --resume=0"
            )


# ---- conversations -------------------------------------------------------------------------------------------------


class ConversationBatches(Iterator[Batch]):
    """
    Batches of whole conversations, best-fit packed, never cropped, in a fresh order each epoch.

    `mask`: train on what the assistant says, or on all of it. A conversation that is longer than a row is left out and
    counted in `.skipped`. Endless unless `epochs` is given; the last block is then filled up with padding.

    All conversations are measured first, each rank its share. From the lengths every rank plans the whole epoch alike,
    so the number of rows in an epoch is known before the first step and the position is a row number.
    """

    def __init__(
        self,
        task: Conversations,
        tokenizer: ConversationTokenizer,
        *,
        batch_size: int,
        sequence_len: int,
        world: World,
        seed: int = 42,
        mask: Literal["assistant", "all"] = "assistant",
        epochs: int | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        if mask not in ("assistant", "all"):
            raise UserError(f"mask={mask} is not known; use assistant or all")
        self._task, self._tokenizer, self._world = task, tokenizer, world
        self._batch_size, self._sequence_len = batch_size, sequence_len
        self._seed, self._mask, self._epochs = seed, mask, epochs
        self._cache: dict[int, tuple[NDArray[np.int32], NDArray[np.bool_]]] = {}
        self._cached_tokens = 0
        self.skipped: dict[str, int] = {}
        """reason -> conversations that are not trained on"""
        self._lengths = self._measure()
        self._usable = self._choose()
        self._about = {"kind": "conversations", "data": self._fingerprint()}
        _check_state(state, self._about)
        self._epoch, self._row = (int(state["epoch"]), int(state["row"])) if state else (0, 0)
        self._plan = self._planned(self._epoch)

    @property
    def num_rows(self) -> int:
        """Rows of the epoch that is running, all ranks together."""
        return len(self._plan)

    def rows_of(self, epochs: int) -> int:
        """Rows of the first `epochs` epochs, which differ by a few; the same wherever the run stands."""
        plans = (self._plan if epoch == self._epoch else self._planned(epoch) for epoch in range(epochs))
        return sum(map(len, plans))

    @property
    def epoch(self) -> float:
        """Epochs read so far, with the fraction of the running one."""
        return self._epoch + self._row / len(self._plan)

    def __next__(self) -> Batch:
        block = self._next_block(self._batch_size * self._world.size)
        mine = block[self._world.rank :: self._world.size]
        shape = (self._batch_size, self._sequence_len)
        inputs = np.full(shape, self._tokenizer.bos_id, dtype=np.int64)
        targets, segments = np.full(shape, -1, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        for row, members in enumerate(mine):
            start = 0
            for segment, member in enumerate(members):
                ids, trained = self._rendered(member)
                end = start + len(ids) - 1
                inputs[row, start:end] = ids[:-1]
                targets[row, start:end] = np.where(trained[1:], ids[1:], -1)
                segments[row, start:end] = segment
                positions[row, start:end] = np.arange(end - start)
                start = end
        tensor = torch.from_numpy
        num_targets = int((targets >= 0).sum())
        return Batch(tensor(inputs), tensor(targets), tensor(segments), tensor(positions), num_targets)

    def state(self) -> dict[str, Any]:
        """Where the run stands; the same on every rank."""
        return {**self._about, "epoch": self._epoch, "row": self._row}

    def _next_block(self, size: int) -> list[list[int]]:
        """The members of the next `size` rows of the run."""
        block: list[list[int]] = []
        while len(block) < size:
            if self._row == len(self._plan):
                self._epoch, self._row = self._epoch + 1, 0
                self._plan = self._planned(self._epoch)
            if self._epochs is not None and self._epoch >= self._epochs:
                if not block:
                    raise StopIteration
                block += [[]] * (size - len(block))
            else:
                rows = self._plan[self._row : self._row + size - len(block)]
                self._row += len(rows)
                block += rows
        return block

    def _planned(self, epoch: int) -> list[list[int]]:
        """The rows of `epoch`: conversations shuffled, packed, and the rows shuffled, so that long ones do not lead."""
        chance = random.Random(derive_seed("conversations", self._seed, epoch))
        order = list(self._usable)
        chance.shuffle(order)
        rows = plan_rows(self._lengths, order, self._sequence_len)
        chance.shuffle(rows)
        return rows

    def _measure(self) -> NDArray[np.int32]:
        """Positions that each conversation takes, negative where nothing in it is trained; each rank measures its share."""
        count, rank, size = len(self._task), self._world.rank, self._world.size
        mine = np.zeros(len(range(rank, count, size)), dtype=np.int32)
        indices = range(rank, count, size)
        for place, index in enumerate(progress(indices, total=len(indices), description="conversations")):
            ids, trained = self._rendered(index)
            mine[place] = len(ids) - 1 if trained[1:].any() else 1 - len(ids)
        lengths = np.zeros(count, dtype=np.int32)
        for other, measured in enumerate(self._world.gather(mine)):
            lengths[other::size] = measured
        return lengths

    def _choose(self) -> list[int]:
        """The conversations that can be trained on; the others are counted."""
        too_long, silent = abs(self._lengths) > self._sequence_len, self._lengths <= 0
        counts = {
            f"longer than {self._sequence_len} tokens": int(too_long.sum()),
            "nothing to train on": int((silent & ~too_long).sum()),
        }
        self.skipped = {why: count for why, count in counts.items() if count}
        usable = np.flatnonzero(~too_long & ~silent)
        if not len(usable):
            raise UserError(
                f"none of {len(self._lengths)} conversations can be trained on ({self.skipped or 'there are none'}); "
                "lengthen the rows (--max_seq_len) or give other data"
            )
        return [int(index) for index in usable]

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self._lengths.astype("<i4").tobytes())
        digest.update(f"{self._seed} {self._sequence_len} {self._mask}".encode())
        return digest.hexdigest()[:16]

    def _rendered(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        if index in self._cache:
            return self._cache[index]
        ids, mask = self._tokenizer.render_conversation(self._task[index])
        trained = np.array(mask, dtype=bool) if self._mask == "assistant" else np.ones(len(ids), dtype=bool)
        rendered = (np.array(ids, dtype=np.int32), trained)
        if self._cached_tokens + len(ids) <= CACHED_TOKENS:
            self._cache[index] = rendered
            self._cached_tokens += len(ids)
        return rendered


conversation_batches = ConversationBatches

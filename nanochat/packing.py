"""
Packing pieces of token text into rows of a fixed length; no tensors, no files, no ranks.

Two customers. Documents: every row is full; a piece is cut only where nothing whole fits, and what is cut off stays in
the pool as a piece of its own, so no token is lost (upstream throws a third of them away). Conversations: nothing is ever
cut; a row ends where nothing more fits, and the rest of it is padding.

Best fit: the longest piece that fits the room left, the oldest among equals (43c29dd in upstream's history).
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nanochat.common import UserError
from nanochat.shards import Texts, by_need

Item = TypeVar("Item")
Ids = NDArray[np.int32]
Encode = Callable[[list[str]], list[list[int]]]

LANES = 8
"""rows are dealt round robin to this many independent packings, whatever the number of ranks; see Lane"""
LOW, HIGH = 16, 32
"""a pool is refilled to HIGH pieces when it falls below LOW"""


class BestFit(Generic[Item]):
    """Items by length: give me the longest that fits."""

    def __init__(self) -> None:
        self._keys: list[
            tuple[int, int]
        ] = []  # (length, -arrival), ascending: the oldest of a length stands last
        self._items: dict[tuple[int, int], Item] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, length: int, item: Item) -> None:
        self._arrivals += 1
        key = (length, -self._arrivals)
        bisect.insort(self._keys, key)
        self._items[key] = item

    def take(self, room: int) -> Item | None:
        """Remove and return the longest item of at most `room`, or None."""
        place = bisect.bisect_right(self._keys, (room, 0)) - 1
        return self._items.pop(self._keys.pop(place)) if place >= 0 else None

    def take_shortest(self) -> Item | None:
        """Remove and return the shortest item, or None."""
        return self._items.pop(self._keys.pop(0)) if self._keys else None

    def by_arrival(self) -> list[Item]:
        """What is there, the oldest first."""
        return [self._items[key] for key in sorted(self._keys, key=lambda key: -key[1])]


def plan_rows(
    lengths: Sequence[int] | NDArray[Any], order: Iterable[int], capacity: int, *, pool_size: int = 1024
) -> list[list[int]]:
    """The members of `order`, each once, in rows of at most `capacity`; looks `pool_size` members ahead."""
    waiting = iter(order)
    pool: BestFit[int] = BestFit()
    rows: list[list[int]] = []
    while True:
        while len(pool) < pool_size and (member := next(waiting, None)) is not None:
            assert 0 < lengths[member] <= capacity, (
                f"member {member} of length {lengths[member]} in rows of {capacity}"
            )
            pool.add(int(lengths[member]), member)
        if not len(pool):
            return rows
        row, room = [], capacity
        while (fitting := pool.take(room)) is not None:
            row.append(fitting)
            room -= int(lengths[fitting])
        rows.append(row)


@dataclass(frozen=True, slots=True)
class Piece:
    """BOS and the tokens of a document from `offset` on."""

    source: int
    number: int
    """the document's number, counted on through all epochs"""
    offset: int
    ids: Ids

    def cut(self, room: int) -> tuple[Ids, Piece]:
        """The first `room` ids, and the rest as a piece that begins with BOS again."""
        rest = np.concatenate([self.ids[:1], self.ids[room:]])
        return self.ids[:room], Piece(self.source, self.number, self.offset + room - 1, rest)

    @property
    def place(self) -> list[int]:
        return [self.number, self.offset]


class Pool:
    """The pieces of one source that wait in one lane, refilled from the source as they go."""

    def __init__(
        self, source: int, lane: int, texts: Texts, encode: Encode, *, capacity: int, epochs: int | None
    ):
        self._source, self._texts, self._encode = source, texts, encode
        self._capacity = capacity
        self._end = None if epochs is None else epochs * len(texts)
        self._next = lane
        self._short: BestFit[Piece] = BestFit()
        self._long: deque[Piece] = (
            deque()
        )  # longer than a row, so they will be cut anyway; first come, first cut

    @property
    def dry(self) -> bool:
        """True when the last document of finite epochs has been drawn."""
        return self._end is not None and self._next >= self._end

    def __len__(self) -> int:
        return len(self._short) + len(self._long)

    def take(self, room: int) -> Piece | None:
        """The longest piece that fits `room`, else one that is longer than any row, else None."""
        if len(self) < LOW:
            self._refill()
        piece = self._short.take(room)
        return piece if piece or not self._long else self._long.popleft()

    def take_shortest(self) -> Piece | None:
        """The shortest piece, which does not fit but must serve; None when there is no piece at all."""
        return self._short.take_shortest()

    def add(self, piece: Piece) -> None:
        if len(piece.ids) > self._capacity:
            self._long.append(piece)
        else:
            self._short.add(len(piece.ids), piece)

    def state(self) -> dict[str, Any]:
        """The next document, and the places of what waits."""
        return {
            "next": self._next,
            "pieces": [piece.place for piece in (*self._short.by_arrival(), *self._long)],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._next = int(state["next"])
        self._fetch([(int(number), int(offset)) for number, offset in state["pieces"]])

    def _refill(self) -> None:
        places: list[tuple[int, int]] = []
        fruitless = 0
        while not self.dry and len(self) + len(places) < HIGH:
            number, self._next = self._next, self._next + LANES
            if self._texts[number % len(self._texts)]:
                places.append((number, 0))
            fruitless = 0 if places and places[-1][0] == number else fruitless + 1
            if fruitless > len(self._texts):
                raise UserError("no readable pretraining document is left for a lane; see the lines above")
        self._fetch(places)

    def _fetch(self, places: Sequence[tuple[int, int]]) -> None:
        texts = [self._texts[number % len(self._texts)] for number, _ in places]
        for (number, offset), ids in zip(places, self._encode(texts), strict=True):
            array = np.array(ids, dtype=np.int32)
            if offset:
                array = np.concatenate([array[:1], array[1 + offset :]])
            self.add(Piece(self._source, number, offset, array))


class Lane:
    """
    One of LANES independent packings of the corpus: documents lane, lane + LANES, ... into rows lane, lane + LANES, ...

    Because a row belongs to a lane and not to a rank, the rows of a step are the same for any number of ranks, and a rank
    tokenizes only the lanes it draws rows from: an eighth of the text on eight GPUs. Everything is determined by the
    documents' numbers, so a lane's state is a list of places, not of tokens.

    Several sources are mixed by their share of the TOKENS that come out: whatever is most behind gives the next piece.
    """

    def __init__(
        self,
        lane: int,
        sources: Sequence[tuple[float, Texts]],
        encode: Encode,
        *,
        capacity: int,
        epochs: int | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._weights = [weight for weight, _ in sources]
        self._pools = [
            Pool(source, lane, texts, encode, capacity=capacity, epochs=epochs)
            for source, (_, texts) in enumerate(sources)
        ]
        self._capacity = capacity
        self._given = [0] * len(sources)
        self.num_rows = 0
        if state is not None:
            self.num_rows, self._given = int(state["rows"]), [int(count) for count in state["given"]]
            for pool, kept in zip(self._pools, state["pools"], strict=True):
                pool.restore(kept)

    @property
    def exhausted(self) -> bool:
        """True when a finite number of epochs has been packed to the last token."""
        return all(pool.dry and not len(pool) for pool in self._pools)

    def row(self) -> Ids:
        """The next row: `capacity` ids, fewer only at the very end of finite epochs."""
        parts: list[Ids] = []
        room = self._capacity
        while room and (piece := self._pick(room)) is not None:
            head = piece.ids
            if len(head) > room:
                head, rest = piece.cut(room)
                self._pools[piece.source].add(rest)
            parts.append(head)
            room -= len(head)
            self._given[piece.source] += len(head)
        self.num_rows += 1
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here, as plain numbers."""
        return {
            "rows": self.num_rows,
            "given": list(self._given),
            "pools": [pool.state() for pool in self._pools],
        }

    def _pick(self, room: int) -> Piece | None:
        """A piece from the source that is most behind; from another only where none of its pieces fits."""
        order = by_need(self._weights, self._given)
        for way in (lambda pool: pool.take(room), Pool.take_shortest):
            for source in order:
                if (piece := way(self._pools[source])) is not None:
                    return piece
        return None

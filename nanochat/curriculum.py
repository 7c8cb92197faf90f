"""
One loader after another: a curriculum of two parts that resumes exactly.

Rows of the run are counted, not batches: how many batches the first part takes depends on the number of ranks and on the
size of a microbatch, and a run may go on with others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from nanochat.common import UserError, World
from nanochat.dataloader import Batch, ConversationBatches


class InTurn(Iterator[Batch]):
    """The first `num_rows` rows of `first`, then `then`."""

    def __init__(
        self,
        first: ConversationBatches,
        then: Iterator[Batch],
        *,
        num_rows: int,
        world: World,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Both loaders stand where `state` says: give them state["first"] and state["then"]."""
        self._first, self._then, self._num_rows, self._world = first, then, num_rows, world
        if state is not None and "rows" not in state:
            raise UserError(
                "the checkpoint's data position counts batches, which fit one number of ranks only; "
                "start anew with --resume=0"
            )
        self._rows = int(state["rows"]) if state else 0

    def __next__(self) -> Batch:
        batch = next(self._first if self._rows < self._num_rows else self._then)
        self._rows += len(batch.inputs) * self._world.size
        return batch

    def state(self) -> dict[str, Any]:
        """Where this rank stands; `merge_states` makes it where the run stands."""
        inner = cast(Any, self._then).state()
        return {"kind": "in turn", "rows": self._rows, "first": self._first.state(), "then": inner}

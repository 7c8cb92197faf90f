"""A tokenizer of bytes and ranks that run in turn, for the tests of packing."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.common import World
from nanochat.dataloader import Batch

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


def same(one: Batch, other: Batch) -> bool:
    pairs = [(one.inputs, other.inputs), (one.targets, other.targets), (one.segments, other.segments)]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)  # type: ignore[arg-type]

"""GPTConfig: every number that changes what a model computes, and the presets that fill the newer ones in.

nanochat's October 2025 checkpoints name six numbers; the rest were constants of its code, some of which changed
later. A checkpoint that lacks them therefore means the values of its time, OCT2025, and never whatever is best now:
with another rope base the same weights load without complaint and answer nonsense.
https://github.com/karpathy/nanochat
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError

OCT2025: dict[str, Any] = {
    "rope_base": 10_000.0,
    "rope_bf16": True,
    "qk_scale": 1.0,
    "softcap": 15.0,
    "window_pattern": "L",
    "window_len": 0,
    "smear": 0,
}
# What a new model gets: upstream's 2026 sweeps preferred the longer rope base and sharper attention.
MODERN: dict[str, Any] = OCT2025 | {"rope_base": 100_000.0, "rope_bf16": False, "qk_scale": 1.2}


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Every number that changes the function the model computes."""

    sequence_len: int
    """Tokens per row in training; rotary positions go on beyond it."""
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    """Key-value heads; fewer than n_head is grouped-query attention."""
    n_embd: int
    rope_base: float
    rope_bf16: bool
    """Round cosine and sine to bf16, as October 2025 stored them."""
    qk_scale: float
    """Multiplies q and k each, after their norm: attention logits grow by its square."""
    softcap: float
    """Logits are softcap * tanh(logits / softcap)."""
    window_pattern: str
    """One letter a layer, repeated: L sees everything before it, S only window_len tokens. The last layer is L."""
    window_len: int
    """Tokens an S layer sees, itself included."""
    smear: int
    """How many preceding tokens' embeddings are mixed into each position; 0 is off."""

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wrong = not isinstance(value, kinds[str(field.type)])
            if wrong or (isinstance(value, bool) and field.type != "bool"):
                raise UserError(f"model config: {field.name} must be {field.type}, got {value!r}")
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"model config: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("rope_base", "qk_scale", "softcap"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"model config: {name} must be above 0, got {getattr(self, name)}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise UserError(
                f"model config: n_embd={self.n_embd} must give {self.n_head} heads of an even size; change n_head"
            )
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"model config: n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}"
            )
        if not self.window_pattern or set(self.window_pattern) - {"L", "S"}:
            raise UserError(f"model config: window_pattern is made of L and S, got {self.window_pattern!r}")
        if "S" in self.window_pattern and self.window_len < 1:
            raise UserError(f"model config: window_pattern {self.window_pattern!r} needs window_len >= 1")
        if self.smear < 0:
            raise UserError(f"model config: smear must be 0 (off) or more, got {self.smear}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def window(self, layer: int) -> int | None:
        """How many tokens `layer` sees, itself included; None is all of them."""
        short = self.window_pattern[layer % len(self.window_pattern)] == "S"
        return self.window_len if short and layer < self.n_layer - 1 else None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """The config of a checkpoint; fields it does not know yet take their October 2025 values."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise UserError(f"model config: unknown fields {', '.join(unknown)}; made by another code base?")
        filled = OCT2025 | values
        if missing := [name for name in names if name not in filled]:
            raise UserError(f"model config: missing fields {', '.join(missing)}")
        return cls(**filled)

    @classmethod
    def for_depth(
        cls,
        depth: int,
        *,
        vocab_size: int,
        sequence_len: int,
        n_embd: int | None = None,
        n_head: int | None = None,
        n_kv_head: int | None = None,
        **overrides: Any,
    ) -> GPTConfig:
        """A new model of `depth` layers: 64 * depth wide, heads of 128, or smaller where that makes under three."""
        width = n_embd or 64 * depth
        if n_head is None:
            sizes = [size for size in (128, 64, 32, 16, 8) if width % size == 0 and width >= 3 * size]
            n_head = width // sizes[0] if sizes else 1
        shape = {"sequence_len": sequence_len, "vocab_size": vocab_size, "n_layer": depth, "n_embd": width}
        heads = {"n_head": n_head, "n_kv_head": n_kv_head or n_head}
        values = MODERN | {"window_len": max(1, sequence_len // 4)} | overrides
        return cls.from_dict(shape | heads | values)

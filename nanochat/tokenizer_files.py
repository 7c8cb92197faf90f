"""
A vocabulary on disk: ours is JSON; nanochat's old tokenizer.pkl is read too, and nothing in it is ever run.

A pickle is a program. The unpickler here knows one class name, tiktoken's Encoding, and gives it a stand-in that merely keeps
the state it was pickled with; whatever else a pickle asks for ends the reading. nanochat's token_bytes.pt is written for
others but never read: its values of October 2025 count a token that is no valid UTF-8 as three bytes, so byte counts are
always taken from the tokens themselves.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from nanochat.common import UserError, print0

JSON_FILE, PICKLE_FILE = "tokenizer.json", "tokenizer.pkl"
FORMAT = "nanochat-tokenizer-1"
LARGEST_PICKLE = 1 << 26


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer consists of."""

    ranks: Mapping[bytes, int]
    specials: Mapping[str, int]
    pattern: str


def read_vocabulary(directory: Path) -> Vocabulary:
    """Read tokenizer.json of the folder, or tokenizer.pkl where there is no other."""
    ours, legacy = directory / JSON_FILE, directory / PICKLE_FILE
    if ours.is_file():
        if legacy.is_file():
            print0(f"{directory} holds {JSON_FILE} and {PICKLE_FILE}: using {JSON_FILE}")
        return _read_json(ours)
    if legacy.is_file():
        return _read_pickle(legacy)
    raise UserError(f"no tokenizer in {directory}; make one with: python -m scripts.tok_train")


def to_json(vocabulary: Vocabulary) -> str:
    """The text of tokenizer.json: tokens in base64 by id, null where an id is a special token's or nobody's."""
    tokens: list[str | None] = [None] * (max(vocabulary.ranks.values()) + 1)
    for piece, token in vocabulary.ranks.items():
        tokens[token] = base64.b64encode(piece).decode()
    record = {
        "format": FORMAT,
        "pattern": vocabulary.pattern,
        "specials": dict(vocabulary.specials),
        "tokens": tokens,
    }
    return json.dumps(record)


def _read_json(path: Path) -> Vocabulary:
    try:
        record = json.loads(path.read_bytes())
        if record["format"] != FORMAT:
            raise UserError(
                f"{path} is of format {record['format']!r}, not {FORMAT}; is it from a newer version?"
            )
        tokens = enumerate(record["tokens"])
        ranks = {base64.b64decode(text, validate=True): token for token, text in tokens if text is not None}
        specials = {str(name): int(token) for name, token in record["specials"].items()}
        return Vocabulary(ranks, specials, str(record["pattern"]))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r:.80}); make it anew with scripts.tok_train") from None


class _StandIn:
    """What a pickle's tiktoken Encoding becomes: the state it was pickled with, and no code of anybody's."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _OneClass(pickle.Unpickler):
    """Knows one class name; everything else in a pickle that could do harm starts with another."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise UserError(f"it asks for {module}.{name}, which has no place in a tokenizer")
        return _StandIn


def _read_pickle(path: Path) -> Vocabulary:
    """ranks, specials and pattern of nanochat's tokenizer.pkl, without running anything that it says."""
    size = path.stat().st_size
    if size > LARGEST_PICKLE:
        raise UserError(f"{path} has {size:,} bytes, too many for a tokenizer; it is left unread")
    return unpickled(path.read_bytes(), str(path))


def unpickled(data: bytes, name: str) -> Vocabulary:
    """The vocabulary in a pickle that `name` holds."""
    try:
        state = getattr(_OneClass(io.BytesIO(data)).load(), "state", None)
    except Exception as error:  # a hostile pickle can raise anything
        raise UserError(f"{name} is not a pickled tiktoken Encoding: {error!s:.200}") from None
    if not isinstance(state, dict):
        raise UserError(f"{name} is not a pickled tiktoken Encoding with its ranks")
    ranks, specials, pattern = (state.get(key) for key in ("mergeable_ranks", "special_tokens", "pat_str"))
    if not (_is_table(ranks, bytes) and _is_table(specials, str) and isinstance(pattern, str)):
        raise UserError(f"{name} lacks mergeable_ranks, special_tokens or pat_str")
    return Vocabulary(ranks, specials, pattern)


def _is_table(table: Any, key: type) -> TypeGuard[dict[Any, int]]:
    return isinstance(table, dict) and all(type(k) is key and type(v) is int for k, v in table.items())

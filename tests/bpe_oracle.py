"""Byte-pair encoding as plainly as it can be said: the oracle of rustbpe. Slow on purpose."""

from __future__ import annotations

from collections import Counter

import regex


def merge(piece: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """Replace `pair` by `token`, from left to right."""
    merged: list[int] = []
    while piece:
        width = 2 if tuple(piece[:2]) == pair else 1
        merged.append(token if width == 2 else piece[0])
        piece = piece[width:]
    return merged


def train(texts: list[str], vocab_size: int, pattern: str) -> list[bytes]:
    """The tokens in order: 256 bytes, then the most frequent pair again and again, the smallest of equals."""
    tokens = [bytes([byte]) for byte in range(256)]
    pieces = [list(piece.encode()) for text in texts for piece in regex.findall(pattern, text)]
    while len(tokens) < vocab_size:
        counts = Counter(pair for piece in pieces for pair in zip(piece, piece[1:], strict=False))
        # Other merges may have made the same bytes before: such a pair is passed over.
        pairs = [pair for pair in counts if tokens[pair[0]] + tokens[pair[1]] not in tokens]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-counts[pair], pair))
        pieces = [merge(piece, best, len(tokens)) for piece in pieces]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def encode(text: str, tokens: list[bytes], pattern: str) -> list[int]:
    """Within each piece, join the neighbours whose bytes are the earliest token, until none are."""
    ids: list[int] = []
    for found in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in found.encode()]
        while joined := [
            (tokens.index(a + b), i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in tokens
        ]:
            _, at = min(joined)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [tokens.index(part) for part in parts]
    return ids

"""INTERIM by the lead, so that integration can begin; the tokenizer engineer replaces this file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat.common import UserError, base_dir, write_atomic

SPECIALS = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
            "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
PATTERN = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""


class Tokenizer:
    def __init__(self, ranks: dict[bytes, int], pattern: str) -> None:
        import tiktoken

        self.ranks, self.pattern = ranks, pattern
        self.specials = {s: len(ranks) + i for i, s in enumerate(SPECIALS)}
        self.enc = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.specials)
        self.vocab_size = len(ranks) + len(SPECIALS)
        self.bos_id = self.specials["<|bos|>"]
        self._bytes = {i: b for b, i in ranks.items()}

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int, *, pattern: str | None = None) -> Tokenizer:
        import rustbpe

        t = rustbpe.Tokenizer()
        t.train_from_iterator(texts, vocab_size - len(SPECIALS), pattern=pattern or PATTERN)
        return cls({bytes(k): v for k, v in t.get_mergeable_ranks()}, t.get_pattern())

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"there is no tokenizer in {directory}; run python -m scripts.tok_train")
        d = json.loads(path.read_text())
        return cls({base64.b64decode(k): v for k, v in d["ranks"].items()}, d["pattern"])

    def save(self, directory: Path) -> None:
        d = {"pattern": self.pattern, "ranks": {base64.b64encode(k).decode(): v for k, v in self.ranks.items()}}
        write_atomic(directory / "tokenizer.json", json.dumps(d))

    def special(self, name: str) -> int:
        return self.specials[name]

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return ([self.bos_id] if bos else []) + self.enc.encode_ordinary(text)

    def encode_batch(self, texts: list[str], *, bos: bool = False, num_threads: int = 2) -> list[list[int]]:
        return [self.encode(t, bos=bos) for t in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.enc.decode(list(ids), errors="replace")

    def token_bytes_of(self, token: int) -> bytes:
        return self.enc.decode_single_token_bytes(token)

    def num_bytes(self) -> list[int]:
        return [len(self._bytes.get(i, b"")) for i in range(self.vocab_size)]

    def render_conversation(self, conversation: Any, *, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
        ids, mask = [self.bos_id], [0]

        def add(tokens: list[int], trained: int) -> None:
            ids.extend(tokens)
            mask.extend([trained] * len(tokens))

        for message in conversation["messages"]:
            content, role = message["content"], "user" if message["role"] == "system" else message["role"]
            mine = int(role == "assistant")
            add([self.specials[f"<|{role}_start|>"]], 0)
            if isinstance(content, str):
                add(self.encode(content), mine)
            else:
                for i, part in enumerate(content):
                    if part["type"] == "text":
                        sep = "\n" if i and content[i - 1]["type"] == "text" else ""
                        add(self.encode(sep + part["text"]), mine)
                    elif part["type"] == "python":
                        add([self.specials["<|python_start|>"], *self.encode(part["text"]), self.specials["<|python_end|>"]], mine)
                    else:
                        add([self.specials["<|output_start|>"], *self.encode(part["text"]), self.specials["<|output_end|>"]], 0)
            add([self.specials[f"<|{role}_end|>"]], mine)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: Any) -> list[int]:
        messages = conversation["messages"]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return [*self.render_conversation({"messages": messages})[0], self.specials["<|assistant_start|>"]]

    def letter_ids(self, letters: Sequence[str]) -> list[int]:
        start = self.encode("Answer:")
        found = []
        for letter in letters:
            ids = self.encode(f"Answer: {letter}")
            if ids[: len(start)] != start or len(ids) != len(start) + 1:
                raise UserError(f"letter {letter} is not one token after 'Answer:'; train the tokenizer on problems too")
            found.append(ids[-1])
        return found


def load_tokenizer(directory: Path | None = None) -> Tokenizer:
    return Tokenizer.load(directory or base_dir() / "tokenizer")

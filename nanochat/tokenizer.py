"""
Text to token ids and back, and conversations to token ids with a mask that says which of them are trained.

Byte-level BPE with GPT-4's way of splitting text, trained by our own `rustbpe/` and, in nanochat's layout, nine special tokens
after the merges. Encoding runs in rustbpe too, because its scanner and piece cache are several times faster than
tiktoken; the ids are the same, tiktoken is the tests' oracle, and it stands in, with a notice, where rustbpe is not
built.

The surprising choice: there is no way to write a special token in text. `encode` knows none, so a user who types
`<|assistant_end|>` gets those characters and nothing else; special tokens enter through `render_*` alone.
Files are nanochat/tokenizer_files.py, the reading of conversations is nanochat/conversation.py.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nanochat.common import UserError, base_dir, print0, write_atomic
from nanochat.conversation import Conversation, messages_of, turns
from nanochat.tokenizer_files import JSON_FILE, Vocabulary, read_vocabulary, to_json

SPECIALS = (
    "<|bos|>",  # begins every document and every conversation
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # the assistant calls the calculator
    "<|output_start|>", "<|output_end|>",  # and this is what it answered
)  # fmt: skip
NUM_BYTES = 256
LARGEST_VOCABULARY = 1 << 24
# The pieces after "Answer:" must be tokens whatever the training text: a letter is read off as one logit.
LETTERS = tuple(f" {letter}" for letter in "ABCDE")


def split_pattern(max_digits: int = 2) -> str:
    """
    How text is cut before merging: GPT-4's pattern, but with digits in runs of at most two, as nanochat has it.

    Single digits suit a vocabulary of a few hundred, which two-digit numbers alone would fill.
    """
    if not 1 <= max_digits <= 9:
        raise UserError(f"--digits={max_digits}: runs of digits are 1 to 9 long; use 1, 2 or 3")
    return (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+"
        rf"|\p{{N}}{{1,{max_digits}}}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )


class _Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def batch_encode(self, texts: list[str], *, num_threads: int | None = None) -> list[list[int]]: ...


class _Tiktoken:
    """tiktoken behind rustbpe's names."""

    def __init__(self, encoding: Any) -> None:
        self.encoding = encoding

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def batch_encode(self, texts: list[str], *, num_threads: int | None = None) -> list[list[int]]:
        return self.encoding.encode_ordinary_batch(texts, num_threads=num_threads or 8)


class Tokenizer:
    """A trained vocabulary. Make one with `train` or `load`."""

    def __init__(self, ranks: Mapping[bytes, int], specials: Mapping[str, int], pattern: str) -> None:
        """`ranks`: token bytes to id, all 256 bytes among them; `specials`: name to id, our nine among them."""
        self._ranks, self._specials, self.pattern = dict(ranks), dict(specials), pattern
        self._bytes = {token: piece for piece, token in self._ranks.items()}
        self._bytes |= {token: name.encode() for name, token in self._specials.items()}
        self._check()
        self.vocab_size = max(self._bytes) + 1
        self.bos_id = self.special("<|bos|>")
        self._encoder = self._make_encoder()
        self._letter_ids: dict[tuple[str, ...], list[int]] = {}

    def _check(self) -> None:
        if missing := [name for name in SPECIALS if name not in self._specials]:
            raise UserError(f"this tokenizer lacks {' '.join(missing)}; it is not one of nanochat's")
        if b"" in self._ranks or not all(bytes([byte]) in self._ranks for byte in range(NUM_BYTES)):
            raise UserError("this tokenizer lacks some of the 256 bytes; it is not a byte-level one")
        if len(self._bytes) != len(self._ranks) + len(self._specials):
            raise UserError(
                "this tokenizer gives two tokens the same id; make it anew with scripts.tok_train"
            )
        if min(self._bytes) < 0 or max(self._bytes) >= LARGEST_VOCABULARY:
            raise UserError(f"this tokenizer has ids outside 0 to {LARGEST_VOCABULARY - 1:,}; it is damaged")

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._ranks, self._specials, self.pattern)

    def _make_encoder(self) -> _Encoder:
        try:
            from rustbpe import Tokenizer as Fast

            make = Fast.from_mergeable_ranks
        except (ImportError, AttributeError) as error:  # not built, or the registry's package of that name
            print0(f"rustbpe is not built here ({error}): encoding with tiktoken, the same ids but slower")
            return _Tiktoken(self.to_tiktoken())
        try:
            return make(list(self._ranks.items()), self.pattern)
        except ValueError as error:
            raise UserError(f"this tokenizer cannot be used: {error}") from None

    def to_tiktoken(self) -> Any:
        """The same vocabulary as a tiktoken.Encoding, for other tools."""
        import tiktoken

        return tiktoken.Encoding(
            name="rustbpe", pat_str=self.pattern, mergeable_ranks=self._ranks, special_tokens=self._specials
        )

    # ---- making and keeping ----------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        pattern: str | None = None,
        required: Sequence[str] = LETTERS,
    ) -> Tokenizer:
        """
        Train on a stream of texts. `vocab_size` counts everything; it is not reached where the texts are too few.

        `required` pieces become tokens even if the texts hold too few of them: each takes the place of the last merge.
        """
        least = NUM_BYTES + len(SPECIALS) + len(required)
        if vocab_size < least:
            raise UserError(
                f"--vocab_size={vocab_size} is too small: {NUM_BYTES} bytes, {len(SPECIALS)} special tokens and "
                f"{len(required)} required ones need {least}"
            )
        try:
            import rustbpe
        except ImportError:
            raise UserError(
                "rustbpe is not built; run: uv run maturin develop --release --manifest-path rustbpe/Cargo.toml"
            ) from None
        pattern = pattern or split_pattern()
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIALS), pattern=pattern)
        pieces = [piece for piece, _ in trainer.get_mergeable_ranks()]
        pieces = _with_required(pieces, [piece.encode() for piece in required], vocab_size - len(SPECIALS))
        return cls(
            {piece: rank for rank, piece in enumerate(pieces)},
            {name: len(pieces) + index for index, name in enumerate(SPECIALS)},
            pattern,
        )

    @property
    def fingerprint(self) -> str:
        """A hash of tokens, special tokens and pattern: models trained with another one read nonsense."""
        text = to_json(Vocabulary(self._ranks, dict(sorted(self._specials.items())), self.pattern))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and, for other nanochats, token_bytes.pt."""
        import torch

        buffer = io.BytesIO()
        torch.save(torch.tensor(self.num_bytes(), dtype=torch.int32), buffer)
        write_atomic(Path(directory) / "token_bytes.pt", buffer.getvalue())
        write_atomic(
            Path(directory) / JSON_FILE, to_json(Vocabulary(self._ranks, self._specials, self.pattern))
        )

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json, or nanochat's tokenizer.pkl where there is no other."""
        found = read_vocabulary(Path(directory))
        return cls(found.ranks, found.specials, found.pattern)

    # ---- text --------------------------------------------------------------------------------------------------------

    def special(self, name: str) -> int:
        """The id of a special token, by its name as in "<|bos|>"."""
        if name not in self._specials:
            raise UserError(f"{name} is not a special token; they are {' '.join(self._specials)}")
        return self._specials[name]

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """The ids of `text`, in which nothing is special; `bos` puts the beginning-of-sequence token first."""
        ids = self._encoder.encode(text)
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, num_threads: int | None = None
    ) -> list[list[int]]:
        """`encode` of each text, on `num_threads` threads (by default as many as there are cores)."""
        batch = self._encoder.batch_encode(list(texts), num_threads=num_threads)
        return [[self.bos_id, *ids] for ids in batch] if bos else batch

    def token_bytes_of(self, token: int) -> bytes:
        """What one token stands for; a special token for its name."""
        try:
            return self._bytes[token]
        except KeyError:
            raise UserError(f"{token} is not a token; ids are below {self.vocab_size}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return b"".join(map(self.token_bytes_of, ids)).decode("utf-8", errors="replace")

    def num_bytes(self) -> list[int]:
        """Bytes of text that each id stands for; 0 for special tokens, which are no text."""
        special = set(self._specials.values())
        return [
            0 if token in special else len(self._bytes.get(token, b"")) for token in range(self.vocab_size)
        ]

    def letter_ids(self, letters: Sequence[str]) -> list[int]:
        """The token that really follows `Answer:` for each letter. Raises UserError unless it is one, and its own."""
        names = tuple(letters)
        if names not in self._letter_ids:
            cue = self.encode("Answer:")
            tails = [self.encode(f"Answer: {letter}") for letter in names]
            for letter, tail in zip(names, tails, strict=True):
                if tail[:-1] != cue:
                    raise UserError(
                        f"the vocabulary has no single token for {letter!r} after 'Answer:'; "
                        "train a tokenizer with scripts.tok_train, which reserves A to E"
                    )
            self._letter_ids[names] = [tail[-1] for tail in tails]
        return list(self._letter_ids[names])

    # ---- conversations -------------------------------------------------------------------------------------------

    def render_conversation(
        self, conversation: Conversation, *, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """The ids of a whole conversation, and for each 1 if the assistant says it and is trained to, else 0."""
        ids, mask = [self.bos_id], [0]

        def say(tokens: Sequence[int], trained: int) -> None:
            ids.extend(tokens)
            mask.extend([trained] * len(tokens))

        for role, parts in turns(conversation):
            say([self.special(f"<|{role}_start|>")], 0)
            for kind, text, trained in parts:
                # The tool's output is forced on the model, so there is nothing in it to learn.
                say(self._part(kind, text), int(role == "assistant" and kind != "output" and trained))
            say([self.special(f"<|{role}_end|>")], int(role == "assistant"))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """The prompt for the assistant's next turn; a last turn that is the assistant's is left out."""
        messages = messages_of(conversation)
        if messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if not messages or messages[-1].get("role") != "user":
            raise UserError("a conversation to complete needs a user's message at the end")
        ids, _ = self.render_conversation({"messages": messages})
        return [*ids, self.special("<|assistant_start|>")]

    def _part(self, kind: str, text: str) -> list[int]:
        ids = self.encode(text)
        return (
            ids
            if kind == "text"
            else [self.special(f"<|{kind}_start|>"), *ids, self.special(f"<|{kind}_end|>")]
        )


def load_tokenizer(directory: Path | None = None) -> Tokenizer:
    """The tokenizer of the base directory, or of another folder."""
    return Tokenizer.load(directory or base_dir() / "tokenizer")


def _with_required(pieces: list[bytes], required: Sequence[bytes], most: int) -> list[bytes]:
    """`pieces` with those of `required` that are missing at the end, in place of the last merges where it is full."""
    kept = len(pieces)
    while True:
        missing = [piece for piece in required if piece not in pieces[:kept]]
        room = most - len(missing)
        if kept <= room:
            return [*pieces[:kept], *missing]
        kept -= 1

"""Small real things for tests: a tokenizer trained in a second on documents of our own."""

from __future__ import annotations

from functools import cache

from nanochat.tokenizer import Tokenizer, split_pattern


@cache
def tiny_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """Single digits and few words, as the CPU preset has it."""
    from tasks.prose import drill_document, pretraining_document

    texts = [pretraining_document(number, 0) for number in range(1500)]
    texts += [drill_document(number, 0) for number in range(500)]
    return Tokenizer.train(iter(texts), vocab_size, pattern=split_pattern(1))

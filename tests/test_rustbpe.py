"""rustbpe against a plain BPE, the regex package and tiktoken; and whatever a caller may do wrong."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import resource
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat.tokenizer import split_pattern
from tests import bpe_oracle

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What the split pattern treats specially, and look-alikes: long s, Kelvin sign, no-break space, letter-like numbers.
TELLING = "asStTlLvVeErRdmM'’ \t\n\r\x0b\x85\u00a0\u2028\u3000 09٣½Ⅷⓐé\u0301中🙂.,$_\0ſ\u212a\ufeff"
telling_text = st.text(st.sampled_from(TELLING), max_size=60)
# Python's tables, the regex package's and the regex crate's are of different years: points assigned since differ.
any_text = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=200)

PROSE = (
    "The ferry to the island leaves twice a day, at 7:00 and at 16:30, unless the wind comes from the north. "
    "Nobody needs to look at the timetable; they look at the flag. It's 12 km, we've 250 seats, and they'll wait.\n\n"
    "Паром на остров ходит два раза в день. 去岛上的渡船每天开两班。\n\tif x == 10:\n\t\treturn x  # ten\n"
)


def trained(vocab_size: int = 400, pattern: str | None = None, text: str = PROSE) -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter([text]), vocab_size, pattern=pattern)
    return tokenizer


def as_tiktoken(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding(
        "ours", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={}
    )


# ---- the rule -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_digits", [1, 2, 3])
def test_prose_gives_the_oracles_merges_and_ids(max_digits: int) -> None:
    pattern = split_pattern(max_digits)
    tokenizer = trained(420, pattern)
    tokens = bpe_oracle.train([PROSE], 420, pattern)
    assert tokenizer.get_mergeable_ranks() == [(token, rank) for rank, token in enumerate(tokens)]
    assert tokenizer.encode(PROSE) == bpe_oracle.encode(PROSE, tokens, pattern)


@given(st.lists(st.text(st.sampled_from("aab é\n1"), max_size=40), max_size=6), st.integers(256, 300))
def test_any_small_texts_give_the_oracles_merges_and_ids(texts: list[str], vocab_size: int) -> None:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size)
    tokens = bpe_oracle.train(texts, vocab_size, split_pattern(2))
    assert tokenizer.get_mergeable_ranks() == [(token, rank) for rank, token in enumerate(tokens)]
    for text in texts:
        assert tokenizer.encode(text) == bpe_oracle.encode(text, tokens, split_pattern(2))


def test_ties_go_to_the_smallest_pair() -> None:
    tokenizer = trained(258, text="xy\nab")
    assert tokenizer.get_mergeable_ranks()[256:] == [(b"ab", 256), (b"xy", 257)]


@pytest.mark.parametrize("max_digits", [1, 2, 3])
@settings(max_examples=300)
@given(text=telling_text | any_text)
def test_the_scanner_cuts_like_the_regex(max_digits: int, text: str) -> None:
    pattern = split_pattern(max_digits)
    pieces = rustbpe.split(text, pattern)
    assert pieces == regex.findall(pattern, text)
    assert "".join(pieces) == text


def test_every_assigned_code_point_is_classed_as_the_regex_classes_it() -> None:
    pattern = split_pattern(1)
    points = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    text = "".join(f"x{c}1{c} {c}\n" for c in points)
    assert rustbpe.split(text, pattern) == regex.findall(pattern, text)


# ---- the same ids as tiktoken ---------------------------------------------------------------------------------------------

ENCODERS = {
    digits: (tokenizer, as_tiktoken(tokenizer))
    for digits, tokenizer in ((digits, trained(500, split_pattern(digits))) for digits in (1, 2, 3))
}


@pytest.mark.parametrize("max_digits", [1, 2, 3])
@settings(max_examples=300)
@given(text=telling_text | any_text | st.text(st.sampled_from(PROSE), max_size=300))
def test_ids_are_tiktokens_and_decode_gives_the_text_back(max_digits: int, text: str) -> None:
    ours, theirs = ENCODERS[max_digits]
    ids = ours.encode(text)
    assert ids == theirs.encode_ordinary(text)
    assert ours.decode(ids) == text


@given(st.binary(max_size=100))
def test_any_bytes_decode_as_python_decodes_them(data: bytes) -> None:
    assert rustbpe.Tokenizer().decode(list(data)) == data.decode(errors="replace")


@given(st.text(st.characters(categories=("Cs", "Ll")), max_size=20))
def test_surrogates_become_what_tiktoken_makes_of_them(text: str) -> None:
    ours, theirs = ENCODERS[2]
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.batch_encode([text]) == [ours.encode(text)]
    rustbpe.Tokenizer().train_from_iterator([text], 300)


def test_long_pieces_are_merged_alike_and_in_no_time() -> None:
    ours, theirs = ENCODERS[2]
    for length in (90, 95, 96, 97, 500, 3000):
        piece = "".join(random.Random(length).choices("thesand", k=length))
        assert ours.encode(piece) == theirs.encode_ordinary(piece)
    began = time.process_time()
    monster = "the" * 300_000
    assert ours.decode(ours.encode(monster)) == monster
    trained(300, text=monster)
    assert time.process_time() - began < 20


@pytest.mark.parametrize("pattern", [GPT2, r"\w+", r"\S+|\s+"])
def test_another_pattern_goes_through_the_regex_engine(pattern: str) -> None:
    tokenizer = trained(400, pattern)
    assert tokenizer.get_pattern() == pattern
    # What a pattern does not match is left out, here as there.
    assert tokenizer.encode(PROSE) == as_tiktoken(tokenizer).encode_ordinary(PROSE)
    assert rustbpe.split(PROSE, pattern) == regex.findall(pattern, PROSE)


# ---- the API of the registry's package ------------------------------------------------------------------------------------


def test_untrained_it_knows_the_bytes() -> None:
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.get_pattern() == split_pattern(2)
    assert tokenizer.get_mergeable_ranks() == [(bytes([byte]), byte) for byte in range(256)]
    assert tokenizer.encode("hé") == list("hé".encode())


def test_the_signatures_are_as_documented() -> None:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iterator=iter(["aaab"] * 3), vocab_size=258, buffer_size=2, pattern=None)
    assert tokenizer.vocab_size == 258
    assert tokenizer.get_mergeable_ranks()[256:] == [(b"aa", 256), (b"ab", 257)]
    assert tokenizer.batch_encode(["aab", "", "b"]) == [[256, 98], [], [98]]


@given(st.lists(st.text(max_size=30), max_size=40), st.integers(1, 50), st.integers(1, 5))
def test_threads_and_buffers_change_nothing(texts: list[str], buffer_size: int, num_threads: int) -> None:
    alone, other = rustbpe.Tokenizer(), rustbpe.Tokenizer()
    alone.train_from_iterator(texts, 280, num_threads=1)
    other.train_from_iterator(iter(texts), 280, buffer_size, num_threads=num_threads)
    assert other.get_mergeable_ranks() == alone.get_mergeable_ranks()
    assert other.batch_encode(texts, num_threads=num_threads) == [alone.encode(text) for text in texts]


def test_a_tokenizer_is_made_again_from_its_ranks() -> None:
    tokenizer = trained(400, split_pattern(1))
    again = rustbpe.Tokenizer.from_mergeable_ranks(tokenizer.get_mergeable_ranks(), tokenizer.get_pattern())
    assert again.get_mergeable_ranks() == tokenizer.get_mergeable_ranks()
    assert again.encode(PROSE) == tokenizer.encode(PROSE)


def test_ranks_may_have_holes_but_nothing_decodes_to_them() -> None:
    ranks = [*rustbpe.Tokenizer().get_mergeable_ranks(), (b"ab", 300)]
    tokenizer = rustbpe.Tokenizer.from_mergeable_ranks(ranks)
    assert (tokenizer.vocab_size, tokenizer.encode("abc")) == (301, [300, 99])
    with pytest.raises(ValueError, match="299 is not the id of a token"):
        tokenizer.decode([299])


# ---- mistakes are exceptions ----------------------------------------------------------------------------------------------


def broken() -> Iterator[str]:
    yield "fine"
    raise KeyError("the disk is gone")


def test_mistakes_are_exceptions_with_a_reason() -> None:
    tokenizer = trained(300)
    before = tokenizer.get_mergeable_ranks()
    train = tokenizer.train_from_iterator
    mistakes = [
        (ValueError, "at least 256", lambda: train(["a"], 255)),
        (ValueError, "buffer_size", lambda: train(["a"], 300, 0)),
        (ValueError, "does not compile", lambda: train(["a"], 300, pattern="(")),
        (TypeError, "must be str, not int", lambda: train(["a", 3], 300)),
        (TypeError, "not iterable", lambda: train(None, 300)),
        (OverflowError, None, lambda: train(["a"], -1)),
        (KeyError, "the disk is gone", lambda: train(broken(), 300)),
        (ValueError, "gave up", lambda: train(["abababab" * 8], 300, pattern="(?i)(a|b|ab)*(?>c)")),
        (ValueError, "not the id", lambda: tokenizer.decode([300])),
        (OverflowError, None, lambda: tokenizer.decode([-1])),
        (TypeError, None, lambda: tokenizer.encode(b"bytes")),
        (TypeError, None, lambda: tokenizer.encode(None)),
        (TypeError, None, lambda: tokenizer.batch_encode("a string")),
        (TypeError, None, lambda: tokenizer.batch_encode(["a", None])),
        (ValueError, "no token for the byte 0", lambda: tokenizer.from_mergeable_ranks([])),
        (ValueError, "two tokens", lambda: tokenizer.from_mergeable_ranks([*before, (b"zz", 7)])),
        (ValueError, "same token", lambda: tokenizer.from_mergeable_ranks([*before, (b"a", 999)])),
        (ValueError, "beyond", lambda: tokenizer.from_mergeable_ranks([*before, (b"zz", 1 << 31)])),
    ]
    for kind, words, act in mistakes:
        with pytest.raises(kind, match=words):
            act()
    assert tokenizer.get_mergeable_ranks() == before, "a failed training leaves the tokenizer as it was"


def test_an_endless_iterator_ends_with_its_error() -> None:
    with pytest.raises(ValueError, match="gave up"):
        rustbpe.Tokenizer().train_from_iterator(
            itertools.repeat("abababab" * 8), 300, pattern="(?i)(a|b|ab)*(?>c)"
        )


# ---- running beside others --------------------------------------------------------------------------------------------


def test_other_threads_run_and_encode_while_it_trains() -> None:
    tokenizer = trained(300)
    ids = tokenizer.encode(PROSE)
    words = [f" w{n * 7919 % 100_003:x}" for n in range(100_000)]
    training = threading.Thread(
        target=lambda: rustbpe.Tokenizer().train_from_iterator(["".join(words)], 3000)
    )
    training.start()
    ticks = 0
    while training.is_alive():
        assert tokenizer.encode(PROSE) == ids
        ticks += 1
    assert ticks > 10


def test_memory_does_not_grow_with_the_stream() -> None:
    def text(megabytes: int) -> Iterator[str]:
        return itertools.repeat(PROSE * 500, megabytes * 1_000_000 // len(PROSE.encode()) // 500)

    rustbpe.Tokenizer().train_from_iterator(text(4), 300)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rustbpe.Tokenizer().train_from_iterator(text(60), 300)
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kb < 20_000


# ---- real text ------------------------------------------------------------------------------------------------------------


def real_texts() -> Iterator[str]:
    """Every document and every row of NANOCHAT_DATA_DIR."""
    folder = Path(os.environ.get("NANOCHAT_DATA_DIR") or "/nowhere")
    if not folder.is_dir():
        pytest.skip("NANOCHAT_DATA_DIR names no folder with real text")
    import pyarrow.parquet

    for path in sorted(folder.rglob("*.parquet")):
        yield from pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    for path in sorted(folder.rglob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield line
                yield "\n".join(str(value) for value in json.loads(line).values())


def test_real_text_is_cut_and_encoded_like_regex_and_tiktoken() -> None:
    texts = [text[:20_000] for text in itertools.islice(real_texts(), 0, None, 199)]
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, 4096)
    theirs = as_tiktoken(tokenizer)
    for text, ids in zip(texts, tokenizer.batch_encode(texts), strict=True):
        assert ids == theirs.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
    sample = "\n".join(texts[::20])
    assert rustbpe.split(sample) == regex.findall(split_pattern(2), sample)


@pytest.mark.slow
def test_all_real_text_is_encoded_like_tiktoken() -> None:
    texts = list(real_texts())
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, 32_768)
    theirs = as_tiktoken(tokenizer)
    for start in range(0, len(texts), 1000):
        block = texts[start : start + 1000]
        assert tokenizer.batch_encode(block) == theirs.encode_ordinary_batch(block)

"""
Train the tokenizer on the text that the model will read.

    python -m scripts.tok_train --max_chars=2000000000 --vocab_size=65536
    python -m scripts.tok_train --max_chars=20000000 --vocab_size=512       # a model of half a million parameters

One process, whatever the number of GPUs. The text is streamed: memory holds its distinct pieces, not the text.

The surprising choice: part of the text are the word problems that the later stages train on, half of it where the
vocabulary is small. A vocabulary of 512 has room for 247 merges; spent on novels, they leave "Answer:" and the options
in bytes, and a small model with a short context pays for each of them. Small vocabularies also keep digits single.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError
from nanochat.config import StageConfig, cli

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer
    from nanochat.tracking import Tracker

SMALL_VOCABULARY = 4096
NUM_PROBLEMS = 20_000
# Without shards we write the documents ourselves, by formula: more of the same would not change the counts.
MOST_WRITTEN_CHARS = 5_000_000


@dataclass(frozen=True)
class Config(StageConfig):
    """Train the tokenizer."""

    max_chars: int = 2_000_000_000
    """characters to train on; fewer where the text ends before"""
    doc_cap: int = 10_000
    """characters of one document; what follows is left out"""
    vocab_size: int = 65_536
    """tokens, the 256 bytes and nine special ones among them"""
    digits: int = 0
    """longest run of digits in a token, 1 to 3; 0: one in vocabularies of up to 4,096 tokens, else two"""
    shards: str = ""
    """folder of parquet shards; by default NANOCHAT_DATA_DIR/pretrain or base_data of the base dir"""
    texts: str = ""
    """more UTF-8 text files, with commas between"""
    mixture: str = "aqua,synthetic"
    """tasks whose training problems are part of the text, with commas between; empty: none"""
    mixture_share: float = -1.0
    """their share of the characters; -1: half in vocabularies of up to 4,096 tokens, else a twentieth"""

    def __post_init__(self) -> None:
        if self.max_chars < 1:
            raise UserError(
                f"--max_chars={self.max_chars}: a tokenizer needs some text; the default is 2,000,000,000"
            )
        if self.doc_cap < 1:
            raise UserError(f"--doc_cap={self.doc_cap}: a document keeps at least one character")
        if not 0 <= self.digits <= 3:
            raise UserError(f"--digits={self.digits}: use 1, 2 or 3, or 0 to go by the vocabulary")
        if self.mixture_share > 0.95:
            raise UserError(f"--mixture_share={self.mixture_share} is a share of at most 0.95")

    @property
    def small(self) -> bool:
        return self.vocab_size <= SMALL_VOCABULARY

    @property
    def max_digits(self) -> int:
        return self.digits or (1 if self.small else 2)

    @property
    def share(self) -> float:
        return self.mixture_share if self.mixture_share >= 0 else (0.5 if self.small else 0.05)


def main(config: Config) -> None:
    """Train, save, report."""
    import time

    from nanochat.common import base_dir, compute_cleanup, compute_init
    from nanochat.tokenizer import Tokenizer, split_pattern
    from nanochat.tracking import open_run

    world = compute_init("cpu", seed=config.seed)
    with open_run("tok_train", config, world) as tracker:
        if world.main:
            stream = Stream(mixed(sources(config, tracker)), config.doc_cap, config.max_chars)
            began = time.perf_counter()
            pattern = split_pattern(config.max_digits)
            tokenizer = Tokenizer.train(iter(stream), config.vocab_size, pattern=pattern)
            seconds = time.perf_counter() - began
            if not stream.num_chars:
                raise UserError("there is no text to train on; name some with --shards or --texts")
            directory = base_dir() / "tokenizer"
            tokenizer.save(directory)
            results = {"seconds": round(seconds, 2), **describe(tokenizer, stream, config)}
            report(tokenizer, results, directory, config, tracker)
        world.barrier()
    compute_cleanup(world)


class Stream:
    """Documents cut to their cap until the characters are used up; it counts what it gave."""

    def __init__(self, documents: Iterator[str], doc_cap: int, max_chars: int) -> None:
        self.documents, self.doc_cap, self.max_chars = documents, doc_cap, max_chars
        self.num_chars = self.num_documents = 0

    def __iter__(self) -> Iterator[str]:
        while self.num_chars < self.max_chars:
            document = next(self.documents, None)
            if document is None:
                return
            document = document[: min(self.doc_cap, self.max_chars - self.num_chars)]
            self.num_chars += len(document)
            self.num_documents += 1
            yield document


def mixed(sources: list[tuple[float, Iterator[str]]]) -> Iterator[str]:
    """Every source its share of the characters, until the shortest ends."""
    from nanochat.dataset import mixed_texts

    return mixed_texts(sources) if len(sources) > 1 else sources[0][1]


def sources(config: Config, tracker: Tracker) -> list[tuple[float, Iterator[str]]]:
    """(share, texts) of documents and of each task that can be had; problems come again and again."""
    from tasks.catalog import open_task
    from tasks.common import limit
    from tasks.rows import DataUnavailable

    tasks = []
    for name in filter(None, (name.strip() for name in config.mixture.split(","))):
        if config.share == 0:
            break
        try:
            task = limit(open_task(name, "train", seed=config.seed), NUM_PROBLEMS)
        except DataUnavailable as error:
            tracker.note("skipped", f"tokenizer: {error}")
            continue
        tracker.note("data", f"tokenizer: problems of {name} from {task.source}")
        tasks.append(itertools.cycle(conversation_texts(task)))
    prose = documents(config, tracker)
    share = config.share if tasks else 0.0
    return [(1 - share, prose), *((share / len(tasks), texts) for texts in tasks)]


def documents(config: Config, tracker: Tracker) -> Iterator[str]:
    """Text files that were named, then the training shards; where there is neither, documents of our own writing."""
    from nanochat.dataset import open_texts, texts

    files = [Path(name.strip()).expanduser() for name in config.texts.split(",") if name.strip()]
    named = [_read(file) for file in files]
    folder = Path(config.shards).expanduser() if config.shards else None
    try:
        num_documents = len(open_texts("train", folder))
    except UserError as error:
        if config.shards:
            raise
        if named:
            return iter(named)
        from tasks.prose import pretraining_documents

        tracker.note("skipped", f"tokenizer: {error}")
        tracker.note("data", "tokenizer: documents of our own writing")
        return iter(Stream(pretraining_documents(config.seed), config.doc_cap, MOST_WRITTEN_CHARS))
    tracker.note(
        "data", f"tokenizer: {num_documents:,} documents on disk" + (f", {len(named)} files" if named else "")
    )
    return itertools.chain(named, texts("train", directory=folder))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts: {file} cannot be read as UTF-8 text: {error}") from None


def conversation_texts(task: Any) -> Iterator[str]:
    """What is said in the conversations of a task, turn by turn, as the tokenizer will render it."""
    from nanochat.conversation import turns

    for conversation in task:
        for _, parts in turns(conversation):
            yield from (text for _, text, _ in parts)


def describe(tokenizer: Tokenizer, stream: Stream, config: Config) -> dict[str, Any]:
    """The numbers of the report."""
    sizes = [size for size in tokenizer.num_bytes() if size]
    return {
        "vocab_size": tokenizer.vocab_size,
        "max_digits": config.max_digits,
        "num_chars": stream.num_chars,
        "num_documents": stream.num_documents,
        "mean_token_bytes": sum(sizes) / len(sizes),
        "max_token_bytes": max(sizes),
    }


def report(
    tokenizer: Tokenizer, results: dict[str, Any], directory: Path, config: Config, tracker: Tracker
) -> None:
    """Say what came out, and what to know about it."""
    tracker.finish(results)
    print(
        f"{tokenizer.vocab_size:,} tokens from {results['num_chars']:,} characters in {results['seconds']:.1f} s, "
        f"in {directory}"
    )
    if tokenizer.vocab_size < config.vocab_size:
        tracker.note(
            "warning",
            f"the text gave {tokenizer.vocab_size:,} tokens, not the {config.vocab_size:,} asked for",
        )


if __name__ == "__main__":
    main(cli(Config))

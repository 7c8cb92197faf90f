"""
Tokenizer speed: training beside the registry's rustbpe and Hugging Face's tokenizers, encoding beside tiktoken.

    NANOCHAT_DATA_DIR=../shared/data python -m benchmarks.tokenizer
    python -m benchmarks.tokenizer --megabytes 5,20,100 --repeats 1       # growth with the corpus
    python -m venv /tmp/peers && /tmp/peers/bin/pip install rustbpe tokenizers
    python -m benchmarks.tokenizer --peers /tmp/peers/lib/python3.11/site-packages

Every timing is a process of its own, bound to as many cores as the row says, in which the text lies in memory as a
list of strings; the contenders take turns and medians count. Memory is what training adds to that. The registry's
package has the name of ours, so peers are looked for in the folder named, never installed beside ours. `same` says
whether all ranks are the registry's, to the byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from nanochat.config import cli

CONTENDERS = ("ours", "rustbpe", "tokenizers")
ENCODERS = ("ours", "ours, batch", "tiktoken", "tiktoken, batch")


@dataclass(frozen=True)
class Config:
    """Compare training and encoding with the peers'."""

    megabytes: str = "20"
    """text to train on, with commas between; 100 is what docs/benchmarks.md quotes"""
    threads: str = "1,2"
    """cores to run on, with commas between"""
    vocab_size: int = 32_768
    """tokens to train"""
    repeats: int = 5
    """timings of each contender; the median counts"""
    peers: str = ""
    """site-packages with the registry's rustbpe and tokenizers; empty: ours alone"""
    encode_megabytes: float = 10.0
    """text to encode"""
    child: str = ""
    """(for the processes that this one starts)"""


def texts(num_bytes: float) -> Iterator[str]:
    """Training documents, over and over if they do not suffice, `num_bytes` of UTF-8 in all."""
    from nanochat.dataset import open_texts

    documents = open_texts("train")
    size = number = 0
    while size < num_bytes:
        text = documents[number % len(documents)][: int(num_bytes - size)]
        number += 1
        size += len(text.encode())
        yield text


# ---- in a child process -------------------------------------------------------------------------------------------


def train_once(contender: str, config: Config) -> dict[str, Any]:
    """Time one training of one contender."""
    import resource

    data = list(texts(float(config.megabytes) * 1e6))
    if contender != "ours":
        sys.path.insert(0, config.peers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    ranks = (_train_huggingface if contender == "tokenizers" else _train_rustbpe)(data, config)
    result = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    digest = hashlib.sha256(repr(ranks).encode()).hexdigest() if ranks else ""
    return {**result, "added_megabytes": added / 1024, "digest": digest}


def _train_rustbpe(data: list[str], config: Config) -> list[tuple[bytes, int]]:
    import rustbpe
    from nanochat.tokenizer import split_pattern

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(data), config.vocab_size, pattern=split_pattern())
    return [(bytes(token), rank) for token, rank in tokenizer.get_mergeable_ranks()]


def _train_huggingface(data: list[str], config: Config) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from nanochat.tokenizer import split_pattern

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(split_pattern()), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(iter(data), trainer)


def encode_all(config: Config) -> dict[str, list[float]]:
    """Seconds of every encoder on the same text, taking turns; ids are compared before anything is timed."""
    from nanochat.tokenizer import Tokenizer

    data = list(texts(config.encode_megabytes * 1e6))
    ours = Tokenizer.train(data, config.vocab_size)
    theirs = ours.to_tiktoken()
    cores = len(os.sched_getaffinity(0))
    ways = {
        "ours": lambda: [ours.encode(text) for text in data],
        "tiktoken": lambda: [theirs.encode_ordinary(text) for text in data],
        "ours, batch": lambda: ours.encode_batch(data, num_threads=cores),
        "tiktoken, batch": lambda: theirs.encode_ordinary_batch(data, num_threads=cores),
    }
    if ways["ours"]() != ways["tiktoken"]():
        raise AssertionError("our ids are not tiktoken's")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(config.repeats):
        for name, encode in ways.items():
            began = time.perf_counter()
            encode()
            seconds[name].append(time.perf_counter() - began)
    return seconds


# ---- in the parent --------------------------------------------------------------------------------------------------


def child(kind: str, config: Config, threads: int) -> Any:
    """Run one measurement in a process bound to `threads` cores."""
    flags = [f"--{name}={value}" for name, value in dataclasses.asdict(config).items() if name != "child"]
    cores = sorted(os.sched_getaffinity(0))[:threads]
    bind = f"import os, runpy, sys; os.sched_setaffinity(0, {cores}); sys.argv[0] = 'tokenizer'; "
    code = bind + "runpy.run_module('benchmarks.tokenizer', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, f"--child={kind}"],
        env={**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare_training(config: Config, megabytes: float, threads: int) -> list[dict[str, Any]]:
    """Rows of the training table for one size of text and one number of cores."""
    contenders = CONTENDERS if config.peers else CONTENDERS[:1]
    sized = dataclasses.replace(config, megabytes=str(megabytes))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(config.repeats):
        for name in contenders:
            runs[name].append(child(name, sized, threads))
    rows = []
    for name, timings in runs.items():
        row = {key: statistics.median(run[key] for run in timings) for key in ("seconds", "cpu_seconds")}
        row["added_megabytes"] = max(run["added_megabytes"] for run in timings)
        rows.append({"contender": name, "megabytes": megabytes, "threads": threads, **row})
    for row in rows:
        row["times_ours"] = row["seconds"] / rows[0]["seconds"]
    if config.peers:
        rows[0]["same"] = runs["ours"][0]["digest"] == runs["rustbpe"][0]["digest"]
    return rows


def main(config: Config) -> None:
    """Measure, print the tables, then one line of JSON."""
    if config.child:
        result = encode_all(config) if config.child == "encode" else train_once(config.child, config)
        print(json.dumps(result))
        return
    if config.repeats < 1:
        raise UserError(f"--repeats={config.repeats}: time everything at least once")
    training: list[dict[str, Any]] = []
    print(
        f"{'train':12}{'MB':>7}{'cores':>7}{'seconds':>10}{'cpu':>8}{'MB/s':>8}{'ours x':>8}{'added MB':>10}  same"
    )
    for megabytes in map(float, config.megabytes.split(",")):
        for threads in map(int, config.threads.split(",")):
            for row in compare_training(config, megabytes, threads):
                training.append(row)
                print(
                    f"{row['contender']:12}{megabytes:7.0f}{threads:7}{row['seconds']:10.2f}{row['cpu_seconds']:8.2f}"
                    f"{megabytes / row['seconds']:8.1f}{row['times_ours']:8.1f}{row['added_megabytes']:10.0f}"
                    f"  {row.get('same', '')}",
                    flush=True,
                )
    encoding: list[dict[str, Any]] = []
    print(f"{'encode':20}{'cores':>7}{'MB/s':>8}")
    for threads in map(int, config.threads.split(",")):
        seconds = child("encode", config, threads)
        for name in ENCODERS:
            speed = config.encode_megabytes / statistics.median(seconds[name])
            encoding.append({"encoder": name, "threads": threads, "megabytes_per_second": speed})
            print(f"{name:20}{threads:7}{speed:8.1f}", flush=True)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    settings = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in ("child", "peers")
    }
    print(
        json.dumps(
            {"benchmark": "tokenizer", **settings, **machine, "training": training, "encoding": encoding}
        )
    )


if __name__ == "__main__":
    main(cli(Config))

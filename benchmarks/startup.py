"""
Start-up: how long a person waits for --help, and for the first word of an answer.

    python -m benchmarks.startup

`--help` of every script is bound to half a second, `chat_cli -p hi` to three, with a checkpoint of depth 8 that is made
here: random weights and a small tokenizer, in a folder of its own, since loading costs the same whatever the weights say.
The answer is cut to eight tokens, so that start-up is measured and not talk.

Each command is a process of its own. The first run of each is thrown away: it reads files from the disk, and compiles
modules where nobody has done so. PYTHONDONTWRITEBYTECODE is taken out of their environment; with it, and without
`uv sync --compile-bytecode` (as scripts/setup.sh does), Python compiles every package anew at every start.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.config import cli

ROOT = Path(__file__).resolve().parent.parent
HELP_SECONDS, CHAT_SECONDS = 0.5, 3.0


@dataclass(frozen=True)
class Config:
    """Measure how long commands take to start."""

    repeats: int = 5
    """timings of each command; the median counts"""
    depth: int = 8
    """depth of the model that chat_cli loads"""
    vocab_size: int = 8192
    """tokens in its vocabulary"""
    scripts: str = ""
    """only these, with commas between; by default all"""
    make: str = ""
    """(for the process that makes the checkpoint)"""


def scripts_with_help(only: str) -> list[str]:
    """Modules of scripts/ that read a command line."""
    names = sorted(p.stem for p in (ROOT / "scripts").glob("*.py") if "__main__" in p.read_text())
    if missing := set(filter(None, only.split(","))) - set(names):
        raise UserError(f"--scripts={only}: there is no {min(missing)}; there are {' '.join(names)}")
    return [name for name in names if not only or name in only.split(",")]


def make_checkpoint(config: Config) -> None:
    """A model of random weights and a tokenizer, where chat_cli looks for them."""
    import torch

    from nanochat import checkpoint_manager
    from nanochat.common import World, base_dir
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import Tokenizer

    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(config.vocab_size)]
    tokenizer = Tokenizer.train([" ".join(words)], config.vocab_size)
    tokenizer.save(base_dir() / "tokenizer")
    model = GPT(GPTConfig.for_depth(config.depth, vocab_size=tokenizer.vocab_size, sequence_len=1024))
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"), dtype=torch.float32)
    checkpoint_manager.save("sft", f"d{config.depth}", 1, model=model, optimizer=None, world=world, meta={})


def seconds_of(words: Sequence[str], environment: dict[str, str], repeats: int) -> list[float]:
    """Wall seconds of `repeats` runs of `python words...`, the first left out."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - began)
        if done.returncode:
            raise UserError(f"python {' '.join(words)} failed: {done.stderr.strip()[-500:]}")
    return seconds[1:]


def measure(config: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for every command, with its bound."""
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(folder)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    commands = [
        (f"{name} --help", ["-m", f"scripts.{name}", "--help"], HELP_SECONDS)
        for name in scripts_with_help(config.scripts)
    ]
    ask = ["-m", "scripts.chat_cli", "-p", "hi", "--device_type=cpu", "--max_tokens=8"]
    commands.append(("chat_cli -p hi", ask, CHAT_SECONDS))
    for shown, words, bound in commands:
        seconds = seconds_of(words, environment, config.repeats)
        median = statistics.median(seconds)
        yield {"command": shown, "seconds": median, "fastest": min(seconds), "bound": bound}


def main(config: Config) -> None:
    """Print a table and one JSON line; fail where a bound does not hold."""
    if config.make:
        make_checkpoint(config)
        return
    broken, results = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [f"--{key}={value}" for key, value in dataclasses.asdict(config).items() if key != "make"]
        words = [sys.executable, "-m", "benchmarks.startup", *flags, "--make=1"]
        subprocess.run(words, cwd=ROOT, env=os.environ | {"NANOCHAT_BASE_DIR": name}, check=True)
        print(f"{'command':34}{'seconds':>9}{'fastest':>9}{'bound':>7}")
        for row in measure(config, folder):
            results.append(row)
            print(
                f"{row['command']:34}{row['seconds']:9.2f}{row['fastest']:9.2f}{row['bound']:7.1f}",
                flush=True,
            )
            if row["seconds"] > row["bound"]:
                broken.append(row["command"])
    machine = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    print(json.dumps({"benchmark": "startup", **machine, "results": results, "broken_bounds": broken}))
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main(cli(Config))

"""
Whether a long run leaks: resident memory and open files of RL over many steps, and of the chat server over many requests.

    python -m benchmarks.soak                              # 5,000 steps and 10,000 requests: tens of minutes
    python -m benchmarks.soak --steps=500 --requests=0     # one of the two alone

Two hours in compressed form: steps and requests as small as they come, so that what is lost with each of them shows in
minutes. A leak of one kilobyte a step is 5 MB after 5,000 steps. The first 40 % are warm-up (allocator pools, caches); after it the
median of the first quarter is set against that of the last. Exit code 1 where memory has grown by more than 2 % or a file
stays open. benchmarks/survival.py runs a short one.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import processes
from nanochat.common import UserError
from nanochat.config import cli

MOST_GROWTH = 0.02
WARM_UP = 0.4


@dataclass(frozen=True)
class Config:
    """Let RL and the chat server run long, and see whether they grow."""

    steps: int = 5000
    """steps of RL; 0: none"""
    requests: int = 10_000
    """requests to the chat server; 0: none"""
    prepare: bool = False
    """only make the checkpoint that both start from, in NANOCHAT_BASE_DIR"""

    def __post_init__(self) -> None:
        for name in ("steps", "requests"):
            if (count := getattr(self, name)) and count < 50:
                raise UserError(f"--{name}={count} is too short a soak to say anything; use 50 or more, or 0")


def main(config: Config) -> None:
    """Run both, print one JSON line each."""
    if sys.platform != "linux":
        raise UserError(f"this benchmark reads /proc, which {sys.platform} has not; run it on Linux")
    if config.prepare:
        return _untrained()
    flat = True
    with tempfile.TemporaryDirectory(prefix="nanochat-soak-") as folder:
        base = Path(folder) / "base"
        untrained(base)
        for soak, count in ((soak_rl, config.steps), (soak_chat, config.requests)):
            if count:
                result = soak(base, count)
                print(json.dumps({"benchmark": "soak", **result}), flush=True)
                flat = flat and result["flat"]
    if not flat:
        raise SystemExit(1)


def untrained(base: Path) -> None:
    """A tokenizer and an SFT checkpoint of random weights in `base`: what is lost by a step does not depend on them."""
    words = ["benchmarks.soak", "--prepare"]
    base.mkdir()
    with running(words, base) as process:
        if process.wait(300):
            raise UserError(f"no checkpoint to start from:\n{(base / 'soak.log').read_text()[-2000:]}")


def _untrained() -> None:
    import torch

    from nanochat.checkpoint_manager import save
    from nanochat.common import World, base_dir
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import Tokenizer, split_pattern
    from tasks.prose import drill_document, pretraining_document

    texts = [make(number, 0) for make in (pretraining_document, drill_document) for number in range(1000)]
    tokenizer = Tokenizer.train(iter(texts), 400, pattern=split_pattern(1))
    tokenizer.save(base_dir() / "tokenizer")
    shape: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "sequence_len": 256,
        "n_embd": 64,
        "n_head": 2,
    }
    world = World(0, 0, 1, torch.device("cpu"), torch.float32)
    save("sft", "d2", 1, model=GPT(GPTConfig.for_depth(2, **shape)), meta={}, world=world)


def soak_rl(base: Path, num_steps: int) -> dict[str, Any]:
    """RL from the SFT checkpoint in `base` for `num_steps` steps, looking, saving and logging all the while."""
    words = [
        "scripts.chat_rl", "--dataset=SYNTHETIC", "--run=soak", "--save_tag=soak", "--resume=0", "--device_type=cpu",
        f"--max_steps={num_steps}", "--examples_per_step=2", "--num_samples=4", "--max_new_tokens=16",
        "--kl_every=25", "--attn_every=25", "--save_every=25", "--eval_every=50", "--eval_examples=4",
        "--eval_samples=2", f"--log_every={max(1, num_steps // 10)}",
    ]  # fmt: skip
    metrics = base / "runs" / "soak" / "rl" / "metrics.jsonl"
    samples: list[tuple[int, float, int]] = []
    began = time.monotonic()
    with running(words, base) as process:
        while process.poll() is None:
            step = _count_lines(metrics)
            if step and (not samples or step > samples[-1][0]):
                try:
                    samples.append(
                        (step, processes.resident_mib(process.pid), processes.open_files(process.pid))
                    )
                except OSError:
                    break  # it has ended since
            time.sleep(0.1)
    if process.wait() or not samples:
        raise UserError(f"the RL run of the soak failed:\n{(base / 'soak.log').read_text()[-2000:]}")
    seconds = round(time.monotonic() - began)
    return {"what": "rl", "steps": num_steps, "seconds": seconds, **growth(samples, num_steps)}


def soak_chat(base: Path, num_requests: int) -> dict[str, Any]:
    """A question of its own with every request: every other answer streamed, every tenth client gone while it comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    samples: list[tuple[int, float, int]] = []
    words = ["scripts.chat_web", "-i", "sft", "--host=127.0.0.1", f"--port={port}", "--device_type=cpu"]
    began = time.monotonic()
    with running(words, base) as process:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process, base)
        for number in range(1, num_requests + 1):
            body = {
                "messages": [{"role": "user", "content": f"What is {number} + {number % 97}?"}],
                "max_tokens": 8,
                "temperature": 0.5,
                "seed": number,
                "stream": number % 2 == 0,
            }
            _post(f"{url}/v1/chat/completions", body, stays=number % 10 != 0)
            if number % max(1, num_requests // 200) == 0:
                samples.append(
                    (number, processes.resident_mib(process.pid), processes.open_files(process.pid))
                )
    seconds = round(time.monotonic() - began)
    return {"what": "chat", "requests": num_requests, "seconds": seconds, **growth(samples, num_requests)}


@contextmanager
def running(words: list[str], base: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A script on one thread, in the base directory `base`; ended afterwards if it has not."""
    env = os.environ | {
        "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
    }  # fmt: skip
    with (base / "soak.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", *words], env=env, stdout=log, stderr=log)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def growth(samples: list[tuple[int, float, int]], count: int) -> dict[str, Any]:
    """Medians of resident MiB and open files after the warm-up, of its first quarter and its last."""
    warm = [sample for sample in samples if sample[0] > WARM_UP * count]
    quarter = max(1, len(warm) // 4)
    if len(warm) < 8:
        raise UserError(f"only {len(warm)} samples after the warm-up: too short a soak to say anything")

    def medians(place: int) -> tuple[float, float]:
        early = statistics.median(sample[place] for sample in warm[:quarter])
        return early, statistics.median(sample[place] for sample in warm[-quarter:])

    (early, late), (files_early, files_late) = medians(1), medians(2)
    share = late / early - 1
    return {
        "resident_mib": [round(early, 1), round(late, 1)],
        "resident_growth": round(share, 4),
        "open_files": [files_early, files_late],
        "flat": share <= MOST_GROWTH and files_late <= files_early,
    }


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], base: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise UserError(f"the chat server does not come up:\n{(base / 'soak.log').read_text()[-2000:]}")


def _post(url: str, body: dict[str, Any], *, stays: bool) -> None:
    """Ask, and read the answer unless the asker is one who leaves."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if stays and not reply.read():
            raise UserError(f"{url} answered nothing to {body}")


if __name__ == "__main__":
    main(cli(Config))

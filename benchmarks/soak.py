"""
Whether a long run leaks: resident memory and open files of RL over many steps, and of the chat server over many requests.

Two hours in compressed form: steps and requests as small as they come, so that what is lost with each of them shows in
minutes. A leak of one kilobyte a step is 5 MB after 5,000 steps. The first 40 % are warm-up (allocator pools, caches); after it the
median of the first quarter is set against that of the last. Part of benchmarks/survival.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import processes
from nanochat.common import UserError

MOST_GROWTH = 0.02
WARM_UP = 0.4


def untrained(base: Path) -> None:
    """A tokenizer and an SFT checkpoint of random weights in `base`: what is lost by a step does not depend on them."""
    words = ["benchmarks.soak"]
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
    return {"what": "rl", "steps": num_steps, **growth(samples, num_steps)}


def soak_chat(base: Path, num_requests: int) -> dict[str, Any]:
    """The same question over and over to scripts.chat_web; where this tree has none, `flat` is None and it says so."""
    if importlib.util.find_spec("scripts.chat_web") is None:
        return {"what": "chat", "requests": 0, "flat": None, "why": "this tree has no scripts/chat_web.py"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    samples: list[tuple[int, float, int]] = []
    words = ["scripts.chat_web", "-i", "sft", "--host=127.0.0.1", f"--port={port}", "--device_type=cpu"]
    with running(words, base) as process:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process, base)
        body = {
            "messages": [{"role": "user", "content": "What is 2 + 2?"}],
            "max_tokens": 8,
            "temperature": 0.5,
        }
        for number in range(1, num_requests + 1):
            _post(f"{url}/v1/chat/completions", body | {"seed": number})
            if number % max(1, num_requests // 200) == 0:
                samples.append(
                    (number, processes.resident_mib(process.pid), processes.open_files(process.pid))
                )
    return {"what": "chat", "requests": num_requests, **growth(samples, num_requests)}


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


def _post(url: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.read()


if __name__ == "__main__":
    _untrained()

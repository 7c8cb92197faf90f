"""
Serving speed: many clients at once against one after the other, through HTTP, and what a crowd waits for.

    python -m benchmarks.serve                                   # 16 clients against one, then the crowd for 10 s
    python -m benchmarks.serve --crowd 200 --crowd_seconds 60    # the load test
    python -m benchmarks.serve --depth 4 --n_embd 256            # a model of another size

The server runs in a process of its own, as scripts/chat_web.py runs it, with a model of random weights that never stops,
so every answer has `max_tokens` tokens. Clients stream /v1/chat/completions over sockets of their own and keep asking, a
new connection each time. One at a time: the next request is sent when the last answer is there.

First token: from sending the request to the first event with text. Between tokens: from one event with text to the next
of the same answer. A client counts a token when its event is there.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError
from nanochat.config import cli

if TYPE_CHECKING:
    from nanochat.answering import Host

QUESTION = "Pens cost 3 each. What do 4 of them cost?\nA) 7\nB) 10\nC) 12\nD) 14\nE) 43"


@dataclass(frozen=True)
class Config:
    """Measure the server."""

    clients: int = 16
    """clients at once, against one"""
    seconds: float = 8.0
    """length of each measurement of throughput"""
    crowd: int = 100
    """clients of the crowd; 0: none"""
    crowd_seconds: float = 10.0
    """how long the crowd asks"""
    max_tokens: int = 48
    """tokens of every answer"""
    max_batch: int = 32
    """answers at once in the engine"""
    depth: int = 4
    """layers of the model"""
    n_embd: int = 256
    """its width"""
    vocab_size: int = 2048
    """tokens in the vocabulary"""
    repeats: int = 3
    """measurements of one and of many, in turn; the median counts"""
    device_type: str = ""
    """cuda, mps or cpu; by default the best there is"""

    def __post_init__(self) -> None:
        if self.clients < 1 or self.crowd < 0 or self.repeats < 1:
            raise UserError("--clients and --repeats are at least 1, --crowd at least 0")


@dataclass
class Heard:
    """What the clients of one measurement saw."""

    num_tokens: int = 0
    num_answers: int = 0
    seconds: float = 0.0
    statuses: dict[int, int] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def describe(self) -> dict[str, Any]:
        answers = {
            f"{name}_p{percent}_ms": round(1000 * percentile(values, percent), 1)
            for name, values in (("first_token", self.first), ("between_tokens", self.between))
            for percent in (50, 99)
        }
        counted = {str(status): count for status, count in sorted(self.statuses.items())}
        return (
            {"answers": self.num_answers, "tokens_per_second": round(self.tokens_per_second, 1)}
            | answers
            | {"statuses": counted}
        )


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile; nan of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else float("nan")


# ---- the server -----------------------------------------------------------------------------------------------------


def make_host(config: Config) -> Host:
    """A host of random weights without stop tokens, and a tokenizer of its size."""
    import torch

    from nanochat.answering import Defaults, Host
    from nanochat.common import compute_init
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.serving import Pool, Scheduler
    from nanochat.tokenizer import Tokenizer
    from tasks.prose import pretraining_document

    world = compute_init(config.device_type)
    tokenizer = Tokenizer.train((pretraining_document(n, 0) for n in range(2000)), config.vocab_size)
    shape = GPTConfig.for_depth(
        config.depth, vocab_size=tokenizer.vocab_size, sequence_len=512, n_embd=config.n_embd, n_head=max(1, config.n_embd // 64)
    )  # fmt: skip
    model = GPT(shape, dtype=world.dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "c_proj" in name or name == "lm_head.weight":
                weight.normal_(std=weight.size(1) ** -0.5)
    model.to(world.device).requires_grad_(False)
    engine = Engine(model, tokenizer)
    engine.marks.stops, engine.marks.all = frozenset(), frozenset()  # every answer runs to max_tokens
    pool = Pool([Scheduler(engine, max_rows=config.max_batch)])
    return Host(pool, "nanochat-benchmark", defaults=Defaults(1.0, 0, 1.0, config.max_tokens))


def serve(config: Config, listening: socket.socket) -> None:
    """Run the server in this process until it is ended."""
    import uvicorn

    from nanochat.listening import server_settings
    from nanochat.web import create_app

    uvicorn.Server(server_settings(create_app(make_host(config)))).run(sockets=[listening])


# ---- the clients ----------------------------------------------------------------------------------------------------


async def ask(port: int, body: bytes, heard: Heard) -> None:
    """One request on a connection of its own."""
    began = last = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = int((await reader.readline()).split()[1])
        heard.statuses[status] = heard.statuses.get(status, 0) + 1
        first = True
        while line := await reader.readline():
            if (
                status == 200
                and line.startswith(b"data: {")
                and b'"content":"' in line
                and b'"role"' not in line
            ):
                now = time.perf_counter()
                (heard.first if first else heard.between).append(now - last)
                first, last = False, now
            if line.startswith(b"data: {") and b'"usage":{' in line:
                heard.num_tokens += json.loads(line[6:])["usage"]["completion_tokens"]
        heard.num_answers += status == 200
        if status == 429:
            await asyncio.sleep(1.0)  # as it was told
    finally:
        writer.close()
    assert time.perf_counter() >= began


async def crowd(port: int, num_clients: int, seconds: float, max_tokens: int) -> Heard:
    """So many clients that ask again and again, for so long; those that are waiting then are waited for."""
    heard = Heard()
    began = time.perf_counter()

    async def client(number: int) -> None:
        asked = 0
        while time.perf_counter() - began < seconds:
            body = {
                "messages": [{"role": "user", "content": f"{QUESTION}\n{number} {asked}"}],
                "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True},
                "seed": number * 1000 + asked, "user": str(number),
            }  # fmt: skip
            await ask(port, json.dumps(body).encode(), heard)
            asked += 1

    await asyncio.gather(*map(client, range(num_clients)))
    heard.seconds = time.perf_counter() - began
    return heard


def wait_for(port: int, seconds: float = 180.0) -> None:
    """Wait until the server answers."""
    import urllib.request

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise UserError(f"the server did not answer within {seconds:g} s; what it printed above says why")


def main(config: Config) -> None:
    """Measure, print a table and one JSON line."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)
    port = listening.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(config, listening), daemon=True)
    server.start()
    try:
        wait_for(port)
        asyncio.run(crowd(port, 2, 1.0, config.max_tokens))  # warm
        measured: dict[int, list[Heard]] = {1: [], config.clients: []}
        for _ in range(config.repeats):
            for count, rounds in measured.items():
                rounds.append(asyncio.run(crowd(port, count, config.seconds, config.max_tokens)))
        many = (
            asyncio.run(crowd(port, config.crowd, config.crowd_seconds, config.max_tokens))
            if config.crowd
            else None
        )
    finally:
        server.terminate()
        server.join(10)
    report(config, measured, many)


def report(config: Config, measured: dict[int, list[Heard]], many: Heard | None) -> None:
    middle = {
        count: sorted(rounds, key=lambda heard: heard.tokens_per_second)[len(rounds) // 2]
        for count, rounds in measured.items()
    }
    rows = [(f"{count} client{'s' * (count > 1)}", heard) for count, heard in middle.items()]
    if many:
        rows.append((f"{config.crowd} clients", many))
    print(f"{'':12} {'tokens/s':>9} {'first p50':>10} {'p99':>9} {'between p50':>12} {'p99':>9}  statuses")
    for name, heard in rows:
        first, between = (
            [percentile(values, percent) * 1000 for percent in (50, 99)]
            for values in (heard.first, heard.between)
        )
        print(
            f"{name:12} {heard.tokens_per_second:9.0f} {first[0]:7.0f} ms {first[1]:6.0f} ms "
            f"{between[0]:9.1f} ms {between[1]:6.1f} ms  {heard.statuses}"
        )
    speedup = middle[config.clients].tokens_per_second / middle[1].tokens_per_second
    print(f"{config.clients} clients get {speedup:.1f} times the tokens of one at a time")
    result: dict[str, Any] = {"benchmark": "serve", "machine": platform.processor() or platform.machine()}
    result |= {
        "depth": config.depth,
        "n_embd": config.n_embd,
        "max_batch": config.max_batch,
        "speedup": round(speedup, 2),
    }
    result |= {f"clients_{count}": heard.describe() for count, heard in middle.items()}
    if many:
        result[f"crowd_{config.crowd}"] = many.describe()
    print(json.dumps(result))


if __name__ == "__main__":
    main(cli(Config))

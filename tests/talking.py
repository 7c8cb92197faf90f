"""A model that has something to say, and a server around it: trained in seconds to answer a few questions by heart."""

from __future__ import annotations

import contextlib
import copy
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import httpx
import torch
import uvicorn

from nanochat.answering import Defaults, Exam, Host
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.guards import Access
from nanochat.listening import server_settings
from nanochat.serving import Pool, Scheduler
from nanochat.tokenizer import Tokenizer
from nanochat.web import create_app
from tests.small import tiny_tokenizer

PATIENCE = 120.0  # seconds; nothing that goes well takes them, however crowded the machine
http = SimpleNamespace(
    **{name: partial(getattr(httpx, name), timeout=PATIENCE) for name in ("get", "post", "stream")}
)
"""httpx, which by itself gives up after five seconds."""
HELLO = {
    "messages": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi! I add up. 1€ + 1€ = 2€"},
    ]
}
QUESTIONS = (
    ("Pens cost 3 each. What do 4 cost?", ("7", "10", "12", "14", "43"), "C", "One costs 3.\n4 * 3 = 12."),
    ("A train goes 60 km in 2 hours. Its speed?", ("20", "30", "58", "62", "120"), "B", "Speed is way by time.\n60 / 2 = 30."),
    ("What is 10 % of 50?", ("5", "10", "15", "40", "60"), "A", "A tenth of 50.\n50 / 10 = 5."),
)  # fmt: skip


def conversations() -> list[dict[str, Any]]:
    from tasks.problem import Problem

    return [HELLO, *(Problem(q, options, gold, why).conversation() for q, options, gold, why in QUESTIONS)]


@cache
def talking_model(steps: int = 150) -> tuple[GPT, Tokenizer]:
    """Two layers of 64, which know the conversations above by heart."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPTConfig.for_depth(
        2, vocab_size=tokenizer.vocab_size, sequence_len=256, n_embd=64, n_head=2, smear=2
    )
    model = GPT(config)
    rows = [tokenizer.render_conversation(conversation) for conversation in conversations()]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row, _ in rows])
    targets = torch.tensor(
        [
            [*(token if trained else -1 for token, trained in zip(row[1:], mask[1:], strict=True)), *[-1] * (length - len(row))]
            for row, mask in rows
        ]
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        loss = model(ids[:, :-1], targets) / (targets >= 0).sum()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, 2 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def small_talk() -> GPT:
    """One narrow layer of random weights with the same vocabulary: quick, where the words do not matter."""
    torch.manual_seed(0)
    shape = GPTConfig.for_depth(
        1, vocab_size=tiny_tokenizer().vocab_size, sequence_len=256, n_embd=32, n_head=1
    )
    return GPT(shape).eval()


def endless_model(pause: float = 0.0, gate: threading.Event | None = None) -> GPT:
    """The same model, which never draws a stop token, and takes ``pause`` seconds more for every token.

    An answer is cut at 128 tokens, which the bare model writes in a third of a second: whoever means to interrupt it
    needs the pause, or a busy machine lets the answer end first. With a ``gate`` it computes nothing until that is set.
    """
    known, tokenizer = talking_model()
    model = copy.deepcopy(known)
    stops = torch.tensor([tokenizer.special(name) for name in ("<|assistant_end|>", "<|bos|>")])
    model.lm_head.register_forward_hook(lambda _, __, raw: raw.index_fill(-1, stops, -1e4))
    if pause:
        model.transformer.h[0].register_forward_pre_hook(lambda *_: time.sleep(pause))
    if gate is not None:
        model.transformer.h[0].register_forward_pre_hook(lambda *_: gate.wait(PATIENCE) and None)
    return model


def make_host(
    *, max_rows: int = 8, max_waiting: int = 64, workers: int = 1, model: GPT | None = None
) -> Host:
    """A host of the talking model, or of another with its vocabulary."""
    from tasks.answers import parse_answer
    from tasks.asked import read_question

    known, tokenizer = talking_model()
    pool = Pool(
        [
            Scheduler(Engine(model or known, tokenizer), max_rows=max_rows, max_waiting=max_waiting)
            for _ in range(workers)
        ]
    )
    from scripts.chat_web import gallery_entry

    gallery = [gallery_entry(conversation) for conversation in conversations()[1:]]
    exam = Exam(read_question, parse_answer, gallery, "three questions")
    return Host(pool, "nanochat-test-d2", "test", 150, Defaults(0.0, 0, 1.0, 128), exam)


def wait_until(true: Callable[[], bool]) -> None:
    """Look again and again; AssertionError where it does not come to pass."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < PATIENCE, f"it did not come to pass in {PATIENCE:.0f} seconds"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(host: Host, access: Access | None = None, **settings: Any) -> Iterator[str]:
    """The app on a free port of this machine, in a thread; its address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)
    server = uvicorn.Server(
        server_settings(
            create_app(host, access), **{"log_config": None, "timeout_graceful_shutdown": 1} | settings
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=PATIENCE)
        listening.close()
        assert not thread.is_alive(), "the server did not end"

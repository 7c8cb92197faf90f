"""
Serve the model: a chat page for people, and the OpenAI API for programs.

    python -m scripts.chat_web -i rl                      # then open http://127.0.0.1:8000
    python -m scripts.chat_web -i rl -n 8                 # a worker on each of 8 GPUs
    NANOCHAT_API_KEY=... python -m scripts.chat_web -i rl --host 0.0.0.0

    from openai import OpenAI
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(...)

It listens on this machine alone unless told otherwise, and a public interface needs a key (NANOCHAT_API_KEY) or the word
--insecure. On a rented box, leave it on 127.0.0.1 and forward the port: ssh -L 8000:127.0.0.1:8000 BOX.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nanochat.common import UserError
from nanochat.config import cli, flag

if TYPE_CHECKING:
    from nanochat.answering import Exam, Host

NUM_GALLERY = 24


@dataclass(frozen=True)
class Config:
    """Serve a checkpoint."""

    source: Literal["base", "mid", "sft", "rl"] = flag("sft", "-i", help="stage of the checkpoint")
    num_gpus: int = flag(1, "-n", help="workers, one on each GPU; on a CPU there is one")
    temperature: float = flag(0.6, "-t", help="where a request says nothing; 0 is greedy")
    top_k: int = flag(
        50, "-k", help="sample among the k likeliest tokens, where a request says nothing; 0: all"
    )
    max_tokens: int = flag(256, "-m", help="longest answer on the page, where a request says nothing")
    model_tag: str = flag("", "-g", help="checkpoint folder, such as d8")
    step: int | None = flag(None, "-s", help="checkpoint step; by default the newest")
    host: str = "127.0.0.1"
    """address to listen on; anything but this machine's own needs a key"""
    port: int = flag(8000, "-p", help="0: any that is free")
    device_type: str = ""
    """cuda, mps or cpu; by default the best there is"""
    dtype: str = flag("", "-d", help="float32 or bfloat16")
    seed: int = 42
    """the gallery's order follows from it; answers have seeds of their own"""
    max_batch: int = 32
    """answers at once on each GPU; fewer where memory holds fewer"""
    max_waiting: int = 256
    """requests in line for each GPU; the next is refused with 429"""
    allow_origin: str = ""
    """other pages whose scripts may ask, such as https://example.org; with commas between"""
    insecure: bool = False
    """listen on a public interface without a key"""
    aqua_path: str | None = None
    """file or folder of AQuA, for the gallery"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 2.0:
            raise UserError(f"--temperature={self.temperature} is outside 0 to 2; use 0 for greedy")
        for name, least in (
            ("num_gpus", 1),
            ("max_tokens", 1),
            ("max_batch", 1),
            ("max_waiting", 1),
            ("top_k", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"--{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port={self.port} is no port; use 1 to 65535, or 0 for any that is free")


def main(config: Config) -> None:
    """Load the checkpoint on every device and serve until Ctrl-C."""
    import uvicorn

    from nanochat.guards import Access, check_binding
    from nanochat.listening import server_settings
    from nanochat.web import create_app

    key = os.environ.get("NANOCHAT_API_KEY", "")
    check_binding(config.host, key, insecure=config.insecure)
    origins = tuple(origin.strip() for origin in config.allow_origin.split(",") if origin.strip())
    access = Access(api_key=key, host=config.host, origins=origins)
    listening = bind(config.host, config.port)
    host = open_host(config)
    app = create_app(host, access)
    port = listening.getsockname()[1]
    name = f"[{config.host}]" if ":" in config.host else config.host
    print(f"{host.model_id}, step {host.step}: http://{name}:{port}  (API: /v1, Ctrl-C ends)", flush=True)
    print(f"key: {'needed' if key else 'none'} · nothing of a conversation is written down", flush=True)
    with contextlib.suppress(
        KeyboardInterrupt
    ):  # uvicorn has ended in good order by then, and raises it once more
        uvicorn.Server(server_settings(app)).run(sockets=[listening])


def bind(host: str, port: int) -> Any:
    """A listening socket, before minutes are spent on loading. Raises UserError where there can be none."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host.strip("[]"), port))
        listening.listen(
            1024
        )  # taken now: two servers that both reuse the address must not both believe they have it
    except OSError as error:
        listening.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; try another --port"
        ) from None
    return listening


def open_host(config: Config) -> Host:
    """The model on each device, with a scheduler each."""
    import torch

    from nanochat.answering import Defaults, Host
    from nanochat.checkpoint_manager import find, load_model
    from nanochat.common import compute_init
    from nanochat.engine import Engine
    from nanochat.serving import Pool, Scheduler

    world = compute_init(config.device_type, config.dtype, config.seed)
    there = torch.cuda.device_count() if world.device.type == "cuda" else 1
    if config.num_gpus > there:
        raise UserError(f"--num_gpus={config.num_gpus}: this machine has {there}; use at most that")
    schedulers = []
    for number in range(config.num_gpus):
        device = torch.device("cuda", number) if world.device.type == "cuda" else world.device
        model, tokenizer, meta = load_model(
            config.source, device, model_tag=config.model_tag, step=config.step, dtype=world.dtype
        )
        engine = Engine(model, tokenizer)
        schedulers.append(Scheduler(engine, max_rows=config.max_batch, max_waiting=config.max_waiting))
    tag = find(config.source, config.model_tag, config.step).folder.name
    defaults = Defaults(config.temperature, config.top_k, 1.0, config.max_tokens)
    return Host(
        Pool(schedulers),
        f"nanochat-{config.source}-{tag}",
        config.source,
        meta["step"],
        defaults,
        open_exam(config),
    )


def open_exam(config: Config) -> Exam:
    """How questions are read and marked, and some of the dev set to try; built-in ones where there is no AQuA."""
    import random

    from nanochat.answering import Exam
    from tasks.answers import parse_answer
    from tasks.asked import read_question
    from tasks.catalog import open_task
    from tasks.rows import DataUnavailable

    try:
        task = open_task("AQUA", "validation", aqua_path=config.aqua_path)
        source = "AQuA, dev set"
    except DataUnavailable as error:
        print(f"gallery: built-in problems, since AQuA is not there ({error})", flush=True)
        task, source = open_task("SYNTHETIC", "validation"), "built-in problems, held out"
    numbers = random.Random(config.seed).sample(range(len(task)), min(NUM_GALLERY, len(task)))
    return Exam(read_question, parse_answer, [gallery_entry(task[number]) for number in numbers], source)


def gallery_entry(conversation: dict[str, Any]) -> dict[str, Any]:
    """A question as the page shows it."""
    return {
        "question": conversation["question"],
        "letters": list(conversation["letters"]),
        "options": list(conversation["options"]),
        "gold": conversation["answer_letter"],
        "prompt": conversation["messages"][0]["content"],
    }


if __name__ == "__main__":
    main(cli(Config))

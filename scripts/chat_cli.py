"""
Talk to the model in a terminal, or ask it one thing from a pipe.

    python -m scripts.chat_cli -i rl
    python -m scripts.chat_cli -i sft -p "What is 12 % of 50?" > answer.txt

With -p only the answer goes to standard output, so pipes work; everything else is on standard error. In a conversation
Ctrl-C stops the answer and not the program, /clear begins anew, /quit or Ctrl-D ends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nanochat.common import UserError
from nanochat.config import cli, flag

if TYPE_CHECKING:
    from nanochat.engine import Engine
    from nanochat.tokenizer import Tokenizer

Message = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Talk to a checkpoint."""

    source: Literal["base", "mid", "sft", "rl"] = flag("sft", "-i", help="stage of the checkpoint")
    prompt: str = flag("", "-p", help="ask this, print the answer, and end")
    temperature: float = flag(0.6, "-t", help="0 is greedy")
    top_k: int = flag(50, "-k", help="sample among the k likeliest tokens; 0: all")
    max_tokens: int = flag(256, "-m", "--max_new_tokens", help="longest answer")
    model_tag: str = flag("", "-g", help="checkpoint folder, such as d8")
    step: int | None = flag(None, "-s", help="checkpoint step; by default the newest")
    device_type: str = ""
    """cuda, mps or cpu; by default the best there is"""
    dtype: str = flag("", "-d", help="float32 or bfloat16")
    seed: int = 42
    """everything random follows from it"""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(
                f"--temperature={self.temperature} is below 0; use 0 for greedy, 1 to sample as trained"
            )
        if self.max_tokens < 1:
            raise UserError(f"--max_tokens={self.max_tokens}: an answer has at least one token")


def main(config: Config) -> None:
    """Load the checkpoint and answer."""
    from contextlib import redirect_stdout

    from nanochat.checkpoint_manager import load_model
    from nanochat.common import compute_init
    from nanochat.engine import Engine

    with redirect_stdout(sys.stderr):
        world = compute_init(config.device_type, config.dtype, config.seed)
        model, tokenizer, meta = load_model(
            config.source, world=world, model_tag=config.model_tag, step=config.step
        )
    engine = Engine(model, tokenizer)
    if config.prompt:
        history: list[Message] = [{"role": "user", "content": config.prompt}]
        for text in answer(engine, tokenizer, history, config, seed=config.seed):
            print(text, end="", flush=True)
        print()
        return
    print(f"{config.source}, step {meta['step']}. /clear begins anew, Ctrl-C stops an answer, Ctrl-D ends.")
    converse(engine, tokenizer, config)


def converse(engine: Engine, tokenizer: Tokenizer, config: Config) -> None:
    """Read a line, answer it, keep both, until there are no more lines."""
    history: list[Message] = []
    for turn, line in enumerate(lines()):
        if line == "/clear":
            history.clear()
            print("(a new conversation)")
            continue
        history.append({"role": "user", "content": line})
        said = ""
        try:
            for text in answer(engine, tokenizer, history, config, seed=config.seed + turn):
                said += text
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        except UserError as error:
            print(f"error: {error}", end="")
            history.pop()
            said = ""
        print()
        if said:
            history.append({"role": "assistant", "content": said})


def lines() -> Iterator[str]:
    """What the user types, line by line, until /quit or the end of the input."""
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line in ("/quit", "/exit"):
            return
        if line:
            yield line


def answer(
    engine: Engine, tokenizer: Tokenizer, history: list[Message], config: Config, *, seed: int
) -> Iterator[str]:
    """The answer to `history` in pieces of text, each complete characters only."""
    prompt = tokenizer.render_for_completion({"messages": history})
    ids: list[int] = []
    shown = ""
    stream = engine.stream(
        prompt, max_tokens=config.max_tokens, temperature=config.temperature, top_k=config.top_k, seed=seed
    )
    stop = {tokenizer.special("<|assistant_end|>"), tokenizer.bos_id}
    for token, _ in stream:
        if token in stop:
            return
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # half a character: wait for the rest of it
            yield text[len(shown) :]
            shown = text


if __name__ == "__main__":
    main(cli(Config))

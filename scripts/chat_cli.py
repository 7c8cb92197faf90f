"""
Talk to the model in a terminal, or ask it one thing from a pipe.

    python -m scripts.chat_cli -i rl
    python -m scripts.chat_cli -i sft -p "What is 12 % of 50?" > answer.txt
    python -m scripts.chat_cli -i rl -p "2 pens cost 6. What do 3 cost? A) 7 B) 8 C) 9 D) 10 E) 12"

With -p only the answer goes to standard output, so pipes work; everything else is on standard error. -p - reads the
question from standard input. In a conversation Ctrl-C stops the answer and not the program, and /help says the rest.

A question with options is put as the model was trained to be asked, and after the answer stand the probabilities of its
letters where the answer is given. --aqua insists on options: without them it is an error.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TextIO

from nanochat.common import UserError
from nanochat.config import cli, flag

if TYPE_CHECKING:
    from nanochat.engine import Engine
    from tasks.asked import Asked

Message = dict[str, Any]

HELP = """/clear           begin anew
/system TEXT     words that stand before your first message; /system alone takes them away
/undo            forget the last question and its answer
/again           answer the last question once more
/set NAME VALUE  temperature, top_k or max_tokens; /set alone shows them
/quit            end, as Ctrl-D does
\"\"\" on a line of its own begins a message of several lines, and ends it"""
SETTABLE = ("temperature", "top_k", "max_tokens")
BAR = 30
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line end


@dataclass(frozen=True)
class Config:
    """Talk to a checkpoint."""

    source: Literal["base", "mid", "sft", "rl"] = flag("sft", "-i", help="stage of the checkpoint")
    prompt: str = flag("", "-p", help="ask this, print the answer, and end; - reads it from standard input")
    temperature: float = flag(0.6, "-t", help="0 is greedy")
    top_k: int = flag(50, "-k", help="sample among the k likeliest tokens; 0: all")
    max_tokens: int = flag(256, "-m", "--max_new_tokens", help="longest answer")
    system: str = ""
    """words that stand before the first message"""
    aqua: bool = False
    """the question has options, or it is an error"""
    model_tag: str = flag("", "-g", help="checkpoint folder, such as d8")
    step: int | None = flag(None, "-s", help="checkpoint step; by default the newest")
    device_type: str = ""
    """cuda, mps or cpu; by default the best there is"""
    dtype: str = flag("", "-d", help="float32 or bfloat16")
    seed: int = 42
    """everything random follows from it"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"--temperature={self.temperature} is below 0; use 0 for greedy, 1 to sample as trained"
            )
        if self.max_tokens < 1:
            raise UserError(f"--max_tokens={self.max_tokens}: an answer has at least one token")
        if self.top_k < 0:
            raise UserError(f"--top_k={self.top_k} is below 0; 0 keeps all tokens")


def main(config: Config) -> None:
    """Load the checkpoint and answer."""
    from contextlib import redirect_stdout

    from nanochat.checkpoint_manager import load_model
    from nanochat.common import compute_init
    from nanochat.engine import Engine

    prompt = sys.stdin.read().strip() if config.prompt == "-" else config.prompt
    if config.prompt and not prompt:
        raise UserError("-p -: standard input is empty; write the question to it")
    with redirect_stdout(sys.stderr):
        world = compute_init(config.device_type, config.dtype, config.seed)
        model, tokenizer, meta = load_model(
            config.source, world=world, model_tag=config.model_tag, step=config.step
        )
    talk = Talk(Engine(model, tokenizer), config)
    if prompt:
        ask_once(talk, prompt)
        return
    print(f"{config.source}, step {meta['step']}. Ctrl-C stops an answer, Ctrl-D ends, /help says more.")
    converse(talk)


@dataclass
class Talk:
    """A conversation with one model."""

    engine: Engine
    config: Config
    history: list[Message] = field(default_factory=list)
    """user and assistant in turn"""
    system: str = ""
    num_answers: int = 0
    asked_ids: list[int] = field(default_factory=list)
    """the last prompt"""
    said_ids: list[int] = field(default_factory=list)
    """the last answer, without its stop token"""

    def __post_init__(self) -> None:
        self.system = self.system or self.config.system

    def read(self, text: str) -> Asked | None:
        """The question with options in `text`, if it is one."""
        from tasks.asked import read_question

        asked = read_question(text)
        if asked is None and self.config.aqua:
            raise UserError("--aqua: this question has no options; write them as A) 12 B) 15 and so on")
        return asked

    def prompt(self) -> list[int]:
        """The ids of the conversation up to the answer that is due."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.engine.tokenizer.render_for_completion({"messages": [*system, *self.history]})

    def answer(self) -> Iterator[str]:
        """The next answer in pieces of text, whole characters only; the history has what was said, however it ended."""
        from nanochat.transcript import Transcript

        config, transcript, said = self.config, Transcript(self.engine.tokenizer), ""
        self.asked_ids, self.said_ids = self.prompt(), []
        stream = self.engine.stream(
            self.asked_ids,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=config.seed + self.num_answers,
        )
        self.num_answers += 1
        try:
            for token, _ in stream:
                if token not in self.engine.marks.stops:
                    self.said_ids.append(token)
                piece = transcript.take(token)
                said += piece.text
                if piece.text:
                    yield piece.text
            rest = transcript.close().text
            said += rest
            yield rest
        finally:
            self.history.append({"role": "assistant", "content": said})

    def letters(self, asked: Asked) -> dict[str, float]:
        """Probabilities of the letters where the last answer gives its own, as RL's telemetry reads them."""
        import torch

        from nanochat.letters import answer_position, letter_logits

        tokenizer = self.engine.tokenizer
        sequence = [*self.asked_ids, *answer_position(tokenizer, self.said_ids)[0]]
        logits = letter_logits(self.engine.model, [sequence], [tokenizer.letter_ids(asked.letters)])
        return dict(zip(asked.letters, torch.softmax(logits[0], -1).tolist(), strict=True))


def ask_once(talk: Talk, text: str) -> None:
    """The answer to one question on standard output, and the bars, if it has options, beside it."""
    asked = talk.read(text)
    talk.history.append({"role": "user", "content": asked.prompt if asked else text})
    for piece in talk.answer():
        print(harmless(piece), end="", flush=True)
    print(flush=True)
    if asked:
        print_letters(talk, asked, sys.stderr)


def converse(talk: Talk) -> None:
    """Read a line, obey or answer it, until there are no more lines."""
    for line in lines():
        text = command(talk, line) if line.startswith("/") else line
        if text:
            reply(talk, text)


def reply(talk: Talk, text: str) -> None:
    """Answer `text`; when that cannot be done, the conversation is as it was."""
    kept = list(talk.history)
    try:
        asked = talk.read(text)
        talk.history.append({"role": "user", "content": asked.prompt if asked else text})
        if asked:
            print(dim(f"(read as a question with the options {' '.join(asked.letters)})"))
        stopped = False
        try:
            for piece in talk.answer():
                print(harmless(piece), end="", flush=True)
        except KeyboardInterrupt:
            stopped = True
            print(dim(" (stopped)"), end="")
        print()
        if not talk.history[-1]["content"]:
            talk.history[:] = kept
        elif asked and not stopped:
            print_letters(talk, asked, sys.stdout)
    except UserError as error:
        talk.history[:] = kept
        print(f"error: {error}")


def command(talk: Talk, line: str) -> str | None:
    """Obey a line that begins with a slash; the text to answer, where it asks for an answer."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/clear", "/new"):
        talk.history.clear()
        print("(a new conversation)")
    elif name == "/system":
        talk.system = rest
        print("(it stands before your first message)" if rest else "(no system words)")
    elif name in ("/undo", "/again"):
        return go_back(talk, again=name == "/again")
    elif name == "/set":
        change(talk, rest)
    elif name == "/help":
        print(HELP)
    else:
        print(f"error: {name} is not a command; /help lists them")
    return None


def go_back(talk: Talk, *, again: bool) -> str | None:
    """Forget the last question and its answer; with `again`, it is asked once more."""
    if not talk.history:
        print("(nothing has been asked)")
        return None
    last = talk.history[-2]["content"]
    del talk.history[-2:]
    if not again:
        print("(forgotten)")
    return last if again else None


def change(talk: Talk, words: str) -> None:
    """`/set temperature 0.8`, or show what is set."""
    name, _, value = words.partition(" ")
    if not words:
        print(" · ".join(f"{name} {getattr(talk.config, name)}" for name in SETTABLE))
        return
    if name not in SETTABLE:
        print(f"error: {name} cannot be set; {', '.join(SETTABLE)} can")
        return
    try:
        number: Any = float(value) if name == "temperature" else int(value)
        talk.config = dataclasses.replace(talk.config, **{name: number})
    except UserError as error:
        print(f"error: {error}")
    except ValueError:
        print(f"error: {value!r} is not a number; write for example /set {name} {getattr(talk.config, name)}")


def lines() -> Iterator[str]:
    """What the user types, message by message, until /quit or the end of the input."""
    while True:
        try:
            line = input("\n> ").strip()
            if line == '"""':
                line = "\n".join(iter(lambda: input("… "), '"""')).strip()
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


def print_letters(talk: Talk, asked: Asked, out: TextIO) -> None:
    """The letter that the answer gives, and a bar for each option."""
    from tasks.answers import parse_answer

    shares = talk.letters(asked)
    said = parse_answer(talk.history[-1]["content"], asked.letters)
    first, second = sorted(shares.values(), reverse=True)[:2]
    width = min(24, max(map(len, asked.options)))
    print(f"\n{f'answer {said}' if said else 'no readable answer line'}; letters there:", file=out)
    for letter, option in zip(asked.letters, asked.options, strict=True):
        share = shares[letter]
        mark = ">" if letter == said else " "
        shown = option if len(option) <= width else option[: width - 1] + "…"
        print(f"{mark} {letter}  {shown:{width}}  {bar(share):{BAR}} {share:6.1%}", file=out)
    print(f"  margin over the runner-up: {math.log(first / max(second, 1e-30)):.2f} in logits", file=out)


def bar(share: float) -> str:
    """A bar of eighths of a character, `BAR` long for a share of 1."""
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def harmless(text: str) -> str:
    """What a model wrote, without the codes by which text commands a terminal; a pipe gets every character."""
    return CONTROL.sub("\ufffd", text) if sys.stdout.isatty() else text


def dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text


if __name__ == "__main__":
    main(cli(Config))

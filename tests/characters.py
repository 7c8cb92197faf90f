"""What the tests of the engine share: a tokenizer of characters, models of random weights, and one that says what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat.engine import Completion, Engine
from nanochat.gpt import GPT, Attend, GPTConfig

WORDS = ["bos", "user_start", "user_end", "assistant_start", "assistant_end"]
WORDS += ["python_start", "python_end", "output_start", "output_end"]
CHARACTERS = "0123456789+-*/(). abcdef"
VOCAB = len(WORDS) + len(CHARACTERS)


class Characters:
    """A tokenizer of single characters; the specials come first."""

    bos_id = 0

    def special(self, name: str) -> int:
        return WORDS.index(name.strip("<|>"))

    def encode(self, text: str) -> list[int]:
        return [len(WORDS) + CHARACTERS.index(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(CHARACTERS[id - len(WORDS)] if id >= len(WORDS) else "?" for id in ids)


BOS, USER, USER_END, ANSWER, STOP, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(len(WORDS))

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"n_kv_head": 2},
    "one key head": {"n_kv_head": 1},
    "windows": {"window_pattern": "SSL", "window_len": 5},
    "previous tokens": {"smear": 3},
    "everything": {"n_kv_head": 2, "window_pattern": "SL", "window_len": 7, "smear": 2, "qk_scale": 1.2},
}


def make_model(*, dtype: torch.dtype = torch.float32, seed: int = 0, **shape: Any) -> GPT:
    """A small model of random weights: nothing in it is zero, and it stops now and then."""
    torch.manual_seed(seed)
    values = {"n_head": 4, "n_embd": 32, "sequence_len": 96} | shape
    model = GPT(GPTConfig.for_depth(3, vocab_size=VOCAB, **values), dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "c_proj" in name or name == "lm_head.weight":
                weight.normal_(std=0.3)
    return model


def make_engine(model: GPT | None = None, **settings: Any) -> Engine:
    return Engine(model or make_model(), Characters(), **settings)  # type: ignore[arg-type]


def make_prompts(count: int, seed: int = 0, shortest: int = 1, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(len(WORDS), VOCAB, (length,), generator=generator).tolist() for length in lengths]


def ids_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids for completion in group] for group in groups]


def teacher_forced(model: GPT, prompt: Sequence[int], completion: Completion, temperature: float) -> Tensor:
    """The log-probabilities that training computes for a completion: one plain forward of the whole row."""
    row = torch.tensor([[*prompt, *completion.ids]])
    states = model.hidden(row[:, :-1])[0, len(prompt) - 1 :]
    return model.token_logprobs(states, torch.tensor(completion.ids), temperature=temperature)


class Script(GPT):
    """A model that says `script`, whatever it is told: state and head map position p to script[p]."""

    script: list[int]

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        context: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        if positions is None:
            positions = torch.arange(ids.size(1)).expand_as(ids)
        return torch.nn.functional.one_hot(torch.tensor(self.script)[positions], VOCAB).float()


def script_model(text: str | Sequence[int], prompt: int = 1, length: int = 96) -> Script:
    """Says `text`, then stops, after a prompt of `prompt` tokens."""
    ids = Characters().encode(text) if isinstance(text, str) else list(text)
    model = Script(
        GPTConfig.for_depth(1, vocab_size=VOCAB, sequence_len=length, n_embd=VOCAB + VOCAB % 2, n_head=1)
    )
    model.script = ([0] * (prompt - 1) + ids + [STOP] * (length + 64))[: length + 64]
    model.lm_head.weight = torch.nn.Parameter(torch.eye(VOCAB) * 60)
    return model


CHAT = [BOS, USER, 12, USER_END, ANSWER]


def ask(script: Sequence[int], prompt: Sequence[int] = CHAT, check_every: int = 1, **how: Any) -> Completion:
    model = script_model(script, len(prompt))
    values: dict[str, Any] = {"max_tokens": 60, "temperature": 0.0, "seeds": [0]} | how
    [[completion]] = make_engine(model, check_every=check_every).generate([prompt], **values)
    return completion


def call(expression: str, after: int = 0, rest: str = "a") -> list[int]:
    """A script that calls the tool; `after` places are left for what the tool says."""
    encode = Characters().encode
    return [*encode("ab"), PYTHON, *encode(expression), PYTHON_END, *[12] * after, *encode(rest)]

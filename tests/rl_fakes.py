"""Stand-ins for the tests of reinforcement learning: a byte tokenizer with letter tokens, episodes, five-option tasks."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.engine import Completion
from nanochat.gpt import GPT, GPTConfig
from nanochat.policy_gradient import Objective, policy_gradient_loss
from nanochat.rl import Episode, Group, with_advantages
from nanochat.shared_prefix import RLBatch

SPECIALS = (
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
)  # fmt: skip


class ByteTokenizer:
    """Bytes, some longer words (" A" to " E" among them), and the nine specials."""

    def __init__(self, words: Sequence[str] = (), *, alphabet: str | None = None) -> None:
        """`alphabet`: the only characters there are, for a vocabulary that a toy can learn."""
        single = [bytes([i]) for i in range(256)] if alphabet is None else [c.encode() for c in alphabet]
        longer = [f" {letter}".encode() for letter in "ABCDE"] + [word.encode() for word in words]
        self.pieces = single + longer
        self.bos_id = len(self.pieces)
        self.vocab_size = self.bos_id + len(SPECIALS)
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        self._split = re.compile(
            b"|".join(re.escape(p) for p in sorted(self.pieces, key=len, reverse=True)), re.DOTALL
        )

    def special(self, name: str) -> int:
        return self.bos_id + SPECIALS.index(name)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [self.bos_id] * bos + [self._ids[piece] for piece in self._split.findall(text.encode())]

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False) -> list[list[int]]:
        return [self.encode(text, bos=bos) for text in texts]

    def token_bytes_of(self, token: int) -> bytes:
        return self.pieces[token] if token < self.bos_id else SPECIALS[token - self.bos_id].encode()

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes_of(i) for i in ids).decode(errors="replace")

    def letter_ids(self, letters: Sequence[str]) -> list[int]:
        return [self._ids[f" {letter}".encode()] for letter in letters]

    def render_for_completion(self, conversation: dict[str, Any]) -> list[int]:
        (message,) = [m for m in conversation["messages"] if m["role"] == "user"]
        start, end, answer = map(self.special, ("<|user_start|>", "<|user_end|>", "<|assistant_start|>"))
        return [self.bos_id, start, *self.encode(message["content"]), end, answer]


@dataclasses.dataclass(frozen=True)
class Reward:
    correct: float = 0.0
    format: float = 0.1
    wrong: float = 0.0

    @property
    def total(self) -> float:
        return self.correct + self.format + self.wrong


@dataclasses.dataclass(frozen=True)
class Problem:
    """Five options in an order; the question names the right one."""

    options: tuple[str, ...]
    right: str

    def rotations(self) -> list[Problem]:
        return [Problem(self.options[turn:] + self.options[:turn], self.right) for turn in range(5)]

    def conversation(self) -> dict[str, Any]:
        lines = [f"- {option}={letter}" for option, letter in zip(self.options, "ABCDE", strict=True)]
        return {
            "messages": [{"role": "user", "content": "\n".join([f"which is {self.right}?", *lines])}],
            "letters": list("ABCDE"),
            "answer_letter": "ABCDE"[self.options.index(self.right)],
            "options": list(self.options),
        }


class Choices:
    """A task of `size` such problems."""

    name, baseline = "CHOICES", 0.2

    def __init__(self, size: int, seed: int = 0) -> None:
        draw = random.Random(seed)
        shuffled = [tuple(draw.sample("vwxyz", 5)) for _ in range(size)]
        self.problems = [Problem(options, draw.choice(options)) for options in shuffled]

    def __len__(self) -> int:
        return len(self.problems)

    def problem(self, index: int) -> Problem:
        return self.problems[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.problems[index].conversation()

    def answer(self, conversation: dict[str, Any], text: str) -> str | None:
        found = re.search(r"Answer: ([A-E])$", text)
        return found[1] if found else None

    def reward(self, conversation: dict[str, Any], text: str, *, format_reward: float = 0.1) -> Reward:
        letter = self.answer(conversation, text)
        return Reward(float(letter == conversation["answer_letter"]), format_reward if letter else 0.0)


class ScriptedEngine:
    """An engine that says what it is told: `say(conversation's prompt text, sample) -> completion text`."""

    def __init__(self, tokenizer: ByteTokenizer, say: Any, *, truncated: bool = False) -> None:
        self.tokenizer, self.say, self.truncated = tokenizer, say, truncated

    def generate(
        self, prompts: Sequence[Sequence[int]], *, num_samples: int, seeds: Sequence[int], **settings: Any
    ) -> list[list[Completion]]:
        if len(seeds) != len(prompts):
            raise UserError("one seed per prompt")
        return [
            [
                self._completion(self.say(self.tokenizer.decode(prompt), sample))
                for sample in range(num_samples)
            ]
            for prompt in prompts
        ]

    def _completion(self, text: str) -> Completion:
        ids = self.tokenizer.encode(text)
        if not self.truncated:
            ids.append(self.tokenizer.special("<|assistant_end|>"))
        return Completion(ids, [-0.5] * len(ids), [1] * len(ids), self.truncated)


def episode(
    question: int,
    sample: int,
    prompt: Sequence[int],
    ids: Sequence[int],
    *,
    correct: float = 0.0,
    advantage: float = 0.0,
    mask: Sequence[int] | None = None,
    truncated: bool = False,
    logprobs: Sequence[float] | None = None,
) -> Episode:
    """An episode of plain token ids."""
    completion = Completion(
        list(ids), list(logprobs or [-1.0] * len(ids)), list(mask or [1] * len(ids)), truncated
    )
    reward = Reward(correct)
    conversation = {"messages": [{"role": "user", "content": f"question {question}"}], "answer_letter": "A"}
    return Episode(
        question, sample, conversation, tuple(prompt), completion, "", "A", "A", reward, reward, advantage
    )


def written(
    tokenizer: ByteTokenizer, task: Choices, index: int, text: str, *, truncated: bool = False
) -> Episode:
    """The episode in which the model wrote `text`."""
    conversation = task[index]
    ids = tokenizer.encode(text) + ([] if truncated else [tokenizer.special("<|assistant_end|>")])
    completion = Completion(ids, [-1.0] * len(ids), [1] * len(ids), truncated)
    letter, reward = task.answer(conversation, text), task.reward(conversation, text)
    prompt = tuple(tokenizer.render_for_completion(conversation))
    return Episode(
        index,
        0,
        conversation,
        prompt,
        completion,
        text,
        letter,
        conversation["answer_letter"],
        reward,
        reward,
    )


def random_groups(
    seed: int = 0, *, num_groups: int = 3, size: int = 4, vocab: int = 31, shortest: int = 1
) -> list[Group]:
    """Groups with prompts of different lengths and ragged completions, single tokens among them."""
    draw = random.Random(seed)
    groups = []
    for question in range(num_groups):
        prompt = [draw.randrange(vocab) for _ in range(draw.randint(1, 9))]
        group = []
        for sample in range(size):
            length = shortest if sample == 0 else draw.randint(shortest, 12)
            ids = [draw.randrange(vocab) for _ in range(length)]
            mask = [int(draw.random() < 0.8) for _ in range(length - 1)] + [1]
            group.append(episode(question, sample, prompt, ids, correct=float(sample % 2), mask=mask))
        groups.append(group)
    return with_advantages(groups)


def small_model(
    *,
    vocab_size: int = 31,
    smear: int = 2,
    window_pattern: str = "L",
    kv_heads: int = 2,
    seed: int = 0,
    noise: float = 0.1,
) -> GPT:
    """Three layers of 32, moved away from the zero projections of the start so that every path carries signal."""
    torch.manual_seed(seed)
    config = GPTConfig.for_depth(
        3, vocab_size=vocab_size, sequence_len=512, n_embd=32, n_head=4, n_kv_head=kv_heads,
        smear=smear, window_pattern=window_pattern, window_len=5,
    )  # fmt: skip
    model = GPT(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * noise)
    return model


def loss_and_gradient(
    model: GPT,
    batches: Sequence[RLBatch],
    objective: Objective,
    normalizer: float,
) -> tuple[float, Tensor]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = policy_gradient_loss(model, batch, objective=objective) / normalizer
        loss.backward()
        total += loss.item()
    return total, torch.cat(
        [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    )


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()

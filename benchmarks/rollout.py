"""
Rollout speed: the engine against generating one question at a time, eight rows a call.

    python -m benchmarks.rollout                          # 16 questions x 16 samples x 64 tokens, depth 4 and 8
    python -m benchmarks.rollout --depths 4 --repeats 3 --questions 4
    OMP_NUM_THREADS=1 python -m benchmarks.rollout

Both sides have the same weights, prompts, dtype and threads and take turns; the table shows medians of tokens per second. The
reference, whose speed is that of a question, answers a quarter of them in a turn. It is what a plain loop does (nanochat's
does): per call it prefills one prompt, copies its cache to 8 rows, draws with torch.multinomial, looks at every token on
the host, and goes on to the last token whether or not rows have ended.

MBU is the share of the device's memory bandwidth (measured by copying) that reading every matrix once a step, and every
key and value once a question or row, would take at the engine's speed; small batches on a GPU are bound by it.

`fixed` rows run to the last token. `ending` rows draw a stop token with a chance of 2 % at every token, which makes
them 36 tokens long on average; only tokens up to the stop count. Greedy output of both is compared before anything is timed.

Weights are random (speed does not depend on them) and token ids are hashed pieces of the questions: lengths are real.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import World, compute_init
from nanochat.config import cli, flag
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig, causal_attend
from nanochat.kv_cache import numbers_per_token
from tasks.aqua import AQUA
from tasks.rows import DataUnavailable
from tasks.synthetic import Synthetic

SPECIALS = ["bos", "user_start", "user_end", "assistant_start", "assistant_end"]
SPECIALS += ["python_start", "python_end", "output_start", "output_end"]
STOP_CHANCE = 0.02


@dataclass(frozen=True)
class Config:
    """Compare the engine's rollouts with a plain loop's."""

    depths: str = "4,8"
    """depths of the models, with commas"""
    questions: int = 16
    """prompts"""
    samples: int = flag(16, "--group_size", help="completions of each prompt")
    max_tokens: int = 64
    """tokens of a completion"""
    rows_per_call: int = 8
    """rows that the reference generates at once"""
    reference_stride: int = 4
    """the reference answers every so many-th question in a turn, and others in the next"""
    repeats: int = 5
    """timings of each side; the median counts"""
    compiled: bool = False
    """compile the engine's step, as scripts.chat_rl does on a GPU"""
    vocab_size: int = 8192
    """tokens in the vocabulary"""
    device_type: str = ""
    """cuda, mps or cpu; by default the best there is"""
    dtype: str = ""
    """float32 or bfloat16; by default bfloat16 where the GPU has it"""
    seed: int = 42
    """everything random follows from it"""


class HashedPieces:
    """A tokenizer's length without its training: one id per word, number of two digits, or sign."""

    def __init__(self, vocab_size: int) -> None:
        self.first = vocab_size - len(SPECIALS)
        self.bos_id = self.first

    def special(self, name: str) -> int:
        return self.first + SPECIALS.index(name.strip("<|>"))

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(r" ?[A-Za-z]+|\d{1,2}|\s+|[^\sA-Za-z\d]", text)
        return [zlib.crc32(piece.encode()) % self.first for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def prompt(self, question: str) -> list[int]:
        open_, close, answer = (self.special(name) for name in ("user_start", "user_end", "assistant_start"))
        return [self.bos_id, open_, *self.encode(question), close, answer]


def read_questions(count: int) -> tuple[list[str], str]:
    """What the user says in the first questions of AQuA's validation split, or of the synthetic set."""
    try:
        task: AQUA | Synthetic = AQUA("validation")
    except DataUnavailable:
        task = Synthetic("validation")
    return [str(task[index]["messages"][0]["content"]) for index in range(count)], task.source


def make_model(depth: int, config: Config, prompts: Sequence[Sequence[int]], world: World) -> GPT:
    """A model of random weights whose states have a common direction, along which `set_stop_chance` puts stop tokens."""
    torch.manual_seed(config.seed)
    length = max(map(len, prompts)) + config.max_tokens
    shape = GPTConfig.for_depth(depth, vocab_size=config.vocab_size, sequence_len=length)
    model = GPT(shape, dtype=world.dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "c_proj" in name or name == "lm_head.weight":
                weight.normal_(std=weight.size(1) ** -0.5)
        model.embeddings.add_(2.0)
    return model.to(world.device).requires_grad_(False)


def set_stop_chance(
    model: GPT, tokenizer: HashedPieces, prompts: Sequence[Sequence[int]], chance: float
) -> None:
    """Make the mean probability of <|assistant_end|> `chance`, and that of the other special tokens nothing."""
    weight = model.lm_head.weight
    weight[tokenizer.first :] = -100.0 / weight.size(1)
    if not chance:
        return
    states = torch.cat([model.hidden(torch.tensor([p], device=model.device))[0] for p in prompts[:4]])
    low, high = -100.0, 100.0
    for _ in range(30):
        weight[tokenizer.special("assistant_end")] = (low + high) / 2 / weight.size(1)
        mean = model.logits(states).softmax(-1)[:, tokenizer.special("assistant_end")].mean().item()
        low, high = ((low + high) / 2, high) if mean < chance else (low, (low + high) / 2)


# --- the reference -----------------------------------------------------------------------------------------------


class PlainCache:
    """Keys and values of one call; a plain static cache, `attend` for gpt.py."""

    def __init__(self, model: GPT, rows: int, length: int) -> None:
        config = model.config
        shape = (2, config.n_layer, rows, config.n_kv_head, length, config.head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=model.compute_dtype, device=model.device)
        self.config, self.length = config, 0

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.size(1)
        self.keys[layer, :, :, :length] = k.transpose(1, 2)  # one prompt, copied to every row
        self.values[layer, :, :, :length] = v.transpose(1, 2)
        return causal_attend(self.config)(layer, q, k, v)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[layer, :, :, self.length] = k.squeeze(1)
        self.values[layer, :, :, self.length] = v.squeeze(1)
        end = self.length + 1
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        grouped = q.size(2) != k.size(2)
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=grouped).transpose(
            1, 2
        )


@torch.inference_mode()
def plain_call(
    model: GPT, prompt: Sequence[int], rows: int, max_tokens: int, temperature: float
) -> list[list[int]]:
    """`rows` samples of one prompt, every one `max_tokens` long."""
    cache = PlainCache(model, rows, len(prompt) + max_tokens)
    hidden = model.hidden(torch.tensor([prompt], device=model.device), attend=cache.prefill)
    logits = model.logits(hidden)[:, -1].expand(rows, -1)
    cache.length = len(prompt)
    completions: list[list[int]] = [[] for _ in range(rows)]
    for count in range(1, max_tokens + 1):
        if temperature:
            tokens = torch.multinomial((logits / temperature).softmax(-1), num_samples=1)
        else:
            tokens = logits.argmax(-1, keepdim=True)
        for completion, token in zip(completions, tokens[:, 0].tolist(), strict=True):
            completion.append(token)
        if count < max_tokens:
            positions = torch.full_like(tokens, cache.length)
            logits = model.logits(model.hidden(tokens, positions=positions, attend=cache.decode)[:, -1])
            cache.length += 1
    return completions


def plain_generate(
    model: GPT, prompts: Sequence[Sequence[int]], num_samples: int, config: Config, temperature: float
) -> list[list[list[int]]]:
    """One question at a time, `rows_per_call` rows a call."""
    groups = []
    for prompt in prompts:
        sizes = [
            min(config.rows_per_call, num_samples - start)
            for start in range(0, num_samples, config.rows_per_call)
        ]
        calls = [plain_call(model, prompt, size, config.max_tokens, temperature) for size in sizes]
        groups.append([completion for call in calls for completion in call])
    return groups


# --- measuring ---------------------------------------------------------------------------------------------------


def useful(completion: Sequence[int], stop: int) -> int:
    """Tokens up to the stop token, itself included."""
    return completion.index(stop) + 1 if stop in completion else len(completion)


def timed(generate: Callable[[], list[list[list[int]]]], stop: int) -> float:
    """Useful tokens per second."""
    synchronize()
    began = time.perf_counter()
    groups = generate()
    seconds = time.perf_counter() - began
    return sum(useful(completion, stop) for group in groups for completion in group) / seconds


def compare(
    model: GPT, tokenizer: HashedPieces, prompts: Sequence[Sequence[int]], config: Config
) -> dict[str, float]:
    """Median tokens per second of both sides, in turns, and the median of the turns' ratios."""
    engine = Engine(model, tokenizer, compiled=config.compiled)  # type: ignore[arg-type]
    seeds = range(config.seed, config.seed + len(prompts))

    def fast() -> list[list[list[int]]]:
        groups = engine.generate(
            prompts, num_samples=config.samples, max_tokens=config.max_tokens, seeds=seeds
        )
        return [[completion.ids for completion in group] for group in groups]

    def plain(turn: int) -> list[list[list[int]]]:
        share = prompts[turn % config.reference_stride :: config.reference_stride] or prompts
        return plain_generate(model, share, config.samples, config, 1.0)

    stop = tokenizer.special("assistant_end")
    fast()  # the cache is allocated, kernels are loaded
    turns = [(timed(fast, stop), timed(partial(plain, turn), stop)) for turn in range(config.repeats)]
    ours, theirs = zip(*turns, strict=True)
    ratio = statistics.median(a / b for a, b in turns)
    return {"engine": statistics.median(ours), "reference": statistics.median(theirs), "ratio": ratio}


def same_greedy(
    model: GPT, tokenizer: HashedPieces, prompts: Sequence[Sequence[int]], config: Config
) -> float:
    """The share of greedy completions that are the same on both sides."""
    engine, stop = Engine(model, tokenizer), tokenizer.special("assistant_end")  # type: ignore[arg-type]
    groups = engine.generate(
        prompts, max_tokens=config.max_tokens, temperature=0.0, seeds=range(len(prompts))
    )
    plain = plain_generate(model, prompts, 1, config, 0.0)
    same = [
        ours[0].ids == theirs[0][: useful(theirs[0], stop)]
        for ours, theirs in zip(groups, plain, strict=True)
    ]
    return sum(same) / len(same)


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes; the best of five."""
    source = torch.ones(2**26 if device.type == "cuda" else 2**24, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(5):
        synchronize()
        began = time.perf_counter()
        target.copy_(source)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(seconds)


def memory_share(model: GPT, prompts: Sequence[Sequence[int]], config: Config, speed: float) -> float:
    """MBU of generating rows of fixed length at `speed` tokens per second."""
    itemsize = torch.empty(0, dtype=model.compute_dtype).element_size()
    matrices = (model.num_params() - model.embeddings.numel()) * itemsize
    rows = len(prompts) * config.samples
    places = sum(map(len, prompts)) + rows * config.max_tokens / 2  # read in a step, on average
    step = matrices + places * numbers_per_token(model.config) * itemsize
    return step * speed / rows / bandwidth(model.device)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(config: Config) -> None:
    """Measure every depth with rows of fixed length and with rows that end early."""
    world = compute_init(config.device_type, config.dtype, config.seed)
    tokenizer = HashedPieces(config.vocab_size)
    questions, source = read_questions(config.questions)
    prompts = [tokenizer.prompt(question) for question in questions]
    lengths = sorted(map(len, prompts))
    say_what_is_skipped(world)
    print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens from {source}")
    print(
        f"{'depth':>5} {'rows':>7} {'engine tok/s':>13} {'reference tok/s':>16} {'ratio':>6} {'same greedy':>12} {'MBU':>6}"
    )
    results = []
    for depth in map(int, config.depths.split(",")):
        model = make_model(depth, config, prompts, world)
        for rows, chance in (("fixed", 0.0), ("ending", STOP_CHANCE)):
            with torch.inference_mode():
                set_stop_chance(model, tokenizer, prompts, chance)
            same = same_greedy(model, tokenizer, prompts, config)
            speed = compare(model, tokenizer, prompts, config)
            mbu = memory_share(model, prompts, config, speed["engine"]) if rows == "fixed" else None
            print(
                f"{depth:>5} {rows:>7} {speed['engine']:>13,.0f} {speed['reference']:>16,.0f} "
                f"{speed['ratio']:>6.2f} {same:>12.0%} {'' if mbu is None else f'{mbu:.1%}':>6}",
                flush=True,
            )
            results.append({"depth": depth, "rows": rows, "same_greedy": same, "mbu": mbu, **speed})
    print(
        json.dumps(
            {"benchmark": "rollout", **dataclasses.asdict(config), **describe(world), "results": results}
        )
    )


def say_what_is_skipped(world: World) -> None:
    """No figure of a GPU is made up where there is none."""
    if world.device.type != "cuda":
        why = "torch sees no CUDA device" if not torch.cuda.is_available() else "--device_type says otherwise"
        print(f"GPU columns skipped: {why}")


def describe(world: World) -> dict[str, object]:
    """The machine, for whoever reads the JSON line."""
    cuda = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device)
        if cuda
        else platform.processor() or platform.machine(),
        "dtype": str(world.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main(cli(Config))

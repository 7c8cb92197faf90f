"""Training speed: our step against the plain eager step of the same model.

    python -m benchmarks.train                                # depth 4 and 8, batch 4 x 256, vocabulary 8192
    python -m benchmarks.train --compiled --depths 4,8        # a third column: torch.compile (a minute a depth)
    python -m benchmarks.train --device_type cuda --compiled --depths 8,12,20 --batch_size 32 --sequence_len 2048 \
        --vocab_size 65536

The plain step is what one writes first: all logits at once, torch's cross entropy, torch's AdamW, Muon one matrix at a
time. Same weights, same rule, same dtype, same threads; the sides take turns and the medians count. The losses
of both are compared first: a faster step that learns something else would win nothing.

MFU is the model's arithmetic (PaLM's count) over what the device could do: the data sheet's number where we know it,
on a CPU the fastest product of two 1024 x 1024 matrices seen just before. Step memory is what a step needs at its peak beyond what was
held before it: by the process (Linux), or by the allocator (GPU).
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.rollout import say_what_is_skipped
from nanochat.common import World, compute_init
from nanochat.config import cli
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import make_optimizer
from nanochat.train import compile_model, next_token_loss, optimizer_step, peak_flops
from nanochat.updates import POLAR_EXPRESS, POLAR_MARGIN


@dataclass(frozen=True)
class Config:
    """Compare our training step with the plain eager one."""

    depths: str = "4,8"
    """depths of the models, with commas"""
    batch_size: int = 4
    """rows of a step"""
    sequence_len: int = 256
    """tokens of a row"""
    vocab_size: int = 8192
    """tokens in the vocabulary"""
    repeats: int = 5
    """timed steps of each side; the median counts"""
    compiled: bool = False
    """also measure our step under torch.compile"""
    device_type: str = ""
    """cuda, mps or cpu; by default the best there is"""
    dtype: str = ""
    """float32 or bfloat16; by default bfloat16 where the GPU has it"""
    seed: int = 42
    """everything random follows from it"""


def make_model(depth: int, config: Config, world: World) -> GPT:
    torch.manual_seed(config.seed)
    shape = GPTConfig.for_depth(depth, vocab_size=config.vocab_size, sequence_len=config.sequence_len)
    return GPT(shape, dtype=world.dtype).to(world.device)


def our_side(
    depth: int, config: Config, batch: Batch, world: World, *, compiled: bool
) -> Callable[[], float]:
    """A function that makes one step and returns its loss."""
    model = make_model(depth, config, world)
    if compiled:
        compile_model(model)
    optimizer = make_optimizer(
        model, matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, world=world, fuse=compiled
    )

    def step() -> float:
        count = float(batch.num_targets)
        result = optimizer_step(
            model, optimizer, [batch], next_token_loss, normalizer=count, lr_scale=1.0, world=world
        )
        return result.loss

    return step


def plain_polar(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Polar Express as its paper writes it."""
    x = matrix.to(dtype)
    x = x / (x.norm() * POLAR_MARGIN + 1e-12)
    x = x.T if matrix.size(0) > matrix.size(1) else x
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if matrix.size(0) > matrix.size(1) else x).to(matrix.dtype)


def plain_side(depth: int, config: Config, batch: Batch, world: World) -> Callable[[], float]:
    """The same step written out the first way that comes to mind."""
    model = make_model(depth, config, world)
    matrices = [weight for name, weight in model.named_parameters() if ".h." in name]
    momenta = [torch.zeros_like(weight) for weight in matrices]
    width_scale = (model.config.n_embd / 768) ** -0.5
    adamw = torch.optim.AdamW(
        [
            {"params": [model.embeddings], "lr": 0.2 * width_scale},
            {"params": [model.lm_head.weight], "lr": 0.004 * width_scale},
        ],
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=0.0,
    )
    dtype = world.dtype if world.device.type == "cuda" else torch.float32
    count = 0

    def step() -> float:
        nonlocal count
        logits = model.logits(model.hidden(batch.inputs))
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-1)
        loss.backward()
        keep = 0.85 + 0.1 * min(1.0, count / 300)
        count += 1
        with torch.no_grad():
            for weight, momentum in zip(matrices, momenta, strict=True):
                assert weight.grad is not None
                momentum.lerp_(weight.grad, 1 - keep)
                change = plain_polar(weight.grad.lerp(momentum, keep), dtype)
                weight.sub_(0.02 * max(1.0, weight.size(0) / weight.size(1)) ** 0.5 * change)
        adamw.step()
        model.zero_grad()
        return loss.item()

    return step


def random_batch(config: Config, world: World) -> Batch:
    ids = torch.randint(config.vocab_size, (config.batch_size, config.sequence_len + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return Batch(inputs, targets, None, None, num_targets=targets.numel()).to(world.device)


def device_peak(world: World) -> tuple[float | None, str]:
    """Operations per second that the device could do, and how we know."""
    if world.device.type == "cuda":
        return peak_flops(torch.cuda.get_device_name(world.device)), "data sheet, bf16 dense"
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds), "measured, fp32"


def memory_mb(world: World, *, peak: bool) -> float:
    """Memory in use now, or at most since the last reset; nan where the system does not say."""
    if world.device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    name = "VmHWM" if peak else "VmRSS"
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def timed(step: Callable[[], float], world: World) -> tuple[float, float]:
    """Seconds of a step, and the memory in MB that it needs beyond what its model and optimizer hold."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (forget := Path("/proc/self/clear_refs")).exists():
        forget.write_text("5")
    held = memory_mb(world, peak=False)
    began = time.perf_counter()
    step()
    return time.perf_counter() - began, memory_mb(world, peak=True) - held


def measure(
    depth: int, config: Config, world: World, peak: float | None
) -> list[dict[str, float | str | None]]:
    """One row of results per side."""
    batch = random_batch(config, world)
    sides = {"plain": plain_side(depth, config, batch, world)}
    sides["ours"] = our_side(depth, config, batch, world, compiled=False)
    if config.compiled:
        sides["compiled"] = our_side(depth, config, batch, world, compiled=True)
    losses = {side: torch.tensor([step(), step()]) for side, step in sides.items()}  # warms up as well
    tolerance = 1e-4 if world.dtype == torch.float32 else 2e-2
    for side, values in losses.items():
        torch.testing.assert_close(
            values, losses["plain"], rtol=tolerance, atol=0, msg=f"{side} learns otherwise"
        )
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    memory: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(config.repeats):
        for side, step in sides.items():
            spent, needed = timed(step, world)
            seconds[side].append(spent)
            memory[side].append(needed)
    num_tokens = batch.inputs.numel()
    flops = make_model(depth, config, world).flops_per_token(config.sequence_len) * num_tokens
    rows: list[dict[str, float | str | None]] = []
    for side, times in seconds.items():
        median = statistics.median(times)
        ratio = statistics.median(plain / own for plain, own in zip(seconds["plain"], times, strict=True))
        row: dict[str, float | str | None] = {
            "depth": depth,
            "side": side,
            "tokens_per_second": num_tokens / median,
        }
        row |= {
            "ratio": ratio,
            "mfu": flops / median / peak if peak else None,
            "step_memory_mb": max(memory[side]),
        }
        rows.append(row)
    return rows


def main(config: Config) -> None:
    """Measure every depth."""
    world = compute_init(config.device_type, config.dtype, config.seed)
    peak, source = device_peak(world)
    say_what_is_skipped(world)
    print(f"peak {f'{peak / 1e9:,.0f} GFLOP/s ({source})' if peak else 'unknown'}")
    print(f"{'depth':>5} {'step':>9} {'tokens/s':>10} {'ratio':>6} {'MFU':>6} {'step MB':>8}")
    results = []
    for depth in map(int, config.depths.split(",")):
        for row in measure(depth, config, world, peak):
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
            print(
                f"{row['depth']:>5} {row['side']:>9} {row['tokens_per_second']:>10,.0f} {row['ratio']:>6.2f} "
                f"{mfu:>6} {row['step_memory_mb']:>8,.0f}",
                flush=True,
            )
            results.append(row)
    cuda = world.device.type == "cuda"
    machine = {
        "device": torch.cuda.get_device_name(world.device)
        if cuda
        else platform.processor() or platform.machine(),
        "dtype": str(world.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_flops": peak,
    }
    print(json.dumps({"benchmark": "train", **dataclasses.asdict(config), **machine, "results": results}))


if __name__ == "__main__":
    main(cli(Config))

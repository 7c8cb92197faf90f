"""One optimizer step, for every stage; and the loop around it, for the stages that learn from given text.

Pretraining, mid-training and fine-tuning are the same act on other batches, so they share `train_steps`, a generator
that yields after every step: evaluating, logging and saving stand in the stage's own `for` body. Reinforcement
learning is another act around the same update, writes its own loop, and shares only `optimizer_step`.

What is decided here once: the loss of a step is a sum over the targets of all its microbatches on all ranks, divided
by their number; so every target weighs the same, and neither the size of a microbatch nor the number of ranks nor
an uneven mask changes the result. The gradient is clipped by its global norm. A step whose loss or gradient is not
finite is not taken.

The surprising choice: nothing here waits for the device. Whether a step was finite is decided on the device (it
scales the update by 0) and read by the host one step later, when the next is already queued. A step's numbers are
fetched when somebody reads them, so a stage that logs every tenth step waits every tenth step.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanochat.common import UserError, World
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW

LossFn = Callable[[Any, Any], Tensor]
"""(model, microbatch) -> the loss summed over the microbatch's targets."""

# Dense bf16 products per second with fp32 sums, from the makers' data sheets; the first name that fits counts.
PEAK_FLOPS = (
    ("GB300", 2.5e15),
    ("GB200", 2.5e15),
    ("B300", 2.25e15),
    ("B200", 2.25e15),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A6000", 154.8e12),
    ("A40", 149.7e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)


def peak_flops(device_name: str) -> float | None:
    """What the device could compute per second in bf16, by torch.cuda.get_device_name; None where unknown."""
    # whole words: an A4000 is no A40
    return next((flops for name, flops in PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)), None)


class Microbatch(Protocol):
    """What train_steps asks of a batch."""

    @property
    def inputs(self) -> Tensor: ...
    @property
    def num_targets(self) -> int: ...
    def to(self, device: torch.device) -> Any: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one update did; reading a number waits for the device to have it."""

    values: Tensor
    """(4,) on the host: loss, gradient norm before clipping, update norm, 1 if the step was not finite."""
    ready: Any = None
    """The CUDA event after which `values` may be read; None: now."""

    def _read(self, position: int) -> float:
        if self.ready is not None:
            self.ready.synchronize()
        return float(self.values[position])

    @property
    def loss(self) -> float:
        return self._read(0)

    @property
    def grad_norm(self) -> float:
        return self._read(1)

    @property
    def update_norm(self) -> float:
        """0 unless it was asked for."""
        return self._read(2)

    @property
    def skipped(self) -> bool:
        """True where loss or gradient was not finite, and nothing was changed."""
        return self._read(3) > 0


def optimizer_step(
    model: nn.Module,
    optimizer: MuonAdamW,
    microbatches: Iterable[Any],
    loss_fn: LossFn,
    *,
    normalizer: Tensor | float,
    lr_scale: float,
    world: World,
    max_grad_norm: float | None = None,
    want_update_norm: bool = False,
) -> StepResult:
    """Update once by the gradient of sum(loss_fn(model, microbatch)) / normalizer, over all ranks.

    normalizer: what the whole step divides by, the same on all ranks; 0 means that there is nothing to learn, and
    the weights stay. A rank may have no microbatch, but every rank must call.
    """
    count = (
        torch.full((), normalizer, device=world.device) if not isinstance(normalizer, Tensor) else normalizer
    )
    divisor = torch.where(count > 0, count, 1.0)
    total = torch.zeros((), device=world.device)
    for batch in microbatches:
        loss = loss_fn(model, batch) / divisor
        loss.backward()
        total += loss.detach()
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_scale
    world.sum(total)
    grad_norm = optimizer.grad_norm()
    finite = torch.isfinite(total) & torch.isfinite(grad_norm)
    scale = torch.ones_like(grad_norm)
    if (
        max_grad_norm is not None and max_grad_norm > 0
    ):  # 0 is off, as in nanochat; scaling by it would stop all learning
        scale = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    scale = torch.where(finite & (count > 0), scale, 0.0)
    update_norm = optimizer.step(scale=scale, want_norm=want_update_norm)
    optimizer.zero_grad()
    update_norm = torch.zeros_like(total) if update_norm is None else update_norm
    return _on_its_way(torch.stack([total, grad_norm, update_norm, (~finite).float()]))


def _on_its_way(values: Tensor) -> StepResult:
    """Begin to copy `values` to the host without waiting."""
    if not values.is_cuda:
        return StepResult(values)
    copy = values.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return StepResult(copy, event)


@dataclass
class NonFiniteGuard:
    """Counts skipped steps and ends the run after `limit` of them in a row."""

    limit: int = 3
    folder: Path | None = None
    """Where to leave the last batch for inspection; None: nowhere."""
    num_skipped: int = 0
    streak: int = 0
    """Of the steps in a row that were skipped last; both go on where a resumed run left them."""
    waiting: list[tuple[int, StepResult, list[Any]]] = field(default_factory=list)

    def note(self, index: int, result: StepResult, microbatches: list[Any], *, last: bool = False) -> None:
        """Take note of a step; on a GPU look at the one before, so as not to wait, unless it is the last."""
        self.waiting.append((index, result, microbatches))
        while len(self.waiting) > (0 if last or result.ready is None else 1):
            self._look(*self.waiting.pop(0))

    def state(self) -> dict[str, int]:
        """What a checkpoint holds of it, the last step included."""
        while self.waiting:
            self._look(*self.waiting.pop(0))
        return {"num_skipped": self.num_skipped, "streak": self.streak}

    def _look(self, index: int, result: StepResult, microbatches: list[Any]) -> None:
        if not result.skipped:
            self.streak = 0
            return
        self.num_skipped += 1
        self.streak += 1
        if self.streak >= self.limit:
            kept = self._keep(index, microbatches)
            raise UserError(
                f"loss or gradient was not finite in {self.streak} steps in a row, the last being step {index} "
                f"(loss {result.loss}); lower the learning rate, or inspect the batch{kept}"
            )

    def _keep(self, index: int, microbatches: list[Any]) -> str:
        if self.folder is None:
            return ""
        rank = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
        path = self.folder / f"nonfinite_{index:06d}_rank{rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save([_plain(batch) for batch in microbatches], path)
        return f" in {path}"


def _plain(batch: Any) -> Any:
    """A batch as torch.load(weights_only=True) reads it back."""
    is_instance = dataclasses.is_dataclass(batch) and not isinstance(batch, type)
    return dataclasses.asdict(batch) if is_instance else batch


@dataclass(frozen=True, slots=True)
class Step:
    """One step of train_steps."""

    index: int
    """Steps made so far, this one included; what a checkpoint taken now is called, and where a resumed run starts."""
    lr_scale: float
    seconds: float
    """Wall time of the step, the wait for data included."""
    data_seconds: float
    """Wall time spent waiting for data."""
    num_tokens: int
    """Positions processed by all ranks, which have batches of one shape; padding included."""
    num_skipped: int
    """Steps of this run that were not finite; on a GPU known one step late."""
    last: bool
    result: StepResult

    @property
    def loss(self) -> float:
        """Mean over all targets of the step."""
        return self.result.loss

    @property
    def grad_norm(self) -> float:
        return self.result.grad_norm

    @property
    def update_norm(self) -> float:
        return self.result.update_norm

    @property
    def skipped(self) -> bool:
        return self.result.skipped

    def due(self, every: int) -> bool:
        """True every `every` steps and on the last; `every` of 0 or less means never."""
        return every > 0 and (self.last or self.index % every == 0)


def train_steps(
    model: nn.Module,
    optimizer: MuonAdamW,
    batches: Iterator[Microbatch],
    loss_fn: LossFn,
    *,
    num_steps: int,
    grad_accum: int,
    schedule: Callable[[int], float],
    world: World,
    start: int = 0,
    max_grad_norm: float | None = None,
    want_update_norm: bool = False,
    guard: NonFiniteGuard | None = None,
) -> Iterator[Step]:
    """Make the steps from `start` to `num_steps`, yielding after each."""
    guard = guard or NonFiniteGuard()
    try:
        for index in range(start, num_steps):
            began = time.perf_counter()
            microbatches = [_next(batches, index) for _ in range(grad_accum)]
            data_seconds = time.perf_counter() - began
            result = optimizer_step(
                model,
                optimizer,
                (batch.to(world.device) for batch in microbatches),
                loss_fn,
                normalizer=_sum_over_ranks(sum(batch.num_targets for batch in microbatches), world),
                lr_scale=schedule(index),
                world=world,
                max_grad_norm=max_grad_norm,
                want_update_norm=want_update_norm,
            )
            last = index == num_steps - 1
            guard.note(index + 1, result, microbatches, last=last)
            yield Step(
                index=index + 1,
                lr_scale=schedule(index),
                seconds=time.perf_counter() - began,
                data_seconds=data_seconds,
                num_tokens=world.size * sum(batch.inputs.numel() for batch in microbatches),
                num_skipped=guard.num_skipped,
                last=last,
                result=result,
            )
            if index == start:
                _spare_the_collector()
    finally:
        gc.unfreeze()


def _next(batches: Iterator[Microbatch], index: int) -> Microbatch:
    try:
        return next(batches)
    except StopIteration:
        # inside a generator it would read as a RuntimeError about generators
        raise UserError(f"the data ended at step {index + 1}; give more data or fewer steps") from None


def _sum_over_ranks(count: int, world: World) -> Tensor | float:
    if world.size == 1:
        return float(count)
    return world.sum(torch.full((), float(count), device=world.device))


def _spare_the_collector() -> None:
    """Let the garbage collector pass over what is there already: going through a model takes it half a second."""
    gc.collect()
    gc.freeze()


def next_token_loss(model: GPT, batch: Any) -> Tensor:
    """Cross entropy summed over the batch's targets."""
    loss: Tensor = model(batch.inputs, batch.targets, segments=batch.segments, positions=batch.positions)
    return loss


def compile_model(model: GPT) -> GPT:
    """Compile what training runs, in place; generation keeps its plain path. Worth its minute on a GPU."""
    model.packed_hidden = torch.compile(model.packed_hidden, dynamic=False)  # type: ignore[method-assign]
    model.fused_head = True
    return model


def compiles(choice: str, world: World) -> bool:
    """What the flag --compile says: on, off, or auto for where it wins, which is a GPU."""
    return choice == "on" or (choice == "auto" and world.device.type == "cuda")

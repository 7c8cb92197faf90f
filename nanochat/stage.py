"""
What the training stages share besides the update: where to go on, what to print, when to save.

    with open_stage("sft", config, world, tag=tag, parent=parent) as stage:
        stage.restore(model, optimizer)
        for step in train_steps(..., start=stage.start):
            stage.report(step, num_steps, model)

A stage goes on from a checkpoint only if that was made by the same settings on the same parent: the checkpoint's meta holds
an `identity`, a hash of everything that changes what is learnt. Checkpoints of other settings under the same tag are
moved aside, never overwritten and never taken for ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch

from nanochat import checkpoint_manager, checkpoints
from nanochat.checkpoints import Checkpoint
from nanochat.common import UserError, World, peak_memory_mb, print0
from nanochat.config import ConversationConfig, StageConfig, TrainConfig
from nanochat.dataloader import ConversationBatches, conversation_batches, document_batches, merge_states
from nanochat.dataset import open_texts
from nanochat.evaluate import bits_per_byte
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, make_optimizer
from nanochat.tokenizer import Tokenizer
from nanochat.tracking import Tracker, open_run
from nanochat.train import Step, next_token_loss, peak_flops

# Flags that change what is seen of a run, or how it is cut up, but not what it learns.
OPERATIONAL = {
    "run", "model_tag", "device_type", "dtype", "wandb_project", "wandb_entity", "device_batch_size", "eval_every",
    "eval_examples", "eval_tokens", "save_every", "keep_last", "log_every", "resume", "step", "save_tag", "label",
    "compile",
}  # fmt: skip


def identity(config: StageConfig, parent: dict[str, Any] | None = None) -> str:
    """A hash of what the result depends on: the settings that matter and the checkpoint that was started from."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in OPERATIONAL}
    came_from = {} if parent is None else {name: entry["sha256"] for name, entry in _model_file(parent)}
    text = json.dumps([type(config).__module__, settings, came_from], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _model_file(meta: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, entry) for name, entry in meta.get("files", {}).items() if name.startswith("model_")]


def grad_accum_steps(config: TrainConfig, sequence_len: int, world: World) -> int:
    """Microbatches of one step on each rank. Raises UserError when the total is no multiple of one round."""
    round_tokens = config.device_batch_size * sequence_len * world.size
    if config.device_batch_size < 1:
        raise UserError(f"--device_batch_size={config.device_batch_size}: a microbatch has at least one row")
    if config.total_batch_size < 0:
        return 1
    count, rest = divmod(config.total_batch_size, round_tokens)
    if rest or not count:
        raise UserError(
            f"--total_batch_size={config.total_batch_size} is no multiple of {round_tokens:,} tokens, one microbatch "
            f"(--device_batch_size={config.device_batch_size} rows of {sequence_len}) on {world.size} ranks; change one"
        )
    return count


def supervised_steps(
    config: ConversationConfig, batches: ConversationBatches, grad_accum: int, world: World
) -> int:
    """Steps that were asked for, or as many as --num_epochs passes over the conversations take."""
    if config.num_iterations >= 0:
        return config.num_iterations
    rows_per_step = config.device_batch_size * grad_accum * world.size
    return max(1, config.num_epochs * batches.num_rows // rows_per_step)


class Stage:
    """One stage of the pipeline while it runs."""

    def __init__(
        self,
        source: str,
        config: Any,
        world: World,
        tracker: Tracker,
        *,
        tag: str,
        made_by: str,
        resumed: Checkpoint | None,
    ) -> None:
        self.source, self.config, self.world, self.tracker, self.tag = source, config, world, tracker, tag
        self._made_by, self._resumed = made_by, resumed
        self._meta: dict[str, Any] = resumed.meta() if resumed else {}
        self.start: int = self._meta.get("step", 0)
        """steps that are done already"""
        self.data_state: dict[str, Any] | None = self._meta.get("data_state")
        """where the data loader stood, for its `state` argument"""
        self.best: float | None = self._meta.get("best_value")
        """the best validation so far"""
        self._began = time.perf_counter()
        self._held: Callable[[], None] | None = None  # logs the step before

    def restore(self, model: GPT, optimizer: MuonAdamW | None) -> None:
        """Give model and optimizer the state that they had at `start`; nothing at the first step."""
        if self._resumed is None:
            return
        saved = checkpoint_manager.load_weights(self._resumed, dtype=model.compute_dtype)
        model.load_state_dict(saved.state_dict())
        if optimizer is not None:
            checkpoint_manager.load_optimizer(self._resumed, optimizer)
        print0(f"going on from {self._resumed}")

    def report(self, step: Step, num_steps: int, model: GPT, sequence_len: int) -> None:
        """Log one supervised step; print a line when it is due. On a GPU steps in between are logged one late."""
        due = step.due(self.config.log_every) or step.index == 1
        self._log_held()
        write = partial(self._report, step, num_steps, model, sequence_len, due=due)
        if due or step.last or step.result.ready is None:
            write()
        else:
            self._held = write  # its loss is still being computed, and the next step not yet queued

    def _log_held(self) -> None:
        write, self._held = self._held, None
        if write is not None:
            write()

    def _report(self, step: Step, num_steps: int, model: GPT, sequence_len: int, *, due: bool) -> None:
        metrics: dict[str, Any] = {
            "train/loss": step.loss,
            "train/grad_norm": step.grad_norm,
            "train/lr": step.lr_scale,
            "train/skipped_steps": step.num_skipped,
            "perf/tokens_per_second": step.num_tokens / step.seconds,
            "time/step_seconds": step.seconds,
            "time/data_seconds": step.data_seconds,
        }
        share = mfu(model, metrics["perf/tokens_per_second"], sequence_len, self.world)
        if share is not None:
            metrics["perf/mfu"] = share
        self.tracker.log(step.index, metrics)
        if due:
            done = step.index - self.start
            left = (time.perf_counter() - self._began) / done * (num_steps - step.index)
            utilised = "" if share is None else f" · {share:.1%} MFU"
            print0(
                f"{self.source} {step.index:5,}/{num_steps:,} · loss {step.loss:.4f} · "
                f"{metrics['perf/tokens_per_second']:,.0f} tokens/s{utilised} · {left:,.0f} s left"
            )

    def log(self, index: int, metrics: dict[str, Any]) -> None:
        """Log what an evaluation found, and print its numbers."""
        self._log_held()
        if not metrics:
            return
        self.tracker.log(index, metrics)
        shown = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        print0(f"{self.source} {index:5,} · " + " · ".join(f"{k} {v:.4f}" for k, v in shown.items()))

    def saves(self, step: Step) -> bool:
        """Whether a checkpoint is due: the last step always."""
        return step.last or step.due(self.config.save_every)

    def save(
        self,
        index: int,
        model: GPT,
        optimizer: MuonAdamW,
        *,
        data_state: dict[str, Any] | None = None,
        best_value: float | None = None,
        **meta: Any,
    ) -> None:
        """Save a checkpoint that the same command goes on from; every rank calls."""
        began = time.perf_counter()
        self._log_held()
        merged = None if data_state is None else merge_states(self.world.gather(data_state))
        improved = best_value is not None and (self.best is None or best_value > self.best)
        self.best = best_value if improved else self.best
        checkpoint = checkpoint_manager.save(
            self.source,
            self.tag,
            index,
            model=model,
            optimizer=optimizer,
            world=self.world,
            keep_last=self.config.keep_last,
            best=improved,
            meta={
                **meta,
                "user_config": dataclasses.asdict(self.config),
                "identity": self._made_by,
                "data_state": merged,
                "best_value": self.best,
            },
        )
        seconds = time.perf_counter() - began
        self.tracker.log(index, {"time/save_seconds": seconds})
        print0(f"saved {checkpoint} in {seconds:.1f} s")


@contextmanager
def open_stage(
    source: str,
    config: Any,
    world: World,
    *,
    tag: str,
    parent: dict[str, Any] | None = None,
    record: str = "",
) -> Iterator[Stage]:
    """The stage `source` under the model tag `tag`; `parent` is the meta of the checkpoint that it starts from.

    `record` names its folder in the run directory, by default as the stage.
    """
    made_by = identity(config, parent)
    resumed = _own_checkpoint(source, tag, made_by, config.resume, world)
    resume_step = resumed.step + 1 if resumed else None
    with open_run(record or source, config, world, resume_step=resume_step) as tracker:
        yield Stage(source, config, world, tracker, tag=tag, made_by=made_by, resumed=resumed)
        print0(f"{record or source}: at most {peak_memory_mb(world.device):,.0f} MB of memory on this rank")


def _own_checkpoint(source: str, tag: str, made_by: str, resume: bool, world: World) -> Checkpoint | None:
    """The newest whole checkpoint of this very stage; what others left under the tag is moved aside."""
    found = checkpoints.newest(source, tag)
    if found is not None and resume and found.meta().get("identity") == made_by:
        return found
    world.barrier()  # nobody moves the folder while another still looks into it
    folder = checkpoints.checkpoint_folder(source, tag)
    if world.main and folder.is_dir() and any(folder.iterdir()):
        aside = folder.with_name(f"{tag}.before-{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(aside)
        why = "they were made with other settings" if resume else "--resume=0 starts anew"
        print0(f"checkpoints of {source} {tag} moved to {aside}: {why}")
    world.barrier()
    return None


def mfu(model: GPT, tokens_per_second: float, sequence_len: int, world: World) -> float | None:
    """Share of the GPUs' peak arithmetic that training uses; None where the peak is not known."""
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device))
    return (
        None
        if peak is None
        else model.flops_per_token(sequence_len) * tokens_per_second / (peak * world.size)
    )


class Rates(Protocol):
    """The flags that an optimizer is made from."""

    @property
    def matrix_lr(self) -> float: ...
    @property
    def embedding_lr(self) -> float: ...
    @property
    def unembedding_lr(self) -> float: ...
    @property
    def scalar_lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def init_lr_frac(self) -> float: ...


def optimizer_for(model: GPT, config: Rates, world: World) -> MuonAdamW:
    """Muon and AdamW at the rates of the flags, all times --init_lr_frac."""
    scale = config.init_lr_frac
    return make_optimizer(
        model,
        matrix_lr=config.matrix_lr * scale,
        embedding_lr=config.embedding_lr * scale,
        unembedding_lr=config.unembedding_lr * scale,
        scalar_lr=config.scalar_lr * scale,
        weight_decay=config.weight_decay,
        world=world,
        fuse=world.device.type == "cuda",
    )


def tell(tracker: Tracker, notes: list[tuple[str, str]]) -> None:
    """Print what data was used and what was left out, and keep it for the report."""
    for kind, text in notes:
        tracker.note(kind, text)


def text_bpb(
    model: GPT,
    tokenizer: Tokenizer,
    world: World,
    *,
    split: str,
    num_tokens: int,
    batch_size: int,
    sequence_len: int,
) -> float | None:
    """Bits per byte on the first `num_tokens` of a split of the pretraining text; None where there is no text on disk."""
    try:
        texts = open_texts(split)
    except UserError as error:
        print0(f"no bits per byte: {error}")
        return None
    batches = document_batches(
        texts, tokenizer, batch_size=batch_size, sequence_len=sequence_len, world=world
    )
    count = max(1, num_tokens // (batch_size * sequence_len * world.size))
    sizes = torch.tensor(tokenizer.num_bytes())
    return bits_per_byte(model, islice(batches, count), sizes, world)


@torch.no_grad()
def conversation_loss(
    model: GPT, tokenizer: Tokenizer, task: Any, world: World, *, batch_size: int, sequence_len: int
) -> float:
    """Loss per trained token over all of `task`."""
    batches = conversation_batches(
        task, tokenizer, batch_size=batch_size, sequence_len=sequence_len, world=world, epochs=1
    )
    total = torch.zeros(2, device=world.device)
    for batch in batches:
        total[0] += next_token_loss(model, batch.to(world.device))
        total[1] += batch.num_targets
    loss, count = world.sum(total).tolist()
    return loss / count

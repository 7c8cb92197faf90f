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
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from typing import Any

import torch

from nanochat import checkpoint_manager, checkpoints
from nanochat.checkpoint_manager import PendingSave
from nanochat.checkpoints import Checkpoint
from nanochat.common import UserError, World, peak_memory_mb, print0
from nanochat.config import StageConfig
from nanochat.dataloader import merge_states
from nanochat.gpt import GPT
from nanochat.interruption import Stopped, StopRequests
from nanochat.locks import exclusive
from nanochat.optim import MuonAdamW
from nanochat.tracking import Tracker, open_run, run_dir
from nanochat.train import NonFiniteGuard, Step, peak_flops

# Flags that change what is seen of a run, or how it is cut up, but not what it learns.
OPERATIONAL = {
    "run", "model_tag", "save_tag", "label", "device_type", "dtype", "compile", "device_batch_size",
    "wandb_project", "wandb_entity", "wandb_mode", "log_every", "save_every", "keep_last", "resume", "step",
    "eval_every", "eval_examples", "eval_samples", "eval_tokens",
    "kl_every", "kl_batch", "kl_mode", "attn_every", "attn_html",
}  # fmt: skip


def identity(config: StageConfig, parent: dict[str, Any] | None = None, *, num_ranks: int = 1) -> str:
    """A hash of what the result depends on: the settings that matter and the checkpoint that was started from."""
    everything = dataclasses.asdict(config)
    settings = {k: v for k, v in everything.items() if k not in OPERATIONAL}
    if settings.get("total_batch_size", 0) < 0:  # then the microbatches are the step
        settings["rows"] = everything["device_batch_size"] * num_ranks
    came_from = {} if parent is None else {name: entry["sha256"] for name, entry in _model_file(parent)}
    text = json.dumps([type(config).__module__, settings, came_from], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _model_file(meta: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, entry) for name, entry in meta.get("files", {}).items() if name.startswith("model_")]


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
        tokenizer: str,
        resumed: Checkpoint | None,
    ) -> None:
        self.source, self.config, self.world, self.tracker, self.tag = source, config, world, tracker, tag
        self._made_by, self._tokenizer, self._resumed = made_by, tokenizer, resumed
        self._meta: dict[str, Any] = resumed.meta() if resumed else {}
        self.start: int = self._meta.get("step", 0)
        """steps that are done already"""
        self.data_state: dict[str, Any] | None = self._meta.get("data_state")
        """where the data loader stood, for its `state` argument"""
        self.best: float | None = self._meta.get("best_value")
        """the best validation so far"""
        self.guard = NonFiniteGuard(folder=run_dir(config.run), **self._meta.get("guard", {}))
        """counts steps that were not finite, and ends the run after three in a row"""
        self.requests = StopRequests()
        self._began = time.perf_counter()
        self._stopping = self._last = False
        self._pending: PendingSave | None = None
        self._held: Callable[[], None] | None = None  # logs the step before

    def remembered(self, prefix: str) -> dict[str, Any]:
        """What the checkpoint holds of the last evaluation, for a run that ends before the next."""
        return {name: value for name, value in self._meta.items() if name.startswith(prefix)}

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
        """Whether a checkpoint is due; every rank calls, after every step."""
        return self.saves_at(step.index, last=step.last)

    def saves_at(self, index: int, *, last: bool, best_value: float | None = None) -> bool:
        """Whether a checkpoint is due after step `index`: every so many, at the last, and when the run is to stop.

        Where checkpoints are wanted between, so is one whose `best_value` is above every validation before it.
        """
        if self._pending and not self.world.any(not self._pending.writing.done):
            self.settle(index)
        self._last = last
        self._stopping = self.world.any(bool(self.requests.received))
        every = self.config.save_every
        return last or self._stopping or (every > 0 and (index % every == 0 or self._improves(best_value)))

    def _improves(self, value: float | None) -> bool:
        return value is not None and (self.best is None or value > self.best)

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
        """Save a checkpoint that the same command goes on from; every rank calls. Raises Stopped when that was asked for."""
        self.settle(index)
        began = time.perf_counter()
        self._log_held()
        merged = None if data_state is None else merge_states(self.world.gather(data_state))
        improved = self._improves(best_value)
        self.best = best_value if improved else self.best
        self.tracker.sync()
        ends = self._stopping or self._last
        self._pending = checkpoint_manager.begin_save(
            self.source,
            self.tag,
            index,
            model=model,
            optimizer=optimizer,
            world=self.world,
            keep_last=self.config.keep_last,
            best=improved,
            background=self.world.device.type == "cuda" and not ends,
            meta={
                **meta,
                "user_config": dataclasses.asdict(self.config),
                "identity": self._made_by,
                **({"tokenizer": self._tokenizer} if self._tokenizer else {}),
                "data_state": merged,
                "best_value": self.best,
                "guard": self.guard.state(),
            },
        )
        if self._pending.writing.done:
            self.settle(index)
        self.tracker.log(index, {"time/save_seconds": time.perf_counter() - began})
        if self._stopping and not self._last:
            asked = self.requests.received or "a signal to another rank"
            told = f"stopped by {asked} after step {index}, which is saved; the same command goes on"
            print0(told)
            raise Stopped(told)

    def settle(self, index: int) -> None:
        """Put a checkpoint that was written in the background in its place; every rank calls."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        checkpoint = pending.finish()
        self.tracker.log(index, {"time/save_write_seconds": pending.writing.seconds})
        print0(f"saved {checkpoint} in {pending.writing.seconds:.1f} s")


@contextmanager
def open_stage(
    source: str,
    config: Any,
    world: World,
    *,
    tag: str,
    parent: dict[str, Any] | None = None,
    tokenizer: str = "",
    record: str = "",
) -> Iterator[Stage]:
    """The stage `source` under the model tag `tag`; `parent` is the meta of the checkpoint that it starts from.

    `tokenizer` is the fingerprint of the one that it trains with: a checkpoint of another one is not gone on from.
    `record` names its folder in the run directory, by default as the stage.
    """
    made_by = identity(config, parent, num_ranks=world.size)
    with ExitStack() as held:
        _hold(held, source, tag, world)
        yield from _opened(
            source, config, world, tag=tag, made_by=made_by, tokenizer=tokenizer, record=record or source
        )


def _hold(held: ExitStack, source: str, tag: str, world: World) -> None:
    """Take the checkpoints' lock on the main rank; where that fails, all ranks say so."""
    problem = ""
    if world.main:
        try:
            held.enter_context(exclusive(f"{source}-{tag}", f"{source} {tag}"))
        except UserError as error:
            problem = str(error)
    if problem := world.gather(problem)[0]:
        raise UserError(problem)


def _opened(
    source: str, config: Any, world: World, *, tag: str, made_by: str, tokenizer: str, record: str
) -> Iterator[Stage]:
    resumed = _own_checkpoint(source, tag, made_by, tokenizer, config.resume, world)
    resume_step = resumed.step + 1 if resumed else None
    with open_run(record, config, world, resume_step=resume_step) as tracker:
        stage = Stage(
            source, config, world, tracker, tag=tag, made_by=made_by, tokenizer=tokenizer, resumed=resumed
        )
        with stage.requests:
            try:
                yield stage
            except Exception:
                if world.size == 1:  # with others, they may be what failed, and would be waited for
                    stage.settle(tracker.files.step if tracker.files else 0)
                raise
        print0(f"{record}: at most {peak_memory_mb(world.device):,.0f} MB of memory on this rank")


def _own_checkpoint(
    source: str, tag: str, made_by: str, tokenizer: str, resume: bool, world: World
) -> Checkpoint | None:
    """The newest whole checkpoint of this very stage; what others left under the tag is moved aside."""
    found = checkpoints.newest(source, tag)
    meta = found.meta() if found else {}
    same_tokenizer = meta.get("tokenizer", tokenizer) == tokenizer  # older checkpoints do not name theirs
    if found is not None and resume and meta.get("identity") == made_by and same_tokenizer:
        return found
    world.barrier()  # nobody moves the folder while another still looks into it
    folder = checkpoints.checkpoint_folder(source, tag)
    if world.main and folder.is_dir() and any(folder.iterdir()):
        aside = folder.with_name(f"{tag}.before-{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(aside)
        other = "other settings" if same_tokenizer else "another tokenizer"
        why = f"they were made with {other}" if found else "none of them is whole"
        why = why if resume else "--resume=0 starts anew"
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


def tell(tracker: Tracker, notes: list[tuple[str, str]]) -> None:
    """Print what data was used and what was left out, and keep it for the report."""
    for kind, text in notes:
        tracker.note(kind, text)

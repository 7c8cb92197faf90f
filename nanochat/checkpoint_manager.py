"""Save and load checkpoints; with checkpoints.py the one place that knows their files and the formats of older code.

The meta file, which lists the others with their hashes, is written last, and every file beside its final name
first; so a run may be killed at any instant, or the disk be full, and what was whole before stays whole.

Files of nanochat and of October 2025 (no list in meta, no step after RL, bf16 embedding, a compiled model's prefix,
one optimizer file) are read as they are. Nothing is unpickled but tensors: torch.load(weights_only=True) throughout.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import legacy
from nanochat.checkpoint_writer import UNFINISHED, Writing
from nanochat.checkpoints import (
    STAGES,
    Checkpoint,
    RefusedCheckpoint,
    best_step,
    checkpoint_folder,
    checkpoints,
    find,
    newest,
)
from nanochat.common import UserError, World, base_dir, write_atomic
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, consolidate, recut
from nanochat.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "STAGES",
    "Checkpoint",
    "PendingSave",
    "RefusedCheckpoint",
    "begin_save",
    "best_step",
    "checkpoint_folder",
    "checkpoints",
    "find",
    "load_model",
    "load_optimizer",
    "load_weights",
    "newest",
    "save",
]


@dataclass(frozen=True, slots=True)
class PendingSave:
    """A checkpoint that is being written; it counts once `finish` has put its files in place."""

    source: str
    checkpoint: Checkpoint
    writing: Writing
    meta: dict[str, Any]
    world: World
    keep_last: int | None
    best: bool

    def finish(self) -> Checkpoint:
        """Wait for the files of all ranks, name them, write the meta file; every rank calls. Raises UserError."""
        outcomes = self.world.gather(self.writing.wait())
        if problems := [problem for _, problem in outcomes if problem]:
            for path in self.writing.paths:
                path.with_name(path.name + UNFINISHED).unlink(missing_ok=True)
            raise UserError(
                f"checkpoint {self.checkpoint} was not saved, those before it are whole: {problems[0]}"
            )
        files = {name: entry for entries, _ in outcomes for name, entry in entries.items()}
        try:
            _put_in_place(self.checkpoint, self.writing.paths, self.meta | {"files": files}, self.world)
        except OSError as error:  # the last kilobyte of a disk, say
            raise UserError(
                f"checkpoint {self.checkpoint} was not saved, those before it are whole: {error}"
            ) from None
        if self.world.main:
            folder = self.checkpoint.folder
            if self.best:
                write_atomic(folder / "best", f"{self.checkpoint.step}\n")
            _tidy(folder, self.keep_last, best_step(self.source, folder.name))
        self.world.barrier()
        return self.checkpoint


def begin_save(
    source: str,
    tag: str,
    step: int,
    *,
    model: GPT,
    meta: dict[str, Any],
    world: World,
    optimizer: MuonAdamW | None = None,
    keep_last: int | None = None,
    best: bool = False,
    background: bool = False,
) -> PendingSave:
    """Begin to save a checkpoint; every rank calls. keep_last: delete older ones but for so many and the best.

    With `background` the weights may be trained on meanwhile; without it the files are written when this returns.
    """
    folder = checkpoint_folder(source, tag)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(folder, step)
    meta = meta | {"step": step, "model_config": dataclasses.asdict(model.config), "world_size": world.size}
    json.dumps(meta)  # a meta that JSON cannot hold must fail here, not when all else is written
    states: dict[Path, dict[str, Any]] = {}
    if world.main:
        states[checkpoint.model_path] = model.state_dict()
    if optimizer is not None:
        states[checkpoint.optimizer_path(world.rank)] = optimizer.state_dict()
    writing = Writing(states, folder, background=background)
    return PendingSave(source, checkpoint, writing, meta, world, keep_last, best)


def save(source: str, tag: str, step: int, **what: Any) -> Checkpoint:
    """Save a checkpoint and wait until it is whole; arguments as of begin_save."""
    return begin_save(source, tag, step, **what).finish()


def _put_in_place(checkpoint: Checkpoint, paths: list[Path], meta: dict[str, Any], world: World) -> None:
    """Give the written files their names, and only then, all ranks being done, write the meta file."""
    if world.main:
        checkpoint.meta_path.unlink(missing_ok=True)  # of an earlier save of this step: no longer whole
    world.barrier()
    for path in paths:
        os.replace(path.with_name(path.name + UNFINISHED), path)
    world.barrier()
    if world.main:
        _sync(checkpoint.folder)
        write_atomic(checkpoint.meta_path, json.dumps(meta, indent=2))
        for folder in (checkpoint.folder, checkpoint.folder.parent):  # the folder itself may be new
            _sync(folder)


def _sync(folder: Path) -> None:
    """Put the names of a folder's files onto the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tidy(folder: Path, keep_last: int | None, best: int | None) -> None:
    """Delete checkpoints that are no longer wanted, and what killed runs left unfinished."""
    for path in folder.glob(f"*{UNFINISHED}"):
        path.unlink()
    if keep_last is None:
        return
    for checkpoint in checkpoints(folder)[max(1, keep_last) :]:
        if checkpoint.step != best:
            checkpoint.meta_path.unlink(missing_ok=True)  # first: without it the rest counts as unfinished
            for path in [*folder.glob(f"optim_{checkpoint.step:06d}*.pt"), checkpoint.model_path]:
                path.unlink(missing_ok=True)


def _load_tensors(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes, the answer is the same
        reason = (str(error).splitlines() or [""])[0]
        raise RefusedCheckpoint(f"{path} cannot be read: {type(error).__name__}: {reason}") from None


def load_weights(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a checkpoint, on the CPU."""
    config = GPTConfig.from_dict(checkpoint.meta()["model_config"])
    with torch.device("meta"):  # no weights are drawn only to be overwritten
        model = GPT(config, dtype=dtype)
    state = legacy.plain_weights(_load_tensors(checkpoint.model_path), checkpoint.model_path)
    legacy.check_weights(state, model, checkpoint.model_path)
    model.load_state_dict(state, assign=True)
    return model


def load_model(
    source: str,
    device: str | torch.device | None = None,
    phase: str = "eval",
    model_tag: str | None = None,
    step: int | None = None,
    *,
    world: World | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Model, tokenizer and meta of a checkpoint; on `device`, or where `world` computes."""
    if phase not in ("train", "eval"):
        raise UserError(f"phase={phase!r} is not known; use train or eval")
    if world is not None:
        device, dtype = world.device, dtype or world.dtype
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    checkpoint = find(source, model_tag, step)
    model = load_weights(checkpoint, dtype=dtype).to(device)
    tokenizer = load_tokenizer()
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {base_dir() / 'tokenizer'} has {tokenizer.vocab_size:,} tokens, checkpoint {checkpoint} "
            f"was trained with {model.config.vocab_size:,}; put its own tokenizer there, or train anew"
        )
    meta = checkpoint.meta()
    if (
        "tokenizer" in meta and meta["tokenizer"] != tokenizer.fingerprint
    ):  # older checkpoints do not name theirs
        raise UserError(
            f"the tokenizer in {base_dir() / 'tokenizer'} is not the one that checkpoint {checkpoint} was trained with, "
            "though it has as many tokens; put its own tokenizer there (scripts.tok_train with its flags), or train anew"
        )
    return model.train(phase == "train"), tokenizer, meta


def load_optimizer(checkpoint: Checkpoint, optimizer: MuonAdamW) -> None:
    """Restore the optimizer's state, cut anew where the number of ranks is another than when it was saved."""
    world = optimizer.world
    num_shards = checkpoint.num_optimizer_shards()
    if num_shards == world.size:
        optimizer.load_state_dict(_load_tensors(checkpoint.optimizer_path(world.rank)))
        return
    if num_shards:
        whole = consolidate([_load_tensors(checkpoint.optimizer_path(rank)) for rank in range(num_shards)])
    elif checkpoint.legacy_optimizer_path.is_file():
        path = checkpoint.legacy_optimizer_path
        whole = legacy.optimizer_state(_load_tensors(path), optimizer, path)
    else:
        raise UserError(f"checkpoint {checkpoint} holds no optimizer state, so a run cannot go on from it")
    optimizer.load_state_dict(recut(whole, rank=world.rank, size=world.size))

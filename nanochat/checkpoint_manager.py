"""Save and load checkpoints; with checkpoints.py the one place that knows their files and the formats of older code.

The meta file, which lists the others with their hashes, is written last, and every file beside its final name
first; so a run may be killed at any instant, or the disk be full, and what was whole before stays whole.

Files of nanochat and of October 2025 (no list in meta, no step after RL, bf16 embedding, a compiled model's prefix,
one optimizer file) are read as they are. Nothing is unpickled but tensors: torch.load(weights_only=True) throughout.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nanochat import legacy
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
    "RefusedCheckpoint",
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

UNFINISHED = ".unfinished"


class _HashingFile:
    """A file that hashes what is written to it, so that nothing needs reading again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.num_bytes += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _write(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Write `state` beside `path`, and onto the disk; return its entry for the meta file."""
    with path.with_name(path.name + UNFINISHED).open("wb") as file:
        hashing = _HashingFile(file)
        torch.save(_on_cpu(state), hashing)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.num_bytes, "sha256": hashing.digest.hexdigest()}


def _write_all(states: dict[Path, dict[str, Any]], folder: Path) -> tuple[dict[str, Any], str]:
    """Write every state; return the entries for the meta file, and what went wrong or ""."""
    needed = sum(tensor.nbytes for state in states.values() for tensor in _tensors(state))
    free = shutil.disk_usage(folder).free
    full = f"the disk is full: {folder} has {free / 1e6:,.1f} MB free, this needs {needed / 1e6:,.1f} MB"
    if free < needed:
        return {}, full
    try:
        return {path.name: _write(path, state) for path, state in states.items()}, ""
    except OSError as error:
        return {}, full if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    except RuntimeError as error:  # torch's writer wraps what the file raised
        cause = error.__context__
        no_space = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        return {}, full if no_space else str(error)


def save(
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
) -> Checkpoint:
    """Save a checkpoint; every rank calls. keep_last: delete older ones but for so many and the best."""
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
    outcomes = world.gather(_write_all(states, folder))
    if problems := [problem for _, problem in outcomes if problem]:
        for path in states:
            path.with_name(path.name + UNFINISHED).unlink(missing_ok=True)
        raise UserError(f"checkpoint {checkpoint} was not saved, those before it are whole: {problems[0]}")
    files = {name: entry for entries, _ in outcomes for name, entry in entries.items()}
    _put_in_place(checkpoint, list(states), meta | {"files": files}, world)
    if world.main:
        if best:
            write_atomic(folder / "best", f"{step}\n")
        _tidy(folder, keep_last, best_step(source, tag))
    world.barrier()
    return checkpoint


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
        _sync(checkpoint.folder)


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
    return model.train(phase == "train"), tokenizer, checkpoint.meta()


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

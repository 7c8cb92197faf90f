"""Which checkpoints there are, and which of them are whole.

    base_dir/{base,mid,chatsft,chatrl}_checkpoints/<tag>/model_000200.pt  optim_000200_rank0.pt  meta_000200.json

A checkpoint is whole when its meta file is there and every file that it lists has the listed size and hash. A reader
that is not told which step to take takes the newest whole one and says which it refused. Checkpoints of older code
have no such list; of those a torn model file is still noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError, base_dir, print0

STAGES = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}


class RefusedCheckpoint(UserError):
    """A checkpoint that is torn, altered or not there as a whole."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One step's files in a folder, whole or not."""

    folder: Path
    step: int

    @property
    def model_path(self) -> Path:
        return self.folder / f"model_{self.step:06d}.pt"

    @property
    def meta_path(self) -> Path:
        return self.folder / f"meta_{self.step:06d}.json"

    def optimizer_path(self, rank: int) -> Path:
        return self.folder / f"optim_{self.step:06d}_rank{rank}.pt"

    @property
    def legacy_optimizer_path(self) -> Path:
        return self.folder / f"optim_{self.step:06d}.pt"

    def __str__(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name} step {self.step}"

    def meta(self) -> dict[str, Any]:
        """The meta file, checked for its shape; `step` is filled in where older code left it out."""
        try:
            meta = json.loads(self.meta_path.read_bytes())
        except FileNotFoundError:
            raise RefusedCheckpoint(
                f"checkpoint {self} was not finished: {self.meta_path.name} is missing"
            ) from None
        except (ValueError, RecursionError, OSError) as error:
            raise RefusedCheckpoint(f"checkpoint {self}: {self.meta_path} cannot be read: {error}") from None
        if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
            raise RefusedCheckpoint(f"checkpoint {self}: {self.meta_path} has no model_config")
        self._files(meta)
        return meta | {"step": self.step}

    def num_optimizer_shards(self) -> int:
        """How many ranks saved optimizer state, by the list or, where there is none, by the folder."""
        names = self._files(self.meta()) or [path.name for path in self.folder.glob("optim_*.pt")]
        return sum(re.fullmatch(rf"optim_{self.step:06d}_rank\d+\.pt", name) is not None for name in names)

    def _files(self, meta: dict[str, Any]) -> dict[str, tuple[int, str]] | None:
        """Size and hash by file name; None where older code wrote no list."""
        if "files" not in meta:
            return None
        try:
            files = {
                name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in meta["files"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError):
            raise RefusedCheckpoint(
                f"checkpoint {self}: the list of files in {self.meta_path} is damaged"
            ) from None
        if self.model_path.name not in files or any(Path(name).name != name for name in files):
            raise RefusedCheckpoint(
                f"checkpoint {self}: the list of files in {self.meta_path} is not of its own files"
            )
        return files

    def verify(self, *, optimizer: bool = False) -> None:
        """Raise RefusedCheckpoint unless the model's file is whole, with `optimizer` the others too."""
        files = self._files(self.meta())
        if files is None:
            if not zipfile.is_zipfile(
                self.model_path
            ):  # its directory stands at the end, which a torn file lacks
                raise RefusedCheckpoint(
                    f"checkpoint {self} is torn: {self.model_path} does not end as it should"
                )
            return
        for name, (size, digest) in files.items():
            path = self.folder / name
            if name != self.model_path.name and not optimizer:
                continue
            if not path.is_file():
                raise RefusedCheckpoint(f"checkpoint {self} is not whole: {path} is missing")
            if path.stat().st_size != size:
                raise RefusedCheckpoint(
                    f"checkpoint {self} is torn: {path} has {path.stat().st_size} of {size} bytes"
                )
            if file_sha256(path) != digest:
                raise RefusedCheckpoint(
                    f"checkpoint {self} was altered: the hash of {path} is not the listed one"
                )


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stage_folder(source: str) -> Path:
    if source not in STAGES:
        raise UserError(f"there is no stage {source!r} with checkpoints; use one of {', '.join(STAGES)}")
    return base_dir() / STAGES[source]


def checkpoint_folder(source: str, tag: str) -> Path:
    """Where the checkpoints of a stage and model tag stand."""
    if not tag or Path(tag).name != tag:
        raise UserError(f"--model_tag={tag!r} must be the name of a folder, such as d8")
    return stage_folder(source) / tag


def checkpoints(folder: Path) -> list[Checkpoint]:
    """What stands in a folder, whole or not, newest first."""
    names = [re.fullmatch(r"model_(\d+)\.pt", path.name) for path in folder.glob("model_*.pt")]
    return [Checkpoint(folder, step) for step in sorted((int(m[1]) for m in names if m), reverse=True)]


def find_tag(source: str) -> str:
    """The deepest d<depth> of a stage, otherwise the tag written to last."""
    folders = [path for path in stage_folder(source).glob("*") if checkpoints(path)]
    if not folders:
        raise UserError(f"there is no {source} checkpoint under {base_dir()}: {_what_exists()}")
    depths = {path: int(m[1]) for path in folders if (m := re.fullmatch(r"d(\d+)", path.name))}
    return max(depths or folders, key=lambda path: (depths.get(path, 0), path.stat().st_mtime)).name


def find(
    source: str, tag: str | None = None, step: int | None = None, *, optimizer: bool = False
) -> Checkpoint:
    """The checkpoint asked for, proven whole; without `step` the newest whole one.

    With `optimizer` its optimizer state must be whole too, as it must for a run that goes on.
    """
    tag = tag or find_tag(source)
    there = checkpoints(checkpoint_folder(source, tag))
    if step is not None:
        there = [checkpoint for checkpoint in there if checkpoint.step == step]
    if not there:
        wanted = f"{source} checkpoint of {tag}" + ("" if step is None else f" at step {step}")
        raise UserError(f"there is no {wanted} under {base_dir()}: {_what_exists()}")
    checkpoint, refused = _first_whole(there, optimizer=optimizer)
    if checkpoint is None:
        raise RefusedCheckpoint(f"{refused}; no other can be used: {_what_exists()}")
    return checkpoint


def newest(source: str, tag: str, *, optimizer: bool = True) -> Checkpoint | None:
    """The checkpoint from which a run goes on: the newest whole one; None where the run must begin anew."""
    return _first_whole(checkpoints(checkpoint_folder(source, tag)), optimizer=optimizer)[0]


def _first_whole(
    candidates: Iterable[Checkpoint], *, optimizer: bool
) -> tuple[Checkpoint | None, RefusedCheckpoint | None]:
    """The first whole one, and why the first that was passed over was; each refusal is printed."""
    refused: RefusedCheckpoint | None = None
    for checkpoint in candidates:
        try:
            checkpoint.verify(optimizer=optimizer)
        except RefusedCheckpoint as error:
            refused = refused or error
            print0(f"refused: {error}")
            continue
        if refused:
            print0(f"using {checkpoint} instead")
        return checkpoint, refused
    return None, refused


def best_step(source: str, tag: str) -> int | None:
    """The step that was saved as the best so far."""
    path = checkpoint_folder(source, tag) / "best"
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None


def _what_exists() -> str:
    found = []
    for source in STAGES:
        for folder in sorted(stage_folder(source).glob("*")):
            if steps := [str(checkpoint.step) for checkpoint in reversed(checkpoints(folder))]:
                found.append(f"{source} {folder.name} step {', '.join(steps)}")
    return (
        "there is " + "; ".join(found)
        if found
        else "there are no checkpoints at all; train a base model first"
    )

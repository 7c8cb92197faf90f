"""Run a function on several gloo ranks of this machine, each a process of its own, and collect what they return."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat.common import World


def single(dtype: torch.dtype = torch.float32) -> World:
    """The world of one process on the CPU."""
    return World(rank=0, local_rank=0, size=1, device=torch.device("cpu"), dtype=dtype)


def _one_rank(rank: int, fn: Callable[..., Any], size: int, folder: str, args: tuple[Any, ...]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    timeout = timedelta(seconds=240)  # a rank that died must fail the test, not hang it
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timeout
    )
    try:
        world = World(rank, rank, size, torch.device("cpu"), torch.float32)
        torch.save(fn(world, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Call fn(world, *args) on `size` ranks and return their results in order of rank.

    fn must be a module-level function; it returns what torch.load(weights_only=True) reads: tensors, numbers,
    strings, lists, dicts. An exception in a rank is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one_rank, args=(fn, size, folder, args), nprocs=size, join=True)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(size)]

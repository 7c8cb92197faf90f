"""
What every part of the house needs: who am I among the ranks, where do files live, how do I speak to a person.

A `World` is made once by `compute_init` and handed round; nothing below it reads RANK from the environment again.
torch is imported only where a function needs it: a laptop that merely launches a cloud box has no torch,
and `--help` must not wait for it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")


class UserError(ValueError):
    """A mistake that the user can cure: one line saying what, which value, how. `cli` prints it without a traceback."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers, the device it computes on, and the dtype it computes in."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    host_group: Any = None
    """The process group for what ranks tell each other about themselves, where the usual one needs the GPU."""

    @property
    def main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up over all ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Item) -> list[Item]:
        """The `value` of every rank, in order of rank, on every rank (picklable values)."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Item] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, said: bool) -> bool:
        """Whether any rank says so, found out on the host: a GPU goes on computing meanwhile."""
        if self.size == 1:
            return said
        import torch
        import torch.distributed as dist

        votes = torch.tensor([int(said)])
        dist.all_reduce(votes, group=self.host_group)
        return bool(votes.item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()


def compute_init(device_type: str = "", dtype: str = "", seed: int = 42) -> World:
    """
    Choose device and dtype, join the process group when torchrun started us, seed torch.

    `device_type`: cuda, mps, cpu, or "" for the best there is. `dtype`: float32, bfloat16, or "" for bfloat16 where
    the GPU has it and float32 elsewhere. Raises UserError for a device or dtype that this machine lacks.
    """
    import torch

    device = _choose_device(device_type)
    torch.manual_seed(seed)
    rank, local_rank, size = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    host_group = None
    if size > 1:
        import torch.distributed as dist

        from nanochat.interruption import check_launcher

        check_launcher()
        backend = "nccl" if device.type == "cuda" else "gloo"
        # A dead rank is seen at once: torchrun ends the others, and gloo its connection. This is for one that hangs; shorter
        # would end runs in which one rank compiles or writes while the others wait for it.
        timeout = timedelta(minutes=10 if device.type == "cuda" else 5)
        dist.init_process_group(backend, timeout=timeout, device_id=device if backend == "nccl" else None)
        host_group = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None
    world = World(rank, local_rank, size, device, _choose_dtype(dtype, device), host_group)
    print0(
        f"device {_describe(device)} · {size} rank{'s' * (size > 1)} · {str(world.dtype).removeprefix('torch.')}"
    )
    return world


def compute_cleanup(world: World) -> None:
    """Leave the process group, if there is one."""
    if world.size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def _choose_device(device_type: str) -> torch.device:
    import torch

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if device_type and device_type not in available:
        raise UserError(
            f"--device_type={device_type}: this machine has {' and '.join(available)}; name one or leave it out"
        )
    return torch.device(device_type or available[0])


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if not name:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float32
    names = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
    }
    if name not in names:
        raise UserError(f"--dtype={name} is not known; use float32 or bfloat16")
    return names[name]


def _describe(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def peak_memory_mb(device: torch.device) -> float:
    """The most memory so far, in MB: what torch allocated on a GPU, elsewhere what the process held."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def print0(*values: object) -> None:
    """Print on the main rank only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*values, flush=True)


def base_dir() -> Path:
    """The folder of everything that a run makes: NANOCHAT_BASE_DIR, by default ~/.cache/nanochat."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def data_dir() -> Path | None:
    """The folder of local data that NANOCHAT_DATA_DIR names, or None. Raises UserError when it does not exist."""
    name = os.environ.get("NANOCHAT_DATA_DIR")
    if not name:
        return None
    path = Path(name).expanduser()
    if not path.is_dir():
        raise UserError(f"NANOCHAT_DATA_DIR={name} is not a folder; correct it or unset it")
    return path


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts: randomness is a value, the same on every machine, rank and batch shape."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a power cut, sees the old file or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def progress(items: Iterable[Item], *, total: int, description: str) -> Iterator[Item]:
    """Pass `items` on while showing how far we are: a bar on a terminal, else a plain line about every ten seconds."""
    if int(os.environ.get("RANK", 0)) != 0:
        yield from items
    elif sys.stdout.isatty():
        from rich.progress import track

        yield from track(items, total=total, description=description)
    else:
        yield from _plain_progress(items, total, description)


def _plain_progress(items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    began = spoken = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - spoken >= 10 and count < total:
            spoken = now
            left = (now - began) / count * (total - count)
            print(f"{description}: {count:,} of {total:,}, {left:.0f} s left", flush=True)

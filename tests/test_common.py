"""The ground floor: seeds are values, files are whole or absent, devices and dtypes are refused in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanochat.common import UserError, base_dir, compute_init, data_dir, derive_seed, progress, write_atomic


def test_a_seed_is_the_same_everywhere_and_tells_its_parts_apart() -> None:
    assert derive_seed(42, "rl", 7) == 6653433011359432767
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("1") != derive_seed(1)
    assert len({derive_seed(0, i) for i in range(10_000)}) == 10_000
    assert all(0 <= derive_seed(i) < 2**63 for i in range(1000))


def test_write_atomic_leaves_the_old_file_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new folder" / "file.txt"
    write_atomic(path, "old")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_folders_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    assert base_dir() == tmp_path / "base" and base_dir().is_dir()
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    assert data_dir() is None
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="NANOCHAT_DATA_DIR=.*is not a folder"):
        data_dir()


def test_compute_init_gives_fp32_on_cpu_and_refuses_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    world = compute_init("cpu")
    assert (world.rank, world.size, world.main) == (0, 1, True)
    assert (world.device.type, world.dtype) == ("cpu", torch.float32)
    assert compute_init("cpu", "bf16").dtype == torch.bfloat16
    assert world.gather("x") == ["x"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device_type=cuda: this machine has .*cpu"):
        compute_init("cuda")
    with pytest.raises(UserError, match="--dtype=fp8 is not known"):
        compute_init("cpu", "fp8")


def test_progress_passes_everything_on() -> None:
    assert list(progress(iter(range(100)), total=100, description="counting")) == list(range(100))

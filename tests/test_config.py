"""What fingers type becomes a config, and what is wrong is refused in one line that names flag, value and cure."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.config import StageConfig, flag, parse

SCRIPTS = sorted(p.stem for p in Path("scripts").glob("*.py") if "main(cli(Config))" in p.read_text())
WITH_HELP = sorted(p.stem for p in Path("scripts").glob("*.py") if "__main__" in p.read_text())


@dataclass(frozen=True)
class Config(StageConfig):
    """An example."""

    depth: int = 4
    """layers"""
    num_samples: int = flag(16, "--group_size", "-n", help="samples per question")
    lr: float = 0.1
    """rate"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """which"""
    resume: bool = True
    """go on"""
    step: int | None = None
    """which checkpoint"""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"--depth={self.depth}: a model has at least one layer")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--depth=7", {"depth": 7}),
        ("--depth 7", {"depth": 7}),
        ("-- --depth 7", {"depth": 7}),
        ("--num-samples=3", {"num_samples": 3}),
        ("--num_samples 3", {"num_samples": 3}),
        ("--group_size=3", {"num_samples": 3}),
        ("--group-size 3", {"num_samples": 3}),
        ("-n 3", {"num_samples": 3}),
        ("--run - --depth 7", {"run": "-", "depth": 7}),
        ("--lr -1e-3", {"lr": -1e-3}),
        ("--no-resume", {"resume": False}),
        ("--no_resume", {"resume": False}),
        ("--resume=0", {"resume": False}),
        ("--resume False", {"resume": False}),
        ("--resume --depth=2", {"resume": True, "depth": 2}),
        ("--resume=True", {"resume": True}),
        ("--optimizer=Muon", {"optimizer": "muon"}),
        ("--step=5", {"step": 5}),
        ("--run=-x", {"run": "-x"}),
        ("--run=", {"run": ""}),
        ("--seed 1_000", {"seed": 1000}),
    ],
)
def test_every_spelling_is_understood(line: str, expected: dict[str, object]) -> None:
    config = parse(Config, line.split())
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--depht=3", ["--depht", "did you mean --depth"]),
        ("--num_sample=3", ["--num_sample", "did you mean --num_samples"]),
        ("--depth=abc", ["--depth=abc", "whole number", "--depth=4"]),
        ("--depth=1.5", ["--depth=1.5", "whole number"]),
        ("--depth", ["--depth", "needs a value"]),
        ("--depth --lr 1", ["--depth", "needs a value"]),
        ("--optimizer=sgd", ["--optimizer=sgd", "adamw or muon"]),
        ("--lr=fast", ["--lr=fast", "number"]),
        ("--lr=nan", ["--lr=nan", "number"]),
        ("--resume=maybe", ["--resume=maybe", "switch"]),
        ("--depth=0", ["--depth=0", "at least one layer"]),
        ("depth=3", ["depth=3", "flag"]),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(line: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(Config, line.split())
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@given(st.lists(st.text(alphabet="-=_abdehnprtu019. ", max_size=12), max_size=4))
def test_no_command_line_crashes(words: list[str]) -> None:
    if any(word in ("-h", "--help") for word in words):
        return
    try:
        parse(Config, words)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("script", WITH_HELP)
def test_help_of_every_script_is_there_without_torch(script: str) -> None:
    code = (
        f"import sys; sys.argv=['{script}', '--help']\n"
        f"import runpy\ntry:\n    runpy.run_module('scripts.{script}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    assert not end.code, end.code\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout or f"python3 -m scripts.{script}" in done.stdout.replace(
        "python -m", "python3 -m"
    )

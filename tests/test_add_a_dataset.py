"""docs/add_a_dataset.md, followed to the letter in a copy of the repository: files, edits, test, and a tiny step of each stage."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, Block, blocks

PAGE = list(blocks((ROOT / "docs" / "add_a_dataset.md").read_text()))


def commands_of(section: str) -> str:
    """The shell lines of a section of the page."""
    found = [block.text for block in PAGE if block.section == section and block.language == "bash"]
    assert found, f"the page has no commands under {section!r}"
    return "\n".join(found)


def apply(path: Path, block: Block) -> None:
    """Do what a diff block says: its old lines must stand in the file, once, and the new ones take their place."""
    lines = block.text.splitlines()
    assert all(line[:1] in (" ", "-", "+") for line in lines), block.text
    old = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
    new = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
    text = path.read_text()
    assert f"\n{text}".count(f"\n{old}") == 1, f"{path.name} has not exactly one place for\n{block.text}"
    path.write_text(f"\n{text}".replace(f"\n{old}", f"\n{new}")[1:])


def bash(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run shell lines in the copy, as a reader with a home and an environment of his own would."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NANOCHAT_", "AQUA_", "WANDB_", "HF_"))}
    env |= {"HOME": str(folder.parent), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the page's files in it and its edits made."""
    folder = tmp_path_factory.mktemp("home") / "repository"
    for name in ("nanochat", "tasks", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests").mkdir()
    path = None
    for block in PAGE:
        if block.language == "python":
            (named,) = re.findall(r"^`([\w/]+\.py)`:$", block.lead, re.MULTILINE)
            (folder / named).write_text(block.text)
        elif block.language == "diff":
            if named := re.findall(r"^In `([\w/]+\.py)`", block.lead, re.MULTILINE):
                path = folder / named[0]
            assert path is not None
            apply(path, block)
    return folder


def test_the_rows_of_the_page_are_read_and_the_test_of_the_page_passes(copy: Path) -> None:
    assert "2 passed" in bash(commands_of("Test it"), copy).stdout


def test_the_line_of_the_page_is_a_problem() -> None:
    from tasks.problem import parse_problem

    (line,) = (block.text for block in PAGE if block.language == "json")
    problem = parse_problem(json.loads(line))
    assert (problem.gold, problem.gold_option, problem.rationale) == ("B", "3", "6/2=3")


def test_the_drivers_take_the_new_name(copy: Path) -> None:
    asked = re.findall(r"\b([A-Z_]+=\w+)", commands_of("Train it"))
    assert {"RL_DATASET=LARGEST", "EVAL_TASKS=LARGEST"} <= set(asked)
    plan = bash("HF_HUB_OFFLINE=1 RL_DATASET=LARGEST python -m scripts.plan --shell", copy)
    assert "RL_DATASET=LARGEST\n" in plan.stdout


@pytest.mark.slow
def test_a_tiny_step_of_every_stage(copy: Path) -> None:
    bash(commands_of("Test it").splitlines()[0], copy)
    printed = bash(commands_of("Train a tiny step"), copy).stdout
    assert "LARGEST: 2,000 conversations from" in printed
    curves = copy.parent / "largest-tiny" / "runs" / "dummy" / "rl" / "metrics.jsonl"
    rows = [json.loads(line) for line in curves.read_text().splitlines()]
    assert sum("eval/largest_dev_acc" in row for row in rows) == 2
    assert rows[-1]["step"] == 2 and "rl/kl_letter_mean" in rows[-1] and "eval/rotation_acc" in rows[-1]

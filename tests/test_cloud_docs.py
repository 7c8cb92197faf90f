"""Every command in the documents about machines elsewhere: its program exists and takes its flags; the shell ones run."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cloud_fakes import ROOT, repository

from nanochat.config import parse
from nanochat.launch_flags import check, with_any

sys.path.insert(0, str(ROOT))
DOCUMENTS = ("README.md", "QUICKSTART.md", "LAMBDA_MANUAL_SETUP.md")


def commands(document: str) -> list[str]:
    """The lines of the bash blocks, and the commands in tables, without comments."""
    text = (ROOT / document).read_text()
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    lines += re.findall(r"^\|[^|\n]*\| `((?:python|bash|sbatch|sky) [^`]+)`", text, re.MULTILINE)
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


ALL = [(document, command) for document in DOCUMENTS for command in commands(document)]


@pytest.mark.parametrize(
    ("document", "command"), [c for c in ALL if c[1].startswith("python ")], ids=lambda x: x[:60]
)
def test_python_commands_take_their_flags(document: str, command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    words = words[: words.index("&&")] if "&&" in words else words
    name = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
    rest = words[2:] if words[0] == "-m" else words[1:]
    if name == "nanochat.report" or words[0] == "-c":
        return
    config = parse(importlib.import_module(name).Config, with_any(rest))
    if "keep" in {field.name for field in dataclasses.fields(config)}:
        check(config)


@pytest.mark.parametrize(("document", "command"), ALL, ids=lambda x: x[:60])
def test_every_script_that_a_document_names_is_there(document: str, command: str) -> None:
    for script in re.findall(r"(?:bash|nodes=\d) (\S+\.sh)", command):
        assert (ROOT / script).is_file()
    read = subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True)
    assert read.returncode == 0, read.stderr


def test_the_steps_by_hand_work_in_a_home_of_their_own(tmp_path: Path) -> None:
    """The clone, .env and tmux lines of the manual path, with a repository and a tmux of this machine."""
    from cloud_fakes import other_side

    side = other_side(tmp_path / "side")
    url = repository(tmp_path / "repository", "stat -c 'mode %a' .env; echo the driver runs\n")
    lines = commands("LAMBDA_MANUAL_SETUP.md")
    clone, env, start = (
        next(c for c in lines if c.startswith(w)) for w in ("git clone", "(umask", "tmux new")
    )
    script = "\n".join(
        [
            clone.replace("https://github.com/HarleyCoops/nanochatAquaRat.git", f"{url} nanochatAquaRat"),
            env,
            start,
        ]
    )
    assert [c for c in commands("README.md") if c.startswith(("git clone", "(umask", "tmux new"))] == [
        clone,
        env,
        start,
    ]
    done = subprocess.run(
        ["bash", "-ec", script], cwd=side.home, input="WANDB_API_KEY=x\n", text=True, capture_output=True, timeout=30,
        env={**side.environment, "HOME": str(side.home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = side.checkout / "training.log"
    for _ in range(100):
        if log.exists() and "the driver runs" in log.read_text():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert log.read_text() == "mode 600\nthe driver runs\n"

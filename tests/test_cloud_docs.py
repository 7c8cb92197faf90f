"""Every command in the documents about machines elsewhere: its program exists and takes its flags; the shell ones run."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud_fakes import KEY, ROOT, FakeLambda, FastClock, OtherSide, repository
from laptop import GOOD, Laptop, starting

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
        ["bash", "-ec", script], cwd=side.home, input="WANDB_API_KEY=x\n", text=True, capture_output=True, timeout=300,
        env={**side.environment, "HOME": str(side.home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = side.checkout / "training.log"
    for _ in range(1000):
        if log.exists() and "the driver runs" in log.read_text():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert log.read_text() == "mode 600\nthe driver runs\n"


@pytest.fixture
def laptop(tmp_path: Path, side: OtherSide) -> Iterator[tuple[Laptop, FakeLambda]]:
    """A user's machine and the account that it rents from, which must be empty in the end."""
    account = FakeLambda(clock=FastClock(), seconds_between=0.5, keys=("KEY",))
    with account.served():
        ours = {"LAMBDA_API_KEY": KEY, "LAMBDA_API_BASE": account.url}
        yield Laptop(tmp_path / "laptop", side, "", ours, hidden=(KEY,)), account
    assert account.running == [], "a machine was left running"


def run_as_written(laptop: Laptop, command: str, *more: str) -> subprocess.CompletedProcess[str]:
    """A documented command of a launcher, word by word, and `more` flags that point it at this machine."""
    words = shlex.split(command, comments=True)[1:]
    program, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    done = laptop.run(*rest, *more, program=program)
    assert done.returncode == 0, command + done.stderr
    return done


def launcher_commands(document: str) -> list[str]:
    return [c for c in commands(document) if "launch_lambda" in c]


def test_quickstart_on_a_rented_machine(
    tmp_path: Path, laptop: tuple[Laptop, FakeLambda], side: OtherSide
) -> None:
    user, account = laptop
    plan, launch, fetch, terminate = launcher_commands("QUICKSTART.md")
    assert "hours, $" in run_as_written(user, plan).stdout and account.launches == []
    here = starting(tmp_path, GOOD)
    whole = run_as_written(user, launch, *here)
    assert "is terminated" in whole.stderr and account.running == []
    assert account.launches[0]["instance_type_name"] == "gpu_8x_h100_sxm5"
    side.switch_off()
    run_as_written(user, launch.replace(" --terminate-when-done", ""), *here[:1], *here[2:], here[1])
    assert len(account.running) == 1
    assert "fetched to" in run_as_written(user, fetch).stderr
    run_as_written(user, terminate)


def test_lambda_step_by_step(tmp_path: Path, laptop: tuple[Laptop, FakeLambda], side: OtherSide) -> None:
    user, account = laptop
    types, plan, rent, status, logs, fetch, terminate = launcher_commands("LAMBDA_MANUAL_SETUP.md")
    assert "gpu_8x_h100_sxm5" in run_as_written(user, types).stdout
    assert "hours, $" in run_as_written(user, plan).stdout and account.launches == []
    run_as_written(user, rent, "--poll-seconds=2")
    assert len(account.running) == 1 and not side.checkout.exists(), "step 3 is the user's"
    run_as_written(user, terminate)
    again = (
        "python -m scripts.launch_lambda_training"  # the next steps are for runs that the launcher started
    )
    run_as_written(user, again, *starting(tmp_path, GOOD))
    assert "GPU NVIDIA A10" in run_as_written(user, status).stdout
    (side.home / "go").touch()
    assert "== ended with exit code 0" in run_as_written(user, logs).stdout
    assert "fetched to" in run_as_written(user, fetch).stderr
    run_as_written(user, terminate)


def test_readme_launches_and_brings_home(tmp_path: Path, laptop: tuple[Laptop, FakeLambda]) -> None:
    user, account = laptop
    types, launch = launcher_commands("README.md")
    assert "gpu_1x_a10" in run_as_written(user, types).stdout
    done = run_as_written(user, launch, *starting(tmp_path, GOOD))
    assert "is terminated" in done.stderr and len(account.launches) == 1


def test_readme_brings_a_hyperbolic_machines_files_home_by_hand(tmp_path: Path, side: OtherSide) -> None:
    (command,) = re.findall(r"`(rsync -a --partial -e [^`]+)`", (ROOT / "README.md").read_text())
    there = side.home / ".cache" / "nanochat" / "report"
    there.mkdir(parents=True)
    (there / "report.md").write_text("# r")
    # The fake ssh wants a place for the host key; a user's own ssh has ~/.ssh/known_hosts.
    known = f"ssh -o UserKnownHostsFile={tmp_path / 'known'} -p"
    words = command.replace("PORT", "31424").replace("USER@HOST", "ubuntu@127.0.0.1").replace("ssh -p", known)
    env = {**side.environment, "HOME": str(tmp_path / "me")}
    (tmp_path / "me" / ".cache").mkdir(parents=True)
    done = subprocess.run(["bash", "-c", words], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "me" / ".cache" / "nanochat" / "report" / "report.md").read_text() == "# r"
    assert "-p\0" + "31424" in side.argv


def test_errors_that_the_page_explains_are_what_the_code_says() -> None:
    """The left column of the table at the end of LAMBDA_MANUAL_SETUP.md."""
    text = (ROOT / "LAMBDA_MANUAL_SETUP.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|", text, re.M)
    code = " ".join(path.read_text() for path in (ROOT / "nanochat").glob("*.py"))
    assert len(rows) >= 5 and not [row for row in rows if row not in code]

"""
What is decided before anything is rented: the flags that all launchers share, and what they ask for.

    LaunchConfig    the flags; `check` refuses those that contradict one another
    job_of(...)     the repository, branch, driver and session that run on the machine
    most_cents(...) the dearest hour that may be rented, in the providers' cents

Nothing here speaks to a provider.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.cloud_http import cents
from nanochat.common import UserError
from nanochat.remote_job import Job

REPOSITORY = "https://github.com/HarleyCoops/nanochatAquaRat.git"
DIRECTORY = "nanochatAquaRat"
ANY = "any"
WITHOUT_VALUE = ("--status", "--logs", "--fetch", "--terminate", "--attach")


@dataclass(frozen=True)
class LaunchConfig:
    """The flags that all launchers share."""

    max_price: float | None = None
    """most dollars an hour for the whole machine; nothing dearer is launched"""
    wait_for_capacity: bool = False
    """where none is free, ask again every minute until one is; costs nothing"""
    capacity_hours: float = 24.0
    """longest wait for capacity; then nothing has been rented"""
    plan: bool = False
    """say what would be rented, for how long and how many dollars, and rent nothing"""
    auto_start: bool = False
    """start the run script after boot and prove that it runs"""
    inject_env: tuple[str, ...] = ()
    """name of a variable whose value goes over SSH into .env (mode 600); may be repeated, or names with commas"""
    env: tuple[str, ...] = ()
    """NAME=VALUE for the run, nothing secret; may be repeated"""
    repo_url: str = ""
    """what to run; by default this checkout's origin"""
    branch: str = ""
    """branch or tag; by default the repository's own"""
    run_script: str = "run_aquarat_small.sh"
    """the driver"""
    tmux_session: str = "nanochat"
    """name of the tmux session"""
    name: str = "nanochat-aquarat"
    """name of the machine, for people"""
    identity_file: str = ""
    """private key for SSH; by default what ssh itself would take"""
    max_wait_minutes: float = 20.0
    """longest wait for boot and SSH each; then the machine is terminated"""
    poll_seconds: float = 15.0
    """between looks while waiting"""
    skip_wait: bool = False
    """return as soon as the launch is accepted; the machine runs on, unproven"""
    keep: bool = False
    """never terminate by ourselves, also after a failure"""
    terminate_when_done: bool = False
    """stay, wait for the end of the run, fetch, then terminate"""
    max_hours: float | None = None
    """with --terminate-when-done: end it after so many hours, done or not"""
    status: str = ""
    """list the machines, or one by id or name, and how its run does"""
    logs: str = ""
    """follow the log of a machine: id or name, where there are several"""
    fetch: str = ""
    """bring reports and checkpoints home: id or name; goes on where it broke"""
    fetch_to: str = ""
    """folder for --fetch; by default fetched/NAME in the base dir"""
    fetch_optimizer: bool = False
    """fetch optimizer states too, to go on with training at home"""
    terminate: str = ""
    """terminate a machine: id or name"""
    attach: str = ""
    """with --terminate-when-done: a machine that was launched before"""


def with_any(argv: Sequence[str]) -> list[str]:
    """`--status` and the like may stand without a value: the only machine there is."""
    words = list(argv)
    for index, word in enumerate(words):
        alone = index + 1 == len(words) or words[index + 1].startswith("-")
        if word in WITHOUT_VALUE and alone:
            words[index] = f"{word}={ANY}"
    return words


def check(config: LaunchConfig) -> None:
    """Raise UserError for flags that contradict one another."""
    if config.skip_wait and (config.auto_start or config.terminate_when_done):
        raise UserError(
            "--skip-wait returns before there is anything to start on; leave it out, or --auto-start"
        )
    if config.terminate_when_done and not (config.auto_start or config.attach):
        raise UserError("--terminate-when-done waits for the end of a run; add --auto-start, or --attach ID")
    if config.attach and not config.terminate_when_done:
        raise UserError("--attach ends the machine when its run has ended; say so with --terminate-when-done")
    if config.terminate_when_done and config.keep:
        raise UserError("--terminate-when-done and --keep contradict each other; leave one out")
    for flag, value in (
        ("--max-wait-minutes", config.max_wait_minutes),
        ("--poll-seconds", config.poll_seconds),
        ("--capacity-hours", config.capacity_hours),
        ("--max-hours", config.max_hours),
    ):
        if value is not None and not value > 0:
            raise UserError(f"{flag}={value:g} must be above 0")
    most_cents(config)


def most_cents(config: LaunchConfig) -> int | None:
    """--max-price in cents an hour; None where there is no limit."""
    return None if config.max_price is None else cents(config.max_price, "--max-price")


def read_dotenv() -> None:
    """Take .env of the working directory into the environment; what is there already wins."""
    try:
        from dotenv import load_dotenv
    except ImportError:  # a laptop without the packages: the environment alone
        return
    load_dotenv(".env")


def job_of(config: LaunchConfig) -> Job:
    """What is to run on the machine."""
    url = config.repo_url or origin() or REPOSITORY
    return Job(url, config.branch, config.run_script, config.tmux_session, DIRECTORY)


def origin() -> str:
    """This checkout's origin as an address that needs no key, or ''."""
    try:
        done = subprocess.run(
            ["git", "remote", "get-url", "origin"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    url = done.stdout.strip()
    if url.startswith("git@"):
        host, _, path = url.removeprefix("git@").partition(":")
        url = f"https://{host}/{path}"
    return url if url.startswith("https://") and "@" not in url else ""

"""
A training run on another machine: prepare the checkout, hand over the environment, start it in tmux, prove that it runs.

Each step is a script of bash that stands here in full, so that it can be read, linted and run by a test on this machine.
The state of the run is on the other side, in `~/<checkout>/.nanochat-job/`:

    started    the tag of the launch        pid       of the driver
    base       NANOCHAT_BASE_DIR            status    its exit code, once it has ended: the marker

and the log is `~/<checkout>/training.log`. Nothing secret is ever part of a script: `.env` (mode 600) is written from
what follows the script on standard input.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from nanochat.common import UserError
from nanochat.provenance import is_secret
from nanochat.remote import Remote, SshError, run

LOG, STATE, DEFAULT_BASE = "training.log", ".nanochat-job", "~/.cache/nanochat"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def plain(name: str) -> bool:
    """True for a name that can be a folder or a session without quotes, here and there."""
    return PLAIN.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Job:
    """What is to run."""

    repo_url: str
    branch: str
    run_script: str
    session: str
    directory: str

    def __post_init__(self) -> None:
        for flag, value in (("--tmux-session", self.session), ("the checkout's folder", self.directory)):
            if not plain(value):
                raise UserError(f"{flag}={value}: use letters, digits, '-' and '_' only")
        if "@" in self.repo_url.split("://")[-1].split("/")[0] and "://" in self.repo_url:
            raise UserError(
                "--repo-url holds a user or a token; it would stand in logs. Use an address without"
            )
        for flag, value in (
            ("--repo-url", self.repo_url),
            ("--branch", self.branch),
            ("--run-script", self.run_script),
        ):
            if value.startswith("-") or "\n" in value or (not value and flag != "--branch"):
                raise UserError(f"{flag}={value!r} cannot be used; name the real one")


def environment(pairs: tuple[str, ...], injected: tuple[str, ...], ours: Mapping[str, str]) -> dict[str, str]:
    """
    The variables for the other side: K=V of --env, and of --inject-env the names whose values `ours` has.

    Raises UserError for a secret in --env (argv is visible to everybody), a bad name, and a name that `ours` lacks.
    """
    wanted: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not NAME.fullmatch(name):
            raise UserError(f"--env={name}: write --env NAME=VALUE")
        if is_secret(name):
            raise UserError(
                f"--env {name}=...: everybody on this machine can read it; use --inject-env {name}"
            )
        wanted[name] = value
    for name in (part for text in injected for part in text.replace(",", " ").split()):
        if not NAME.fullmatch(name):
            raise UserError(f"--inject-env={name} is not the name of a variable; give names, not values")
        if not ours.get(name):
            raise UserError(
                f"--inject-env={name}: it is not set here; export it or put it into .env, or leave the flag out"
            )
        wanted[name] = ours[name]
    return wanted


def dotenv(variables: Mapping[str, str]) -> bytes:
    """The text of .env, by python-dotenv's rules."""
    lines = []
    for name, value in variables.items():
        if "\n" in value or "\r" in value or "\0" in value:
            raise UserError(f"{name}: a value of more than one line cannot stand in .env")
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"{name}='{quoted}'\n")
    return "".join(lines).encode()


HEAD = 'set -euo pipefail\ncd "$HOME"\n'

PREPARE = """
missing=()
for tool in git tmux curl rsync; do command -v "$tool" >/dev/null || missing+=("$tool"); done
if [ ${#missing[@]} -gt 0 ]; then
  sudo=""
  [ "$(id -u)" = 0 ] || sudo="sudo -n"
  export DEBIAN_FRONTEND=noninteractive
  $sudo apt-get -o DPkg::Lock::Timeout=300 update -qq >/dev/null
  $sudo apt-get -o DPkg::Lock::Timeout=300 install -y -qq "${missing[@]}" >/dev/null
fi
if [ -d "$directory/.git" ]; then
  git -C "$directory" remote set-url origin "$repo_url"
  git -C "$directory" fetch --quiet --depth 1 origin "${branch:-HEAD}"
  git -C "$directory" checkout --quiet --force --detach FETCH_HEAD
else
  git clone --quiet --depth 1 ${branch:+--branch "$branch"} -- "$repo_url" "$directory"
fi
[ -f "$directory/$run_script" ] || { echo "$run_script is not in $repo_url at ${branch:-its default branch}" >&2; exit 66; }
mkdir -p "$directory/$state"
git -C "$directory" rev-parse HEAD
"""

WRITE_ENV = """
umask 077
cd "$directory"
cat >.env.new
chmod 600 .env.new
mv -f .env.new .env
"""

START = """
cd "$directory"
if tmux has-session -t "=$session" 2>/dev/null; then
  echo "a tmux session named $session runs here already" >&2
  exit 65
fi
rm -f "$state/status" "$state/pid"
printf '%s\\n' "${base/#\\~/$HOME}" >"$state/base"
printf '%s\\n' "$launch" >"$state/started"
cat >"$state/run.sh" <<'END'
#!/usr/bin/env bash
# Runs the driver, keeps its log, and leaves its exit code as the marker that it has ended.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NANOCHAT_BASE_DIR=$(cat .nanochat-job/base)
export NANOCHAT_BASE_DIR
status=0
bash "$1" </dev/null >>training.log 2>&1 &
printf '%s\\n' "$!" >.nanochat-job/pid
wait "$!" || status=$?
printf '%s\\n' "$status" >.nanochat-job/status.new
mv -f .nanochat-job/status.new .nanochat-job/status
END
: >"$log"
tmux new-session -d -s "$session" "bash $state/run.sh $quoted_script"
"""

# One line `name value` for each thing that must be true of a run that has started.
CHECK = """
cd "$directory" 2>/dev/null || { echo "checkout no"; exit 0; }
tmux has-session -t "=$session" 2>/dev/null && echo "tmux yes" || echo "tmux no"
pid=$(cat "$state/pid" 2>/dev/null || true)
[ -n "$pid" ] && kill -0 "$pid" 2>/dev/null && echo "driver yes" || echo "driver no"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || gpu=""
echo "gpu ${gpu:-no}"
echo "status $(cat "$state/status" 2>/dev/null || echo running)"
echo "lines $(wc -l <"$log" 2>/dev/null || echo 0)"
"""

TAIL = """
cd "$directory" && tail -n "$count" "$log"
"""

BASE = """
base=$(cat "$directory/$state/base" 2>/dev/null || printf '%s' "$HOME/.cache/nanochat")
mkdir -p "$base"  # a run that failed early made nothing, which is no reason for rsync to fail
printf '%s\\n' "$base"
"""

FOLLOW = """
cd "$directory"
tail -n 100 -F "$log" 2>/dev/null & tail=$!
trap 'kill $tail 2>/dev/null' EXIT
while [ ! -e "$state/status" ]; do
  kill -0 $PPID 2>/dev/null || exit 0
  tmux has-session -t "=$session" 2>/dev/null || { sleep 2; [ -e "$state/status" ] || { echo "the session $session is gone"; exit 1; }; }
  sleep 2
done
sleep 1
echo "== ended with exit code $(cat "$state/status")"
"""


def script(body: str, **values: str | int) -> str:
    """`body` with `values` as quoted variables before it."""
    lines = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items())
    return HEAD + lines + body


def prepare(remote: Remote, job: Job) -> str:
    """Install what is missing and check the branch out; the commit."""
    text = script(
        PREPARE, repo_url=job.repo_url, branch=job.branch, directory=job.directory, run_script=job.run_script, state=STATE
    )  # fmt: skip
    return run(remote, text, seconds=1200).strip().splitlines()[-1]


def hand_over(remote: Remote, job: Job, variables: Mapping[str, str]) -> None:
    """Write .env on the other side, readable by its owner alone; the values go through standard input."""
    run(remote, script(WRITE_ENV, directory=job.directory), more_input=dotenv(variables))


def start(remote: Remote, job: Job, launch: str, base: str = DEFAULT_BASE) -> None:
    """Start the driver in tmux, with everything that it makes under `base`."""
    text = script(
        START, directory=job.directory, session=job.session, launch=launch, base=base, state=STATE, log=LOG,
        quoted_script=shlex.quote(job.run_script),
    )  # fmt: skip
    run(remote, text)


@dataclass(frozen=True, slots=True)
class Sign:
    """What a look at the run finds."""

    tmux: bool
    driver: bool
    gpu: str
    status: int | None
    """exit code, None while it runs"""
    num_lines: int

    @property
    def alive(self) -> bool:
        return self.tmux and self.driver

    @property
    def ended(self) -> bool:
        return self.status is not None


def look(remote: Remote) -> Sign:
    """Ask for every sign of life at once."""
    text = script(CHECK, directory=remote.directory, session=remote.session, state=STATE, log=LOG)
    answer = run(remote, text, seconds=120)
    found = dict(line.split(" ", 1) for line in answer.splitlines() if " " in line)
    if found.get("checkout") == "no" or "status" not in found:
        raise SshError(f"{remote.address}: there is no ~/{remote.directory} there; was --auto-start given?")
    status = found["status"]
    return Sign(
        tmux=found.get("tmux") == "yes",
        driver=found.get("driver") == "yes",
        gpu="" if found.get("gpu", "no") == "no" else found["gpu"],
        status=int(status) if status.strip().isdigit() else None,
        num_lines=int(found.get("lines", "0").strip() or 0),
    )


def last_lines(remote: Remote, count: int = 15) -> str:
    """The end of the log."""
    return run(remote, script(TAIL, directory=remote.directory, log=LOG, count=count), seconds=120)


def base_of(remote: Remote) -> str:
    """The run's NANOCHAT_BASE_DIR on the other side."""
    return run(remote, script(BASE, directory=remote.directory, state=STATE), seconds=120).strip()


def follow_script(remote: Remote) -> str:
    """A script that passes the log on until the run has ended."""
    return script(FOLLOW, directory=remote.directory, session=remote.session, log=LOG, state=STATE)

"""
A rented machine over SSH: run a script on it, hand it secrets, read its log, bring files home.

Commands travel as a script on standard input, never as words: what stands in argv is visible to everybody on either
machine. The host key is taken at first contact and pinned for this machine alone, in a known_hosts file of its own,
because rented addresses are handed on from one stranger to the next. `ssh` and `rsync` are the system's own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.cloud import Instance, say
from nanochat.cloud_http import REAL_CLOCK, Clock, CloudError
from nanochat.common import UserError, base_dir, write_atomic

CONNECT_SECONDS = 15
NO_CONNECTION = 255  # what ssh itself exits with, whatever the command would have said


class SshError(CloudError):
    """ssh, rsync or the script on the other side failed."""


@dataclass(frozen=True, slots=True)
class Remote:
    """Where and how to reach one machine. Kept on disk beside its host key, so that a later command finds it."""

    provider: str
    instance_id: str
    name: str
    address: str
    port: int
    user: str
    identity_file: str = ""
    directory: str = "nanochatAquaRat"
    session: str = "nanochat"
    tag: str = ""

    @property
    def folder(self) -> Path:
        return machines_folder(self.provider) / self.instance_id

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def pinned(self) -> bool:
        """True when the host key is known."""
        return self.known_hosts.is_file() and bool(self.known_hosts.read_text().strip())

    def save(self) -> None:
        """Write machine.json. It holds no secret: the identity is a path."""
        write_atomic(self.folder / "machine.json", json.dumps(asdict(self), indent=1) + "\n")

    def ssh_options(self) -> list[str]:
        """Options for ssh and for rsync's ssh."""
        options = {
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes" if self.pinned else "accept-new",
            "HashKnownHosts": "no",
            "BatchMode": "yes",
            "ConnectTimeout": str(CONNECT_SECONDS),
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "4",
            "ForwardAgent": "no",
            "LogLevel": "ERROR",
        }
        if self.identity_file:
            options["IdentitiesOnly"] = "yes"
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return [*words, *(["-i", self.identity_file] if self.identity_file else []), "-p", str(self.port)]

    @property
    def host(self) -> str:
        return f"{self.user}@{self.address}"

    def command(self) -> str:
        """What a person types to get there."""
        return shlex.join(["ssh", *self.ssh_options(), self.host])


def machines_folder(provider: str) -> Path:
    """Where the machines of a provider are remembered."""
    return base_dir() / "cloud" / provider


def remembered(provider: str) -> list[Remote]:
    """The machines that were launched or attached to from here."""
    found = []
    for path in sorted(machines_folder(provider).glob("*/machine.json")):
        try:
            found.append(Remote(**json.loads(path.read_text())))
        except (ValueError, TypeError):
            say(f"{path} is damaged and left out; remove it")
    return found


def reach(instance: Instance, provider: str, *, identity_file: str, directory: str, session: str) -> Remote:
    """How to reach an active machine, remembered."""
    need("ssh")
    if identity_file and not Path(identity_file).expanduser().is_file():
        raise UserError(
            f"--identity-file={identity_file} is not a file; name the private half of the SSH key"
        )
    remote = Remote(
        provider=provider,
        instance_id=instance.id,
        name=instance.name,
        address=instance.address,
        port=instance.port,
        user=instance.user,
        identity_file=str(Path(identity_file).expanduser()) if identity_file else "",
        directory=directory,
        session=session,
        tag=instance.tag,
    )
    remote.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    remote.save()
    return remote


def need(tool: str) -> None:
    """Raise UserError unless the system has `tool`."""
    if shutil.which(tool) is None:
        raise UserError(
            f"{tool} is missing on this machine; install it, for example: sudo apt-get install {tool}"
        )


def run(remote: Remote, script: str, *, seconds: float = 600, more_input: bytes = b"") -> str:
    """
    Run `script` with bash on the other side and return its standard output; its errors pass through to ours.

    `more_input` follows the script on standard input, for a script that reads it: the way of secrets.
    Raises SshError with the exit status.
    """
    # `bash -s` would read the script as it goes and a command in it could swallow the rest; so it is read whole first.
    size = len(script.encode())
    reader = f'script=$(head -c {size}); exec bash -c "$script"'
    try:
        done = subprocess.run(
            ["ssh", *remote.ssh_options(), remote.host, reader],
            input=script.encode() + more_input, capture_output=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SshError(f"{remote.address}: no end within {seconds:.0f} seconds", "timeout") from None
    errors = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        what = "ssh cannot connect" if done.returncode == NO_CONNECTION else f"exit status {done.returncode}"
        raise SshError(
            f"{remote.address}: {what}: {_tail(errors or done.stdout.decode(errors='replace'))}",
            str(done.returncode),
        )
    if errors:
        say(errors)
    return done.stdout.decode(errors="replace")


def _tail(text: str, lines: int = 8) -> str:
    return "\n    ".join(text.strip().splitlines()[-lines:]) or "it says nothing"


def wait_for_ssh(
    remote: Remote, *, max_wait_seconds: float, poll_seconds: float, clock: Clock = REAL_CLOCK
) -> None:
    """Wait until the machine lets us in, and pin its host key. Raises SshError when time is up."""
    deadline = clock.monotonic() + max_wait_seconds
    while True:
        try:
            run(remote, "true", seconds=4 * CONNECT_SECONDS)
            if not remote.pinned:
                raise SshError(f"{remote.address}: ssh wrote no host key to {remote.known_hosts}")
            return
        except SshError as error:
            if "REMOTE HOST IDENTIFICATION HAS CHANGED" in str(error) or "Host key verification" in str(
                error
            ):
                raise SshError(
                    f"{remote.address}: its host key is not the one seen first; somebody may be in between. {error}"
                ) from None
            if clock.monotonic() >= deadline:
                raise SshError(f"{error}; is the SSH key the right one? (--identity-file)") from None
        clock.sleep(poll_seconds)


def follow(remote: Remote, script: str) -> int:
    """Run `script` with its output passed straight on, until it ends or Ctrl-C; its exit status."""
    size = len(script.encode())
    reader = f'script=$(head -c {size}); exec bash -c "$script"'
    running = subprocess.Popen(["ssh", *remote.ssh_options(), remote.host, reader], stdin=subprocess.PIPE)
    assert running.stdin is not None
    try:
        running.stdin.write(script.encode())
        running.stdin.close()
        return running.wait()
    except BrokenPipeError:
        return running.wait()
    except KeyboardInterrupt:
        running.terminate()
        running.wait()
        return 130


def fetch(
    remote: Remote,
    source: str,
    target: Path,
    *,
    patterns: Sequence[str] = (),
    attempts: int = 5,
    clock: Clock = REAL_CLOCK,
) -> None:
    """
    Bring a folder home with rsync. What is here already is not sent again, and a broken transfer goes on where it broke.

    `source` is relative to the home of the other side; `patterns` are rsync's filter rules. Raises SshError.
    """
    need("rsync")
    target.mkdir(parents=True, exist_ok=True)
    shell = shlex.join(["ssh", *remote.ssh_options()])
    rules = [f"--filter={pattern}" for pattern in patterns]
    flags = [
        "-rlt",
        "--partial-dir=.rsync-partial",
        "--delay-updates",
        "--prune-empty-dirs",
        "--safe-links",
        "--timeout=120",
    ]
    show = ["--info=progress2"] if sys.stderr.isatty() else []
    command = [
        "rsync",
        *flags,
        *show,
        *rules,
        "-e",
        shell,
        f"{remote.host}:{source.rstrip('/')}/",
        f"{target}/",
    ]
    for attempt in range(1, attempts + 1):
        done = subprocess.run(
            command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, env={**os.environ, "LC_ALL": "C"}
        )
        if done.returncode == 0:
            return
        why = _tail(done.stderr)
        if attempt == attempts or done.returncode in (1, 2, 3, 4):
            raise SshError(
                f"rsync from {remote.address} failed ({done.returncode}): {why}", str(done.returncode)
            )
        say(f"rsync: {why}; going on where it broke ({attempt} of {attempts})")
        clock.sleep(min(60.0, 5.0 * 2 ** (attempt - 1)))

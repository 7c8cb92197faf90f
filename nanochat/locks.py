"""
One run at a time in one directory: two that write the same checkpoints or the same metrics would spoil both.

The lock is the kernel's (flock), so it is gone with its process however that ends, kill -9 and power cuts included, and there
is nothing to clean up. The file only says who holds it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import IO, Any

from nanochat.common import UserError, base_dir, print0

PATIENCE_SECONDS = 10.0
"""A run whose driver was killed needs a moment to save and leave."""


@contextmanager
def exclusive(name: str, what: str, *, patience: float | None = None) -> Iterator[None]:
    """Hold the lock `name` of this base dir. Raises UserError when another process keeps it for `patience` seconds.

    `what` stands in the message: `run aquarat, stage base`.
    """
    try:
        import fcntl
    except ImportError:  # not Unix; nanochat trains elsewhere
        yield
        return
    path = base_dir() / "locks" / f"{name}.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + (PATIENCE_SECONDS if patience is None else patience)
        waiting = False
        while not _taken(fcntl, file):
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{what} is in use by {_holder(file)}; stop that one, or give this one another name"
                )
            if not waiting:
                print0(f"{what} is in use by {_holder(file)}; waiting a few seconds for it")
            waiting = True
            time.sleep(0.1)
        file.seek(0)
        file.truncate()
        json.dump(_about_us(), file)
        file.flush()
        yield


def _taken(fcntl: Any, file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        print0(f"warning: {file.name} cannot be locked ({error.strerror}): do not run the same stage twice")
    return True


def _about_us() -> dict[str, Any]:
    # Not the command: its flags may hold what should not stand in a message of another run.
    since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        about = json.loads(file.read())
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

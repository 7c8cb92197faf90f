"""
Being asked to stop. SIGTERM (a rented box that is taken back) and SIGINT (Ctrl-C) finish the step, save, and exit with 75.

75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on. A second signal exits at once, with what
was saved before. That holds while the main thread computes or waits for another rank: Python's own handlers run
only between two of its instructions, so here a thread reads the signals from the pipe that Python's C handler writes to.

Who loses its parent is asked to stop as well: ranks whose torchrun was killed would train on unseen, and hold the run
directory against the next attempt.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from nanochat.common import UserError, print0

EXIT_STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
REFUSALS = 4


class Stopped(SystemExit):
    """The run was asked to stop, has saved, and can be gone on with: exit code 75."""

    def __init__(self, text: str) -> None:
        super().__init__(EXIT_STOPPED)
        self.text = text

    def __str__(self) -> str:
        return self.text


class StopRequests:
    """While entered, remembers the first SIGTERM or SIGINT, and exits at the second. In the main thread only."""

    def __init__(self) -> None:
        self.received = ""
        """name of the first signal; '' before there is one"""
        self._writer = -1
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._before = {number: signal.signal(number, _nothing) for number in SIGNALS}
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer < 0:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)  # ends the thread
        self._writer = -1

    def _watch(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] not in SIGNALS:
                continue
            if self.received:
                os.write(2, b"a second signal: exiting at once, without saving\n")
                os._exit(128 + number[0])
            self.received = signal.Signals(number[0]).name
            print0(f"{self.received}: finishing this step, then saving; a second one exits at once")
        os.close(reader)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Python must have a handler, or the signal does what it does by default."""


def stop_with_parent() -> None:
    """Send ourselves SIGTERM when whoever launched us is gone: torchrun, or the shell driver ($DRIVER_PID)."""
    parent, driver = os.getppid(), os.environ.get("DRIVER_PID", "")
    launched = "TORCHELASTIC_RUN_ID" in os.environ

    def watch() -> None:
        while not (launched and os.getppid() != parent) and not (driver.isdecimal() and _gone(int(driver))):
            time.sleep(1)
        print("who launched this process is gone; stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    if launched or driver:
        threading.Thread(target=watch, daemon=True).start()


def check_launcher(*, patience_seconds: float = 20.0) -> None:
    """Raise UserError when the torchrun that launched us died before `stop_with_parent`; torch would call it for minutes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + patience_seconds
    refusals = 0
    while True:
        try:
            socket.create_connection(address, timeout=patience_seconds).close()
            return
        except OSError as error:
            # Its store was there before it started us: a host that is up and refuses has lost it for good.
            refusals = refusals + 1 if isinstance(error, ConnectionRefusedError) else 0
            if time.monotonic() > deadline or refusals >= REFUSALS:
                raise UserError(
                    f"torchrun, which launched this rank, does not answer at {address[0]}:{address[1]} ({error}); "
                    "it was killed, or another node cannot be reached; start the job again"
                ) from None
        time.sleep(0.5)


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False

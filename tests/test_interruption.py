"""Signals: the first lets a step finish, the second ends at once; whoever loses its launcher stops; locks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.interruption import EXIT_STOPPED, Stopped, StopRequests, check_launcher
from nanochat.locks import exclusive

WORKER = """
import hashlib, sys, time
from nanochat.interruption import Stopped, StopRequests, stop_with_parent
stop_with_parent()
with StopRequests() as requests:
    print("ready", flush=True)
    if sys.argv[1] == "stuck":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, as waiting for another rank is
    while not requests.received:
        time.sleep(0.01)
    print("finished the step", flush=True)
    raise Stopped("saved")
"""


def start(kind: str, launcher: list[str] | None = None, **environment: str) -> subprocess.Popen[str]:
    path = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [*(launcher or []), sys.executable, "-c", WORKER, kind],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_the_step_finish_and_the_exit_code_says_so(number: signal.Signals) -> None:
    process = start("steps")
    process.send_signal(number)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_STOPPED == 75
    assert "finished the step" in printed and number.name in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_exits_at_once_even_out_of_a_c_call(number: signal.Signals) -> None:
    process = start("stuck")
    process.send_signal(number)
    assert process.stdout is not None and process.stdout.readline().startswith(f"{number.name}: finishing")
    assert process.poll() is None, "the first one waits for the step"
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)  # the call in C takes longer
    assert process.returncode == 128 + signal.SIGTERM and "without saving" in error


def test_handlers_are_as_before_afterwards_and_a_thread_may_enter_as_well() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 120
        while not requests.received and time.monotonic() < deadline:
            time.sleep(0.01)
        assert requests.received == "SIGTERM"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    inside: list[str] = []

    def enter() -> None:
        with StopRequests() as other:
            inside.append(other.received)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [""]


def test_a_stop_is_an_exit_with_its_own_code_and_its_reason() -> None:
    stopped = Stopped("after step 3")
    assert isinstance(stopped, SystemExit) and stopped.code == 75 and str(stopped) == "after step 3"


def test_who_loses_its_driver_stops() -> None:
    driver = subprocess.Popen(["sleep", "600"])
    process = start("steps", DRIVER_PID=str(driver.pid))
    assert process.poll() is None
    driver.kill()
    driver.wait()
    printed, error = process.communicate(timeout=300)
    assert process.returncode == 75 and "finished the step" in printed and "is gone" in error


def test_a_rank_whose_launcher_died_before_it_looked_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launcher(patience_seconds=0)  # nobody launched us
    with socket.create_server(("127.0.0.1", 0)) as store:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(store.getsockname()[1]))
        check_launcher(patience_seconds=60)
    with pytest.raises(
        UserError, match=r"torchrun, which launched this rank, does not answer at 127\.0\.0\.1:"
    ):
        check_launcher()  # which does not need its patience: nobody else will listen there


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


HOLDER = """
import time
from nanochat.locks import exclusive
with exclusive("base-d8", "base d8"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.usefixtures("base")
def test_a_second_run_is_refused_by_name_and_a_killed_one_holds_nothing() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], env=env, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        with (
            pytest.raises(
                UserError, match=f"^base d8 is in use by process {holder.pid} on .*; stop that one"
            ),
            exclusive("base-d8", "base d8", patience=0.2),
        ):
            pass
        with exclusive("base-d4", "base d4", patience=0):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with exclusive("base-d8", "base d8", patience=0):
        pass


@pytest.mark.usefixtures("base")
def test_who_leaves_in_time_is_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive("rl-d8", "rl d8"):
            entered.set()
            leave.wait(120)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(120)
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (leave.set(), pause(seconds)))  # once it is waited for
    with exclusive("rl-d8", "rl d8", patience=120):
        assert "waiting a few seconds" in capsys.readouterr().out
    thread.join()

"""Model-written programs: what succeeds, what fails, and what is contained."""

from __future__ import annotations

import os
import sys
import threading
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.execution import MAX_OUTPUT_BYTES
from nanochat.execution import run_program as run_program_in_time

# A crowded machine may start an interpreter in seconds; what is to run into the limit names a shorter one.
run_program = partial(run_program_in_time, timeout=60.0)

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limits differ")


def test_a_program_that_runs_to_its_end_succeeds() -> None:
    result = run_program("import sys\nprint('out')\nprint('err', file=sys.stderr)\nassert 1 + 1 == 2")
    assert result.success and result.exit_code == 0 and not result.timed_out
    assert (result.stdout, result.stderr) == ("out\n", "err\n")


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("assert 1 + 1 == 3", "AssertionError"),
        ("1/0", "ZeroDivisionError"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(3)", ""),
        ("import sys; sys.exit(0)", ""),
        ("import os; os._exit(0)", ""),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("\x00", "SyntaxError"),
        ("'\ud800'", "SyntaxError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ""),
        ("raise MemoryError", "MemoryError"),
        ("input()", "EOFError"),
        ("import program", "ModuleNotFoundError"),
    ],
)
def test_everything_else_fails_and_says_why(code: str, word: str) -> None:
    result = run_program(code)
    assert not result.success and not result.timed_out
    assert word in result.stderr


def test_a_program_is_the_main_module_of_its_own() -> None:
    code = """
from __future__ import annotations
import pickle, sys, typing
from dataclasses import dataclass
@dataclass
class Point:
    x: "Other"
class Other: ...
assert __name__ == "__main__" and sys.argv == ["program.py"]
assert typing.get_type_hints(Point)["x"] is Other
assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
assert "limit" not in globals() and "main" not in globals()
if __name__ == "__main__":
    print("main")
"""
    assert run_program(code).stdout == "main\n"


def test_a_program_that_loops_is_stopped_in_time() -> None:
    for timeout in (
        0.7,
        5.0,
        50.0,
    ):  # on a crowded machine the interpreter may still be starting when the first is over
        result = run_program("print('began', flush=True)\nwhile True: pass", timeout=timeout)
        assert result.timed_out and not result.success
        if result.stdout:
            break
    assert result.stdout == "began\n"


def test_a_program_that_sleeps_is_stopped_in_time() -> None:
    assert run_program("import time; time.sleep(60)", timeout=0.5).timed_out


@linux
def test_memory_is_bounded() -> None:
    result = run_program("x = bytearray(2**30)", memory_bytes=256 * 2**20)
    assert not result.success and result.memory_exceeded


def test_output_without_end_is_cut_and_ends_the_program() -> None:
    result = run_program("while True: print('y' * 1000)", timeout=60)
    assert not result.success and not result.timed_out
    assert len(result.stdout) == MAX_OUTPUT_BYTES


def test_a_file_may_not_fill_the_disk() -> None:
    result = run_program("open('big', 'wb').write(bytes(10**8))")
    assert not result.success and "File too large" in result.stderr


@linux
@pytest.mark.parametrize(
    "code",
    [
        "import os\nfor _ in range(3): os.fork()",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import subprocess; subprocess.run(['sleep', '0'])",
        "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join(); assert p.exitcode == 0",
        "import threading; threading.Thread(target=print).start()",
    ],
)
def test_no_further_process_or_thread_can_be_started(code: str) -> None:
    result = run_program(code)
    assert not result.success and not result.timed_out


@linux
def test_limits_cannot_be_raised_again() -> None:
    code = "import resource\nfor name in ('AS', 'NPROC', 'FSIZE', 'CPU', 'NOFILE'):\n"
    code += "    number = getattr(resource, 'RLIMIT_' + name)\n"
    code += "    try: resource.setrlimit(number, (2**40, 2**40))\n"
    code += "    except ValueError: continue\n    raise AssertionError(name)\n"
    result = run_program(code)
    # Where the kernel gives no user namespace, root stays root.
    assert result.success or (os.geteuid() == 0 and not result.network_blocked)


@linux
def test_there_is_no_network_where_the_kernel_allows_that() -> None:
    code = "import socket\ntry: socket.create_connection(('127.0.0.1', PORT), timeout=2)\n"
    code += "except OSError: print('none')\nelse: print('connected')"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        result = run_program(code.replace("PORT", str(server.getsockname()[1])))
    assert result.stdout == ("none\n" if result.network_blocked else "connected\n")


def test_the_environment_holds_no_key_and_the_folder_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "marked-fake-key")
    result = run_program("import os, sys; print(dict(os.environ), os.listdir('.'), sys.path)")
    assert result.success
    assert "marked-fake-key" not in result.stdout and "['program.py']" in result.stdout
    assert os.getcwd() not in result.stdout.split("['program.py']")[1].split(", ")[0]


def test_what_a_program_writes_is_gone_afterwards() -> None:
    folder = run_program("import os; open('left', 'w').write('x'); print(os.getcwd())").stdout.strip()
    assert folder and not os.path.exists(folder)


def test_it_runs_from_a_thread_and_many_at_once() -> None:
    results = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(run_program(f"print({n})"))) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.stdout.strip() for result in results) == [str(n) for n in range(6)]
    assert all(result.success for result in results)


def test_no_file_descriptor_is_left_open() -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    run_program("pass")
    before = set(os.listdir("/proc/self/fd"))
    for code in ("pass", "1/0", "import time; time.sleep(9)", "'\ud800'") * 2:
        run_program(code, timeout=0.4)
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1, "the listing itself is one"


@pytest.mark.parametrize("limits", [{"timeout": 0.0}, {"timeout": -1.0}, {"memory_bytes": 0}], ids=str)
def test_limits_that_mean_nothing_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(UserError, match="above 0"):
        run_program("pass", **limits)  # type: ignore[arg-type]


@settings(max_examples=10, deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_a_result(text: str) -> None:
    result = run_program(text)
    assert isinstance(result.success, bool)

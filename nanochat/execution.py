"""
Run a Python program that a model wrote, in a child process with limits, and say what became of it.

This is NOT a security sandbox. It protects a benchmark from programs that are wrong: that loop, fork, eat memory, fill
the disk, print without end, write into the working directory or phone home by mistake. A program that means harm
can still read every file that you can. Run HumanEval on a machine that holds nothing dear.

The child is a fresh interpreter (`-I`: no PYTHON* variables, no user packages, no working directory on the path) with
an environment of its own, so no key of yours is in it, in a temporary directory that is deleted afterwards and a
session of its own, so that whatever it started is killed with it. Before the program's first line the child limits its
CPU seconds, address space, file size, open files and processes, and leaves the network by entering an empty network
namespace where the kernel lets it (`ExecutionResult.network_blocked` says so). No preexec_fn: it may deadlock in a process
that has threads, and torch has.

Success means that the program ran past its last line. `sys.exit(0)` before the tests is not success; the child
reports the end through a pipe, because an exit code cannot tell the two apart.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nanochat.common import UserError

MAX_OUTPUT_BYTES = 64 * 1024  # of each stream, returned; more is dropped
MAX_FILE_BYTES = 8 * 2**20  # of any file, the streams included
MAX_OPEN_FILES = 64

# Runs in the child. argv: pipe, word to say at the end, CPU seconds, bytes of memory, bytes of a file, open files.
CHILD = """
def forbid_processes(libc):
    # RLIMIT_NPROC does not bind root. A seccomp filter does: clone, fork, vfork and clone3 fail with EAGAIN.
    import ctypes, os, struct
    numbers = {"x86_64": (56, 57, 58, 435), "aarch64": (220, 435)}.get(os.uname().machine, ())
    steps = [(0x20, 0, 0, 0)]  # load the number of the system call
    steps += [(0x15, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]  # equal: go to the end
    steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | 11)]  # allow; fail
    program = b"".join(struct.pack("HBBI", *step) for step in steps)
    text = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(text)))
    libc.prctl(22, 2, header)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

def limit(cpu, memory, file, files):
    import ctypes, sys
    blocked = False
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: do not outlive the parent
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        # CLONE_NEWUSER | CLONE_NEWNET: a user namespace makes the empty network possible without being root,
        # and takes away root's privilege to raise limits.
        blocked = libc.unshare(0x10000000 | 0x40000000) == 0 or libc.unshare(0x40000000) == 0
        forbid_processes(libc)
    import resource
    for name, value in (("CPU", cpu), ("AS", memory), ("FSIZE", file), ("NOFILE", files), ("NPROC", 0), ("CORE", 0)):
        number = getattr(resource, "RLIMIT_" + name, None)
        if number is not None:
            hard = resource.getrlimit(number)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(number, (value, value))
            except (ValueError, OSError):  # macOS refuses some
                pass
    return blocked

def main():
    import os, sys
    pipe, word, *numbers = sys.argv[1:]
    pipe = int(pipe)
    os.set_inheritable(pipe, False)
    os.write(pipe, b"1" if limit(*map(int, numbers)) else b"0")
    with open("program.py", "rb") as file:
        source = file.read()
    sys.argv = ["program.py"]
    names = sys.modules["__main__"].__dict__
    del names["forbid_processes"], names["limit"], names["main"]
    exec(compile(source, "program.py", "exec", dont_inherit=True), names)
    os.write(pipe, word.encode())

main()
"""


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """What became of a program."""

    success: bool
    """It ran past its last line, within its limits."""
    stdout: str
    stderr: str
    timed_out: bool
    exit_code: int
    """As the shell has it; negative: the number of the signal that ended it."""
    network_blocked: bool
    """The kernel gave it a network namespace of its own, which is empty."""
    seconds: float

    @property
    def memory_exceeded(self) -> bool:
        return not self.success and self.stderr.rstrip().rpartition("\n")[2].startswith("MemoryError")


def run_program(code: str, *, timeout: float = 5.0, memory_bytes: int = 512 * 2**20) -> ExecutionResult:
    """Run `code` as a script of its own, at most `timeout` seconds, in at most `memory_bytes` of address space."""
    if os.name != "posix":
        raise UserError(
            f"programs are run on Linux and macOS only, and this is {sys.platform}: it has no limits to set"
        )
    if not timeout > 0 or memory_bytes < 1:
        raise UserError(f"timeout={timeout} and memory_bytes={memory_bytes} must both be above 0")
    try:
        source = code.encode()
    except UnicodeEncodeError as error:  # lone surrogates: no Python file can hold them
        return ExecutionResult(False, "", f"SyntaxError: {error}", False, 1, False, 0.0)
    with (
        tempfile.TemporaryDirectory(prefix="nanochat-run-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        Path(folder, "program.py").write_bytes(source)
        word = secrets.token_hex(16)
        limits = [int(timeout) + 1, memory_bytes, MAX_FILE_BYTES, MAX_OPEN_FILES]
        reader, writer = os.pipe()
        try:
            command = [sys.executable, "-I", "-c", CHILD, str(writer), word, *map(str, limits)]
            began = time.monotonic()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=_environment(folder),
                pass_fds=[writer],
                start_new_session=True,
            )
            timed_out = _wait(process, timeout)
            seconds = time.monotonic() - began
            os.set_blocking(reader, False)
            report = _read_pipe(reader)
        finally:
            os.close(reader)
            os.close(writer)
        success = report[1:] == word.encode() and process.returncode == 0 and not timed_out
        return ExecutionResult(
            success, _text(out), _text(err), timed_out, process.returncode, report[:1] == b"1", seconds
        )


def _environment(folder: str) -> dict[str, str]:
    """Nothing of ours but the path; one thread, since threads count as processes."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, **threads}


def _wait(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Wait, then kill the whole session; whether the time ran out."""
    timed_out = False
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:  # also when we are interrupted; and what the program left running goes with it
        # Gone already is fine; macOS says so with EPERM.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return timed_out


def _read_pipe(reader: int) -> bytes:
    try:
        return os.read(reader, 1024)
    except BlockingIOError:
        return b""


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MAX_OUTPUT_BYTES).decode(errors="replace")

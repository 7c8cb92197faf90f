"""
Agreement among the nodes of one run, for scripts/pipeline.sh. Node 0 decides, the others learn of it.

    python -m scripts.nodes NAME -- VALUE            every node prints node 0's VALUE
    python -m scripts.nodes NAME --run -- COMMAND    node 0 runs COMMAND; every node exits with its exit code
    python -m scripts.nodes leave -- WHY             another node gives up: node 0 hears why at its next meeting, and ends

NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say who is who; the meeting place is MASTER_PORT + 1, since torchrun has
MASTER_PORT. Nothing is kept on disk, so an earlier attempt cannot be mistaken for this one, and the others wait on an open
connection: when node 0 dies it breaks, and they end within a minute instead of waiting at a price. Plain sockets and no
torch, because this runs before every stage.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

from nanochat.common import UserError

MEETING_SECONDS = 1800.0  # nodes boot and install at their own pace
LATER_SECONDS = 120.0  # once all have met, nobody is that far behind: who does not come is dead
GONE_SECONDS = 60.0  # longest that node 0 takes from one meeting to the next
AGAIN, LEAVE = "again", "leave"


def patience(name: str) -> float:
    """Seconds to wait for the others; the first meeting of a run is called nodes."""
    return MEETING_SECONDS if name == "nodes" else LATER_SECONDS


def lead(name: str, words: list[str], *, run: bool, size: int, host: str, port: int) -> tuple[str, int]:
    """Node 0: do it, and tell every other node; (what was said, exit code). Raises UserError when they do not come."""
    # The kernel takes connections from here on, also while the command runs.
    with socket.create_server(
        (host if host in ("127.0.0.1", "localhost") else "", port), backlog=size + 8
    ) as server:
        server.settimeout(patience(name))
        status = subprocess.run(words, stdin=subprocess.DEVNULL).returncode if run else 0
        answer = str(status) if run else " ".join(words)
        missing = set(range(1, size))
        while missing:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise UserError(f"nodes {missing} did not come to {name}; are they alive?") from None
            with connection:
                connection.settimeout(30)
                asked, rank, why = _question(connection)
                if asked == LEAVE:
                    raise UserError(f"node {rank} gave up before {name}: {why}")
                # Another name is a node that is ahead of us: its meeting is the next.
                known = asked == name and rank in missing
                try:
                    connection.sendall(f"{'=' + answer if known else AGAIN}\n".encode())
                except OSError:  # it hung up; a live one comes again
                    continue
                if known:
                    missing.discard(rank)
    return answer, status


def follow(name: str, *, rank: int, host: str, port: int) -> str:
    """Another node: what node 0 says. Raises UserError when it never comes, or is gone."""
    deadline = time.monotonic() + patience(name)
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=10) as connection:
                connection.settimeout(None)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.sendall(f"{name} {rank}\n".encode())
                answer = _line(connection)
                if answer.startswith("="):
                    return answer[1:]
                if answer != AGAIN:  # it hung up: dead, or between two meetings
                    deadline = min(deadline, time.monotonic() + GONE_SECONDS)
        except ConnectionResetError:
            deadline = min(deadline, time.monotonic() + GONE_SECONDS)
        except OSError:
            pass  # nobody is there yet
        time.sleep(0.2)
    raise UserError(f"node {rank}: node 0 at {host}:{port} is gone or never came to {name}; see its log")


def leave(why: str, *, rank: int, host: str, port: int) -> None:
    """Tell node 0 that this node gives up, so that it need not wait at a price; nothing where it never meets again."""
    deadline = time.monotonic() + LATER_SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=10) as connection:
                connection.sendall(f"{LEAVE} {rank} {' '.join(why.split())}\n".encode())
                connection.settimeout(GONE_SECONDS)
                if not _line(connection):  # node 0 takes it without an answer
                    return
        except OSError:
            pass
        time.sleep(0.2)


def _question(connection: socket.socket) -> tuple[str, int, str]:
    """(name, rank, why) of what a node asks; ("", -1, "") of anything else that comes to a port."""
    try:
        name, rank, *why = _line(connection).split(" ", 2)
        return name, int(rank), "".join(why)
    except (OSError, ValueError):
        return "", -1, ""


def _line(connection: socket.socket) -> str:
    """One line, '' where the other side hangs up or says nothing in time."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < 65536:
            block = connection.recv(4096)
            if not block:
                return ""
            data += block
    except TimeoutError:
        return ""
    return data.decode(errors="replace").rstrip("\n")


def main(argv: list[str]) -> int:
    """Parse, agree, print."""
    if "--" not in argv[1:]:
        if {"-h", "--help"} & set(argv):
            print((__doc__ or "").strip())
            return 0
        print("error: -- is missing; write NAME -- VALUE, as --help shows", file=sys.stderr)
        return 2
    name, split, env = argv[0], argv.index("--"), os.environ
    words, run = argv[split + 1 :], "--run" in argv[1:split]
    rank, size = int(env.get("NODE_RANK", "0")), int(env.get("NNODES", "1"))
    host, port = env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", "29500")) + 1
    try:
        if name == LEAVE:
            leave(" ".join(words), rank=rank, host=host, port=port)
            return 0
        if rank == 0:
            answer, status = lead(name, words, run=run, size=size, host=host, port=port)
        else:
            answer = follow(name, rank=rank, host=host, port=port)
            status = int(answer) if run else 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not run:
        print(answer)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

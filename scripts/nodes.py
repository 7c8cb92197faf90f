"""
Agreement among the nodes of one run, for scripts/pipeline.sh. Node 0 decides, the others learn of it.

    python -m scripts.nodes NAME -- VALUE            every node prints node 0's VALUE
    python -m scripts.nodes NAME --run -- COMMAND    node 0 runs COMMAND; every node exits with its exit code

NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say who is who; the meeting place is MASTER_PORT + 1, since torchrun has
MASTER_PORT. Nothing is kept on disk, so an earlier attempt cannot be mistaken for this one, and a node that dies is
noticed at once, by the connection that breaks: it must not leave the others waiting at a price.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

from nanochat.common import UserError

MEETING_SECONDS = 1800  # nodes boot and install at their own pace
STAGE_HOURS = 48


def agree(
    name: str, words: list[str], *, run: bool, rank: int, size: int, host: str, port: int
) -> tuple[str, int]:
    """(what node 0 says, exit code). Raises UserError when the others do not come, or are gone."""
    import torch.distributed as dist

    if rank == 0:
        store = dist.TCPStore(host, port, size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=MEETING_SECONDS))  # fmt: skip
        status = subprocess.run(words, stdin=subprocess.DEVNULL).returncode if run else 0
        answer = " ".join(words) if not run else str(status)
        store.set(name, answer)
        for other in range(1, size):
            store.get(f"{name}/{other}")  # until every node has read it; then the meeting place may go
        return answer, status
    try:
        store = dist.TCPStore(host, port, size, is_master=False, timeout=timedelta(seconds=MEETING_SECONDS))
        store.set_timeout(timedelta(hours=STAGE_HOURS))
        answer = store.get(name).decode()
        store.set(f"{name}/{rank}", "read")
    except (RuntimeError, ConnectionError) as error:
        raise UserError(
            f"node {rank}: node 0 at {host}:{port} is gone or never came ({type(error).__name__}); see its log"
        ) from None
    return answer, int(answer) if run else 0


def main(argv: list[str]) -> int:
    """Parse, agree, print."""
    name, split = argv[0], argv.index("--")
    env = os.environ
    try:
        answer, status = agree(
            name,
            argv[split + 1 :],
            run="--run" in argv[1:split],
            rank=int(env.get("NODE_RANK", "0")),
            size=int(env.get("NNODES", "1")),
            host=env.get("MASTER_ADDR", "127.0.0.1"),
            port=int(env.get("MASTER_PORT", "29500")) + 1,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if "--run" not in argv[1:split]:
        print(answer)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

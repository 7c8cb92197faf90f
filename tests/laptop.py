"""The user's own machine in tests of the launchers: runs our commands against a served account and a fake ssh."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from cloud_fakes import ROOT, OtherSide, fast_python, repository

SECRET = "wandb-secret-0123456789"
GOOD = """#!/usr/bin/env bash
echo "the driver runs in $PWD"
stat -c 'mode %a' .env
grep -c WANDB_API_KEY .env
mkdir -p "$NANOCHAT_BASE_DIR/report" "$NANOCHAT_BASE_DIR/chatrl_checkpoints/d2" "$NANOCHAT_BASE_DIR/base_data"
echo "# report" >"$NANOCHAT_BASE_DIR/report/report.md"
echo weights >"$NANOCHAT_BASE_DIR/chatrl_checkpoints/d2/model_000003.pt"
echo optim >"$NANOCHAT_BASE_DIR/chatrl_checkpoints/d2/optim_000003_rank0.pt"
echo shard >"$NANOCHAT_BASE_DIR/base_data/shard_00000.parquet"
until [ -e "$HOME/go" ]; do sleep 0.05; done  # see NVIDIA_GOES
echo "the end"
"""
# Its last words are no whole line, so at no moment does it look like a run that has started and goes on.
BAD = "printf 'CUDA error: no'; exit 7\n"
LONG = "echo 'the driver runs'; sleep 600\n"


class Laptop:
    """Runs our commands as a user would; nothing that they print may hold a secret."""

    def __init__(
        self, home: Path, side: OtherSide, program: str, ours: dict[str, str], *, hidden: tuple[str, ...]
    ) -> None:
        self.home, self.side, self.program, self.ours = home, side, program, ours
        self.hidden = (SECRET, *hidden)
        self.home.mkdir()

    def environment(self, **more: str) -> dict[str, str]:
        foreign = ("WANDB", "LAMBDA", "HYPERBOLIC", "NANOCHAT")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        ours = {"NANOCHAT_BASE_DIR": str(self.home), "WANDB_API_KEY": SECRET, "PYTHONPATH": str(ROOT)}
        return {**kept, **self.side.environment, **ours, **self.ours, **more}

    def run(self, *words: str, program: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            fast_python(program or self.program, *words),
            cwd=ROOT, env=self.environment(**more), capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        for text in (done.stdout, done.stderr):
            assert not [secret for secret in self.hidden if secret in text]
        return done

    def terminated_once_launched(self, *words: str) -> tuple[int, str]:
        """SIGTERM to the launcher as soon as it has rented a machine: its exit code, and what it printed from then on."""
        running = subprocess.Popen(
            fast_python(self.program, *words),
            cwd=ROOT,
            env=self.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert running.stderr is not None
        for line in running.stderr:
            if ": launched " in line:
                break
        running.terminate()
        _, rest = running.communicate(timeout=600)
        return running.returncode, rest


def starting(tmp_path: Path, driver: str) -> list[str]:
    """Flags that start `driver` from a repository of its own."""
    url = repository(tmp_path / "repository", driver)
    return ["--auto-start", f"--repo-url={url}", "--poll-seconds=2", "--max-wait-minutes=6"]

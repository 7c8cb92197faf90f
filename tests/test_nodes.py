"""Several machines, played by processes on this one: they agree, work together, and stop together."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from test_drivers import ROOT, bash, dry_run, environment, flag, write_driver

TOGETHER = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
open({out!r} + os.environ["RANK"], "w").write(f"{{total.item():.0f}} of {{dist.get_world_size()}}")
dist.destroy_process_group()
"""


def free_port() -> int:
    """A port with a free neighbour."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def two_nodes(
    tmp_path: Path, body: str, *, shared: bool = True, **more: str
) -> list[subprocess.CompletedProcess[str]]:
    """`body` as a driver on two nodes at once."""
    driver, port = write_driver(tmp_path, 'die() { say "error: $*"; exit 1; }\n' + body), str(free_port())
    text = driver.read_text()
    driver.write_text(text.replace("RUN=r1\n", 'RUN=r1\ndie() { say "error: $*"; exit 1; }\n', 1))
    package = tmp_path / "fake"
    (package / "together.py").write_text(TOGETHER.format(out=str(tmp_path / "rank")))
    nodes = []
    for rank in ("0", "1"):
        where = {} if shared else {"NANOCHAT_BASE_DIR": str(tmp_path / f"base{rank}")}
        env = environment(
            tmp_path, NNODES="2", NODE_RANK=rank, MASTER_PORT=port, NPROC="1", PRESET="lite", **where, **more
        )
        env["OMP_NUM_THREADS"] = "1"
        nodes.append(
            subprocess.Popen(
                ["bash", driver], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    done = []
    for node in nodes:
        out, err = node.communicate(timeout=240)
        done.append(subprocess.CompletedProcess([], node.returncode, out, err))
    return done


PIPE = """
need one after= single one
need together after=one ranks together
need two after=together single two
"""


def test_two_nodes_share_the_work_and_a_second_run_skips_it(tmp_path: Path) -> None:
    for node in two_nodes(tmp_path, PIPE):
        assert node.returncode == 0, node.stdout + node.stderr
    assert (tmp_path / "ran").read_text().split() == ["one", "two"], "single stages run on node 0 alone"
    for rank in "01":
        assert (tmp_path / f"rank{rank}").read_text() == "3 of 2"
    for node in two_nodes(tmp_path, PIPE):
        assert node.returncode == 0 and node.stdout.count("finished earlier") == 3, node.stdout + node.stderr
    assert (tmp_path / "ran").read_text().split() == ["one", "two"]


def test_a_failure_on_node_0_ends_both(tmp_path: Path) -> None:
    nodes = two_nodes(tmp_path, "need bad after= single bad\nneed one after=bad single one\n")
    assert [node.returncode for node in nodes] == [1, 1]
    assert all("stage bad failed with exit code 1" in node.stderr for node in nodes)
    assert not (tmp_path / "ran").exists()


@pytest.mark.long
def test_storage_that_is_not_shared_is_found_out_first(tmp_path: Path) -> None:
    nodes = two_nodes(tmp_path, PIPE, shared=False)
    assert nodes[1].returncode == 1 and "put it on shared storage" in nodes[1].stderr
    assert nodes[0].returncode == 1 and "did not come" in nodes[0].stderr, "node 0 must not wait at a price"


def test_the_dry_run_shows_torchrun_on_every_node(tmp_path: Path) -> None:
    _, commands = dry_run(tmp_path, gpus=8, NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    base = commands["base_train"]
    assert base.startswith(
        "torchrun --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=29500 --nproc_per_node=8 -m scripts.base_train"
    )
    _, alone = dry_run(tmp_path, gpus=8)
    assert flag(base, "total_batch_size") == flag(alone["base_train"], "total_batch_size")
    tokens = int(flag(base, "device_batch_size")) * int(flag(base, "max_seq_len")) * 16
    assert int(flag(base, "total_batch_size")) % tokens == 0
    assert "scripts.nodes tok_train --run -- python -m scripts.tok_train" in commands["tok_train"]
    wrong = bash("bash run_aquarat_small.sh", environment(tmp_path, NNODES="3", DRY_RUN="1"))
    assert wrong.returncode == 2 and "NNODES=3 does not divide" in wrong.stderr


def test_slurm_starts_one_driver_a_node(tmp_path: Path) -> None:
    env = environment(tmp_path, SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_ID="77", SLURM_NNODES="2", RUN_SCRIPT=str(tmp_path / "driver.sh"))  # fmt: skip
    tools = tmp_path / "bin"
    (tools / "scontrol").write_text("#!/bin/sh\necho n1; echo n2\n")
    (tools / "srun").write_text('#!/bin/bash\nshift\nfor n in 0 1; do SLURM_NODEID=$n "$@"; done\n')
    for name in ("scontrol", "srun"):
        (tools / name).chmod(0o755)
    (tmp_path / "driver.sh").write_text('echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT"\n')
    done = bash(f"bash {ROOT}/scripts/slurm.sh", env)
    assert done.stdout.splitlines() == ["2 0 n1 20154", "2 1 n1 20154"], done.stderr


def test_sky_yaml_runs_what_is_here_and_cannot_be_left_running() -> None:
    text = (ROOT / "sky.yaml").read_text()
    task = yaml.safe_load(text)
    assert task["resources"]["autostop"] == {"idle_minutes": 10, "down": True}
    assert {c["infra"] for c in task["resources"]["any_of"]} == {
        "lambda",
        "runpod",
        "aws",
        "gcp",
        "kubernetes",
    }
    assert task["secrets"] == {"WANDB_API_KEY": ""}, "no value of a secret stands in a file"
    for script in re.findall(r"bash (\S+\.sh)", task["run"]):
        assert (ROOT / script).is_file()
    read = subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True)
    assert read.returncode == 0, read.stderr


@pytest.mark.long
def test_the_whole_pipeline_on_two_nodes_of_loopback(tmp_path: Path) -> None:
    port, nodes = str(free_port()), []
    for rank in ("0", "1"):
        env = environment(tmp_path, RUN="two", NO_INSTALL="1", NNODES="2", NODE_RANK=rank, MASTER_PORT=port, NPROC="1", WANDB_MODE="disabled")  # fmt: skip
        out = (tmp_path / f"node{rank}").open("w")
        nodes.append(
            subprocess.Popen(["bash", "run_aquarat_lite.sh"], cwd=ROOT, env=env, stdout=out, stderr=out)
        )
        out.close()
    codes = [node.wait(timeout=1500) for node in nodes]
    assert codes == [0, 0], (tmp_path / "node0").read_text()[-3000:] + (tmp_path / "node1").read_text()[
        -2000:
    ]
    for folder in ("base", "mid", "chatsft", "chatrl"):
        tag = tmp_path / "base" / f"{folder}_checkpoints" / "d2"
        assert list(tag.glob("optim_*_rank1.pt")), f"{folder}: the second node saved its share"
    os.unlink(ROOT / "report.md") if (ROOT / "report.md").exists() else None

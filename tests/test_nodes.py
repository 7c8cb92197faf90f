"""Several machines, played by processes on this one: they agree, work together, and stop together."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml
from test_drivers import ROOT, bash, dry_run, environment, flag, write_driver

from nanochat.common import UserError
from scripts import nodes as nodes_script

# The lite preset with fewer steps still: what takes the time is starting two agents and two processes for each stage.
FEW_STEPS = {
    "BASE_ITERATIONS": "2", "DRILL_ITERATIONS": "1", "MID_ITERATIONS": "2", "SFT_ITERATIONS": "2", "RL_STEPS": "1",
    "SAVE_EVERY": "-1", "EVAL_EVERY": "-1", "RL_EVAL_EVERY": "-1", "KL_EVERY": "1", "ATTN_EVERY": "1",
    "EVAL_EXAMPLES": "4", "EVAL_TASKS": "SYNTHETIC", "EVAL_MODE": "letters", "MAX_NEW_TOKENS": "16",
    "TOK_MAX_CHARS": "100000", "SYNTHETIC_EXAMPLES": "32", "OTHER_EXAMPLES": "8",
}  # fmt: skip

TOGETHER = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
open({out!r} + os.environ["RANK"], "w").write(f"{{total.item():.0f}} of {{dist.get_world_size()}}")
dist.destroy_process_group()
"""


def free_port() -> int:
    """A port with a free neighbour, below those that the kernel gives to whoever connects to something meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000, 2)
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
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
    return finished(nodes, 900)


def finished(nodes: list[subprocess.Popen[str]], seconds: float) -> list[subprocess.CompletedProcess[str]]:
    """Wait for all of them; none outlives the test, whatever happens."""
    done = []
    try:
        for node in nodes:
            out, err = node.communicate(timeout=seconds)
            done.append(subprocess.CompletedProcess([], node.returncode, out, err))
    finally:
        for node in nodes:
            node.kill()
            node.wait()
            for pipe in (node.stdout, node.stderr):
                if pipe is not None:
                    pipe.close()
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


def test_storage_that_is_not_shared_is_found_out_first(tmp_path: Path) -> None:
    began = time.monotonic()
    nodes = two_nodes(tmp_path, PIPE, shared=False)
    assert nodes[1].returncode == 1 and "put it on shared storage" in nodes[1].stderr
    assert nodes[0].returncode == 1 and "node 1 gave up before aqua: node 1 does not see" in nodes[0].stderr
    assert time.monotonic() - began < nodes_script.LATER_SECONDS, "node 0 must not wait at a price"
    assert not (tmp_path / "ran").exists()


def meeting(
    *others: str, size: int = 2, seconds: float = 120.0, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, int]:
    """Node 0's meeting `here`, to which `others` send their lines."""
    monkeypatch.setattr(nodes_script, "LATER_SECONDS", seconds)
    port = free_port()

    def come() -> None:
        for line in others:
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
                        connection.sendall(line.encode())
                        connection.recv(100)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)

    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    try:
        return nodes_script.lead("here", ["yes"], run=False, size=size, host="127.0.0.1", port=port)
    finally:
        thread.join(120)


def test_strangers_and_nodes_that_are_ahead_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("GET / HTTP/1.1\n", "\n", "there 1\n", "here x\n", "here 0\n", "here 1\n")
    assert meeting(*lines, monkeypatch=monkeypatch) == ("yes", 0)


def test_a_node_that_does_not_come_or_gives_up_ends_the_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in (0.3, 3.0, 30.0):  # on a crowded machine the first may be over before node 1 has come
        with pytest.raises(UserError, match=r"nodes \{(1, )?2\} did not come to here") as missed:
            meeting("here 1\n", size=3, seconds=seconds, monkeypatch=monkeypatch)
        if "{2}" in str(missed.value):
            break
    assert "nodes {2} did not come to here" in str(missed.value)
    with pytest.raises(UserError, match="node 2 gave up before here: no disk there"):
        meeting("here 1\n", "leave 2 no disk there\n", size=3, monkeypatch=monkeypatch)


def test_giving_up_reaches_node_0_at_whatever_meeting_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    leaver = threading.Thread(target=nodes_script.leave, args=("no  disk\n",), kwargs={"rank": 1, "host": "127.0.0.1", "port": port})  # fmt: skip
    leaver.start()
    time.sleep(0.5)  # nobody is there yet
    with pytest.raises(UserError, match="node 1 gave up before later: no disk"):
        nodes_script.lead("later", ["yes"], run=False, size=3, host="127.0.0.1", port=port)
    leaver.join(120)
    assert not leaver.is_alive()


def test_a_node_0_that_dies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection breaks in the middle of a meeting."""
    monkeypatch.setattr(nodes_script, "GONE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def dies() -> None:
            connection, _ = server.accept()
            connection.recv(100)
            connection.close()
            server.close()

        thread = threading.Thread(target=dies)
        thread.start()
        with pytest.raises(UserError, match="node 0 at 127.0.0.1:.* is gone or never came to stage"):
            nodes_script.follow("stage", rank=1, host="127.0.0.1", port=port)
        thread.join(120)


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
    (tools / "scontrol").write_text("#!/bin/sh\necho n1; sleep 0.2; echo n2\n")
    (tools / "srun").write_text('#!/bin/bash\nshift\nfor n in 0 1; do SLURM_NODEID=$n "$@"; done\n')
    for name in ("scontrol", "srun"):
        (tools / name).chmod(0o755)
    (tmp_path / "driver.sh").write_text('echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT"\n')
    done = bash(f"bash {ROOT}/scripts/slurm.sh", env)
    assert done.stdout.splitlines() == ["2 0 n1 20154", "2 1 n1 20154"], done.stderr


def test_a_tilde_that_no_shell_expanded_is_the_home(tmp_path: Path) -> None:
    """SkyPilot quotes what stands under envs; Python would read the tilde, so the drivers must too."""
    env = environment(tmp_path, NO_INSTALL="1", HOME=str(tmp_path), AQUA_DATA_DIR="~")
    env["NANOCHAT_BASE_DIR"] = yaml.safe_load((ROOT / "sky.yaml").read_text())["envs"]["NANOCHAT_BASE_DIR"]
    done = bash('source scripts/setup.sh; echo "$NANOCHAT_BASE_DIR $AQUA_DATA_DIR"', env)
    assert done.stdout.split() == [f"{tmp_path}/nanochat", str(tmp_path)], done.stderr


# Keys of SkyPilot's YAML specification (docs.skypilot.co/en/latest/reference/yaml-spec.html), as far as a task may use them.
SKY_TASK = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run", "config"}  # fmt: skip
SKY_RESOURCES = {
    "infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size", "disk_tier",
    "network_tier", "ports", "image_id", "labels", "any_of", "ordered", "job_recovery", "autostop",
}  # fmt: skip


def test_sky_yaml_has_only_documented_keys_and_resumes_from_a_bucket() -> None:
    text = (ROOT / "sky.yaml").read_text()
    task = yaml.safe_load(text)
    assert set(task) <= SKY_TASK and set(task["resources"]) <= SKY_RESOURCES
    for choice in task["resources"]["any_of"]:
        assert set(choice) <= SKY_RESOURCES
    assert set(task["resources"]["job_recovery"]) <= {"strategy", "max_restarts_on_errors"}
    # The mount for spot machines stands there as a comment, since Lambda and RunPod refuse it: uncommented it must be right.
    commented = re.search(r"^# file_mounts:\n(?:#  .*\n)+", text, re.M)
    assert commented is not None
    mounts = yaml.safe_load(re.sub(r"^# ?", "", commented[0], flags=re.M))["file_mounts"]
    assert mounts == {task["envs"]["NANOCHAT_BASE_DIR"]: {"source": "gs://NAME", "mode": "MOUNT_CACHED"}}


def test_what_sky_yaml_runs_starts_the_driver_on_every_node_and_uploads_once(tmp_path: Path) -> None:
    task = yaml.safe_load((ROOT / "sky.yaml").read_text())
    (tmp_path / "scripts").mkdir()
    (tmp_path / "run_aquarat_small.sh").write_text('echo "driver $NNODES $NODE_RANK $MASTER_ADDR"\n')
    (tmp_path / "scripts" / "upload_to_gcs.sh").write_text('echo "upload $*"\n')
    said = []
    for rank, bucket in (("0", "gs://b"), ("1", "gs://b"), ("0", "")):
        env = {
            **environment(tmp_path), **task["envs"], "BUCKET": bucket, "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": rank, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n",
        }  # fmt: skip
        done = bash(task["run"], env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    (tmp_path / "run_aquarat_small.sh").write_text("exit 7\n")
    assert bash(task["run"], env | {"BUCKET": "gs://b"}, cwd=tmp_path).returncode == 7, (
        "not hidden by the upload"
    )
    upload = "upload --bucket gs://b --run-name aquarat-small --yes"
    assert said == [["driver 2 0 10.0.0.1", upload], ["driver 2 1 10.0.0.1"], ["driver 2 0 10.0.0.1"]]


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
    port, nodes, logs = str(free_port()), [], [tmp_path / "node0", tmp_path / "node1"]
    for rank, log in enumerate(logs):
        env = environment(
            tmp_path, RUN="two", NO_INSTALL="1", NNODES="2", NODE_RANK=str(rank), MASTER_PORT=port, NPROC="1",
            WANDB_MODE="disabled", OMP_NUM_THREADS="1", **FEW_STEPS,
        )  # fmt: skip
        with log.open("w") as out:
            nodes.append(
                subprocess.Popen(
                    ["bash", "run_aquarat_lite.sh"], cwd=ROOT, env=env, stdout=out, stderr=out, text=True
                )
            )
    done = finished(nodes, 1500)
    said = [log.read_text() for log in logs]
    assert [node.returncode for node in done] == [0, 0], said[0][-3000:] + said[1][-2000:]
    assert "all stages finished" in said[0] and said[0].count("cpu (1 threads) · 2 ranks") == 9, (
        "ranks work together"
    )
    assert [text.count(": finished in ") for text in said] == [12, 12], "both go through every stage"
    for folder in ("base", "mid", "chatsft", "chatrl"):
        tag = tmp_path / "base" / f"{folder}_checkpoints" / "d2"
        assert list(tag.glob("optim_*_rank1.pt")), f"{folder}: the second node saved its share"
    (ROOT / "report.md").unlink(missing_ok=True)

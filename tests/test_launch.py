"""The launchers as a user runs them: a served account on one side, a home folder behind a fake ssh on the other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cloud_fakes import COUNT, KEY, NVIDIA, ROOT, FakeLambda, FastClock, OtherSide, fast_python
from laptop import BAD, GOOD, LONG, SECRET, Laptop, starting
from test_nodes import free_port

from nanochat.common import UserError
from nanochat.launch_flags import with_any
from nanochat.remote_job import Job, dotenv, environment


@pytest.fixture
def fake() -> Iterator[FakeLambda]:
    """A served account in real time that must be empty of machines when the test ends."""
    account = FakeLambda(clock=FastClock(), seconds_between=0.5)
    with account.served():
        yield account
    assert account.running == [], "a machine was left running"


@pytest.fixture
def laptop(tmp_path: Path, fake: FakeLambda, side: OtherSide) -> Laptop:
    return Laptop(
        tmp_path / "laptop", side, "scripts.launch_lambda_training",
        {"LAMBDA_API_KEY": KEY, "LAMBDA_API_BASE": fake.url}, hidden=(KEY, "jupyter-secret"),
    )  # fmt: skip


def started(tmp_path: Path, driver: str) -> list[str]:
    """Flags that start `driver`."""
    return ["--ssh-key-name=laptop", *starting(tmp_path, driver)]


def no_secret_anywhere(fake: FakeLambda, side: OtherSide) -> None:
    """The key of W&B went over standard input and nowhere else."""
    assert SECRET in side.stdin
    assert SECRET not in side.argv
    assert not any(SECRET in repr(request) for request in fake.requests)


# ---- the whole way


def test_launch_start_prove_wait_fetch_terminate(tmp_path: Path, laptop: Laptop, fake: FakeLambda, side: OtherSide) -> None:  # fmt: skip
    words = started(tmp_path, GOOD)
    done = laptop.run(
        *words, "--inject-env=WANDB_API_KEY", "--env", "DEPTH=2", "--region=auto", "--terminate-when-done"
    )
    assert done.returncode == 0, done.stderr
    order = [
        "renting 1x A10", "launched", "active", "host key is pinned", "checked out", "wrote .env (mode 600)",
        "tmux, driver and NVIDIA A10 are alive", "the driver runs in", "ended with exit code 0", "fetched to", "is terminated",
    ]  # fmt: skip
    places = [done.stderr.index(text) for text in order]
    assert places == sorted(places), done.stderr
    no_secret_anywhere(fake, side)
    assert "mode 600" in (side.checkout / "training.log").read_text()
    assert "DEPTH='2'" in (side.checkout / ".env").read_text()
    home = laptop.home / "fetched" / "nanochat-aquarat"
    assert (home / "report" / "report.md").read_text() == "# report\n"
    assert (home / "checkout" / "training.log").read_text().endswith("the end\n")
    assert (home / "chatrl_checkpoints" / "d2" / "model_000003.pt").is_file()
    assert not list(home.rglob("optim_*")) and not (home / "base_data").exists()
    assert "NOT WHOLE" in done.stderr, "a torn checkpoint is called one"


def test_the_simple_launcher_and_the_commands_it_prints(tmp_path: Path, laptop: Laptop, fake: FakeLambda, side: OtherSide) -> None:  # fmt: skip
    (side.bin / "nvidia-smi").write_text(NVIDIA)
    done = laptop.run(*started(tmp_path, GOOD), "--region=us-west-1", program="launch_lambda.py")
    assert done.returncode == 0, done.stderr
    no_secret_anywhere(fake, side)
    assert fake.launches[0]["region_name"] == "us-west-1"
    commands = re.findall(r"python launch_lambda\.py (--\w+=\w+)", done.stdout)
    assert [c.split("=")[0] for c in commands] == ["--logs", "--fetch", "--terminate"]
    status = laptop.run("--status", program="launch_lambda.py")
    assert "driver True" in status.stdout and "1 running, $0.75 an hour" in status.stdout
    (side.home / "go").touch()
    logs = laptop.run(commands[0], program="launch_lambda.py")
    assert logs.returncode == 0 and "the end" in logs.stdout and "ended with exit code 0" in logs.stdout
    fetched = laptop.run("--fetch", "--fetch-optimizer", program="launch_lambda.py")
    assert fetched.returncode == 0, fetched.stderr
    assert list((laptop.home / "fetched").rglob("optim_000003_rank0.pt"))
    ended = laptop.run("--terminate", program="launch_lambda.py")
    assert ended.returncode == 0 and "is terminated" in ended.stderr
    again = laptop.run("--terminate", program="launch_lambda.py")
    assert again.returncode == 1 and "there is none" in again.stderr


def test_fetch_goes_on_where_the_cable_broke(laptop: Laptop, side: OtherSide, fake: FakeLambda) -> None:
    assert laptop.run("--ssh-key-name=laptop", "--poll-seconds=2").returncode == 0
    weights = os.urandom(3_000_000)
    folder = side.home / ".cache" / "nanochat" / "chatrl_checkpoints" / "d2"
    folder.mkdir(parents=True)
    (folder / "model_000003.pt").write_bytes(weights)
    (side.checkout / ".nanochat-job").mkdir(parents=True)
    (side.log / "count").write_text(COUNT)
    (side.log / "cut").write_text("2000000")
    done = laptop.run("--fetch")
    assert done.returncode == 0 and "going on where it broke (1 of 5)" in done.stderr, done.stderr
    fetched = laptop.home / "fetched" / "nanochat-aquarat" / "chatrl_checkpoints" / "d2" / "model_000003.pt"
    assert fetched.read_bytes() == weights
    first, second, *_ = (int(line) for line in (side.log / "received").read_text().split())
    assert first == 2_000_000 and second < 1_300_000, "what had come was not sent again"
    (side.log / "received").unlink()
    assert laptop.run("--fetch").returncode == 0
    assert sum(int(line) for line in (side.log / "received").read_text().split()) < 10_000
    assert laptop.run("--terminate").returncode == 0


def test_logs_follow_a_run_while_it_runs(tmp_path: Path, laptop: Laptop, side: OtherSide, fake: FakeLambda) -> None:  # fmt: skip
    driver = "echo first; while [ ! -e go ]; do sleep 0.1; done; echo second; exit 4\n"
    assert laptop.run(*started(tmp_path, driver)).returncode == 0
    words = fast_python("scripts.launch_lambda_training", "--logs")
    following = subprocess.Popen(words, cwd=ROOT, env=laptop.environment(), stdout=subprocess.PIPE, text=True)
    assert following.stdout is not None
    assert following.stdout.readline() == "first\n"
    assert not (side.checkout / ".nanochat-job" / "status").exists(), "it comes while the run runs"
    (side.checkout / "go").touch()
    rest, _ = following.communicate(timeout=600)
    assert rest == "second\n== ended with exit code 4\n" and following.returncode == 0
    assert laptop.run("--terminate").returncode == 0


def test_a_launch_whose_answer_is_lost_on_the_way(laptop: Laptop, fake: FakeLambda) -> None:
    """The connection breaks after the deed: a real one, under a real client; the tag finds the machine."""
    fake.lost_launches = 1
    done = laptop.run("--poll-seconds=2")
    assert done.returncode == 0 and "the request left and no answer came" in done.stderr, done.stderr
    assert len(fake.launches) == 1 and len(fake.running) == 1
    assert laptop.run("--terminate").returncode == 0


def test_attach_waits_for_a_run_that_was_started_before(
    tmp_path: Path, laptop: Laptop, fake: FakeLambda
) -> None:
    assert laptop.run(*started(tmp_path, GOOD)).returncode == 0
    refused = laptop.run("--attach")
    assert refused.returncode != 0 and "say so with --terminate-when-done" in refused.stderr
    done = laptop.run("--attach", "--terminate-when-done", "--poll-seconds=2")
    assert done.returncode == 0 and "ended with exit code 0" in done.stderr, done.stderr
    assert (laptop.home / "fetched" / "nanochat-aquarat" / "report" / "report.md").is_file()


def test_whoever_stops_watching_is_told_that_it_costs_money(tmp_path: Path, laptop: Laptop, fake: FakeLambda) -> None:  # fmt: skip
    words = fast_python("scripts.launch_lambda_training", *started(tmp_path, LONG), "--terminate-when-done")
    running = subprocess.Popen(words, cwd=ROOT, env=laptop.environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("end it"):
            break
    running.terminate()
    _, rest = running.communicate(timeout=600)
    (machine,) = fake.running
    assert running.returncode == 143 and "the run goes on and costs money" in rest
    assert f"--attach={machine} --terminate-when-done" in rest
    assert laptop.run("--terminate").returncode == 0


def test_branch_script_session_and_image_are_what_was_asked_for(tmp_path: Path, laptop: Laptop, fake: FakeLambda, side: OtherSide) -> None:  # fmt: skip
    words = started(tmp_path, BAD)
    repository = tmp_path / "repository"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "checkout", "--quiet", "-b", "other"], cwd=repository, check=True)
    (repository / "mine.sh").write_text("echo mine runs; sleep 600\n")
    for command in (["add", "."], ["commit", "--quiet", "-m", "x"], ["checkout", "--quiet", "main"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    done = laptop.run(
        *words,
        "--branch=other",
        "--run-script=mine.sh",
        "--tmux-session=mine",
        "--image-id=image-7",
        "--name=m",
    )
    assert done.returncode == 0 and "mine runs" in done.stderr, done.stderr
    assert fake.launches[0]["image"] == {"id": "image-7"} and fake.launches[0]["name"] == "m"
    assert (side.home / ".session-mine").exists()
    both = laptop.run("--image-id=a", "--image-family=b")
    assert both.returncode != 0 and "leave one out" in both.stderr and len(fake.launches) == 1
    assert laptop.run("--terminate=m").returncode == 0


def test_list_types_shows_cents_as_dollars(laptop: Laptop, fake: FakeLambda) -> None:
    fake.capacity["gpu_8x_h100_sxm5"] = []
    done = laptop.run("--list-types", program="launch_lambda.py")
    assert re.search(r"gpu_1x_a10 +1 +\$0\.75  us-east-1, us-west-1", done.stdout)
    assert re.search(r"gpu_8x_h100_sxm5 +8 +\$23\.92  -", done.stdout)


@pytest.mark.slow
def test_no_deploy_rents_and_starts_nothing(laptop: Laptop, fake: FakeLambda, side: OtherSide) -> None:
    done = laptop.run("--no-deploy", "--poll-seconds=2", program="launch_lambda.py")
    assert done.returncode == 0 and not side.checkout.exists()
    assert "ssh " in done.stdout and len(fake.running) == 1
    assert laptop.run("--terminate", program="launch_lambda.py").returncode == 0


# ---- what goes wrong gives the machine back


def test_a_driver_that_fails_at_once(tmp_path: Path, laptop: Laptop, fake: FakeLambda) -> None:
    done = laptop.run(*started(tmp_path, BAD))
    assert done.returncode == 1 and "exit code 7" in done.stderr and "CUDA error: no" in done.stderr
    assert len(fake.launches) == 1


@pytest.mark.slow
def test_a_machine_without_a_gpu(tmp_path: Path, laptop: Laptop, side: OtherSide) -> None:
    (side.bin / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    done = laptop.run(*started(tmp_path, LONG))
    assert done.returncode == 1 and "no GPU" in done.stderr


@pytest.mark.slow
def test_a_run_script_that_is_not_in_the_repository(tmp_path: Path, laptop: Laptop) -> None:
    done = laptop.run(*started(tmp_path, GOOD), "--run-script=nothere.sh")
    assert done.returncode == 1 and "nothere.sh is not in" in done.stderr


@pytest.mark.slow
def test_ssh_that_never_answers(tmp_path: Path, laptop: Laptop, fake: FakeLambda, side: OtherSide) -> None:
    fake.polls_until_active = 1
    (side.log / "ssh_fails").write_text("9999")
    done = laptop.run(*started(tmp_path, GOOD), "--max-wait-minutes=0.4")
    assert done.returncode == 1 and "ssh cannot connect" in done.stderr


@pytest.mark.slow
def test_ssh_that_answers_late(laptop: Laptop, side: OtherSide) -> None:
    (side.log / "ssh_fails").write_text("2")
    assert laptop.run("--ssh-key-name=laptop", "--poll-seconds=2").returncode == 0
    assert laptop.run("--terminate").returncode == 0


@pytest.mark.slow
def test_another_host_key_than_at_first_contact_is_refused(
    tmp_path: Path, laptop: Laptop, side: OtherSide
) -> None:
    assert laptop.run("--ssh-key-name=laptop", "--poll-seconds=2").returncode == 0
    assert "StrictHostKeyChecking=accept-new" in side.argv
    (side.log / "host_key").write_text("fake ssh-ed25519 SOMEBODYELSE")
    status = laptop.run("--status")
    assert "Host key verification failed" in status.stdout
    assert side.argv.splitlines()[-1].count("StrictHostKeyChecking=yes") == 1
    assert laptop.run("--terminate").returncode == 0


def test_a_killed_launcher_gives_the_machine_back(tmp_path: Path, laptop: Laptop, fake: FakeLambda) -> None:
    fake.polls_until_active = 10**6
    code, rest = laptop.terminated_once_launched("--ssh-key-name=laptop")
    assert code == 143 and "is terminated" in rest


@pytest.mark.slow
def test_keep_leaves_it_and_says_what_it_costs(tmp_path: Path, laptop: Laptop, fake: FakeLambda) -> None:
    done = laptop.run(*started(tmp_path, BAD), "--keep")
    assert done.returncode == 1 and "costs money" in done.stderr and len(fake.running) == 1
    assert laptop.run("--terminate").returncode == 0


@pytest.mark.slow
def test_results_that_cannot_be_brought_home_are_not_thrown_away(tmp_path: Path, laptop: Laptop, fake: FakeLambda, side: OtherSide) -> None:  # fmt: skip
    (side.bin / "rsync").write_text("#!/bin/sh\nexit 3\n")
    (side.bin / "rsync").chmod(0o755)
    done = laptop.run(*started(tmp_path, "echo hello\n"), "--terminate-when-done")
    assert (
        done.returncode == 1 and "IS LEFT RUNNING AND COSTS MONEY" in done.stderr and len(fake.running) == 1
    )
    (side.bin / "rsync").unlink()
    assert laptop.run("--attach", "--terminate-when-done", "--poll-seconds=2").returncode == 0


@pytest.mark.slow
def test_a_failed_run_is_fetched_and_terminated_and_its_code_returned(tmp_path: Path, laptop: Laptop) -> None:
    driver = 'echo working; mkdir -p "$NANOCHAT_BASE_DIR/runs/r"; echo 1 >"$NANOCHAT_BASE_DIR/runs/r/x"; until [ -e "$HOME/go" ]; do sleep 0.05; done; exit 9\n'
    done = laptop.run(*started(tmp_path, driver), "--terminate-when-done")
    assert (
        done.returncode == 9 and (laptop.home / "fetched" / "nanochat-aquarat" / "runs" / "r" / "x").exists()
    )


@pytest.mark.slow
def test_max_hours_ends_a_run_that_does_not(tmp_path: Path, laptop: Laptop) -> None:
    done = laptop.run(*started(tmp_path, LONG), "--terminate-when-done", "--max-hours=0.01")
    assert done.returncode == 1 and "--max-hours" in done.stderr and "is terminated" in done.stderr


# ---- regions and money


def test_auto_goes_to_the_next_region_when_one_is_lost(laptop: Laptop, fake: FakeLambda) -> None:
    fake.faults["POST /instance-operations/launch"] = [
        (400, "instance-operations/launch/insufficient-capacity")
    ]
    fake.launch_times = []
    done = laptop.run("--poll-seconds=2")
    assert done.returncode == 0, done.stderr
    assert [body["region_name"] for body in fake.launches] == ["us-east-1", "us-west-1"]
    assert laptop.run("--terminate").returncode == 0


def test_nothing_is_launched_above_the_price_or_without_capacity(laptop: Laptop, fake: FakeLambda) -> None:
    done = laptop.run("--instance-type=gpu_8x_h100_sxm5", "--max-price=20")
    assert done.returncode == 1 and "$23.92 an hour, more than --max-price=20" in done.stderr
    fake.capacity["gpu_1x_a10"] = []
    done = laptop.run()
    assert done.returncode == 1 and "--wait-for-capacity" in done.stderr
    assert fake.launches == []


def test_skip_wait_returns_at_once_and_user_data_holds_no_secret(laptop: Laptop, fake: FakeLambda, side: OtherSide) -> None:  # fmt: skip
    done = laptop.run(
        "--skip-wait", "--inject-env=WANDB_API_KEY", "--name=mine", "--image-family=lambda-stack-22-04"
    )
    assert done.returncode == 0 and "not waited for" in done.stdout and side.argv == ""
    (body,) = fake.launches
    assert body["name"] == "mine" and body["image"] == {"family": "lambda-stack-22-04"}
    assert body["user_data"].startswith("#cloud-config\n") and SECRET not in body["user_data"]
    assert laptop.run("--print-user-data").stdout == body["user_data"]
    assert laptop.run("--terminate=mine").returncode == 0
    assert laptop.run("--skip-wait", "--no-user-data").returncode == 0 and "user_data" not in fake.launches[1]
    assert laptop.run("--terminate").returncode == 0


def test_the_plan_prices_the_run_and_rents_nothing(laptop: Laptop, fake: FakeLambda) -> None:
    done = laptop.run("--plan", "--instance-type=gpu_8x_h100_sxm5", "--env=DEPTH=20")
    assert done.returncode == 0, done.stderr
    hours, cost = re.findall(r"training +([\d.]+) hours, \$([\d.,]+)", done.stdout)[0]
    assert float(cost) == pytest.approx(float(hours) * 23.92, abs=0.13), "cents of the account, not of a list"
    assert "560,988,160 parameters" in done.stdout and fake.launches == []
    offline = laptop.run("--plan", "--instance-type=gpu_8x_h100_sxm5", LAMBDA_API_KEY="")
    assert offline.returncode == 0 and "list price" in offline.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ssh-key-name=desktop"], "the account has laptop"),
        (["--instance-type=gpu_3x"], "is not offered"),
        (["--skip-wait", "--auto-start"], "--skip-wait"),
        (["--terminate-when-done"], "add --auto-start"),
        (["--auto-start", "--keep", "--terminate-when-done"], "contradict"),
        (["--inject-env=NOT_SET_ANYWHERE"], "it is not set here"),
        (["--env=WANDB_API_KEY=abc"], "use --inject-env WANDB_API_KEY"),
        (["--env=DEPTH"], "write --env NAME=VALUE"),
        (["--repo-url=https://user:token@host/x.git"], "--repo-url holds a user or a token"),
        (["--tmux-session=a b"], "--tmux-session=a b"),
        (["--identity-file=/no/such/key", "--poll-seconds=2"], "is not a file"),
        (["--terminate=nobody"], "no machine nobody"),
        (["--max-price=-3"], "not negative"),
    ],
)
def test_a_mistake_costs_one_line_and_no_machine(laptop: Laptop, words: Sequence[str], message: str) -> None:
    done = laptop.run(*words)
    assert done.returncode in (1, 2) and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


# ---- small parts


def test_flags_without_a_value_mean_the_only_machine() -> None:
    assert with_any(["--status"]) == ["--status=any"]
    assert with_any(["--logs", "--keep"]) == ["--logs=any", "--keep"]
    assert with_any(["--fetch", "abc", "--terminate=x"]) == ["--fetch", "abc", "--terminate=x"]


def test_dotenv_survives_every_value_that_python_dotenv_reads(tmp_path: Path) -> None:
    from dotenv import dotenv_values

    hostile = {
        "A": "plain",
        "B": 'it\'s $(touch owned) `x` "q" \\ #c',
        "C": "",
        "D": "end\\",
        "E": " blanks ",
    }
    (tmp_path / ".env").write_bytes(dotenv(hostile))
    assert dotenv_values(tmp_path / ".env") == hostile
    with pytest.raises(UserError, match="more than one line"):
        dotenv({"A": "x\ny"})


def test_environment_takes_names_in_every_form() -> None:
    ours = {"A": "1", "B": "2", "C": "3"}
    assert environment(("X=y=z",), ("A,B", "C"), ours) == {"X": "y=z", **ours}


def test_a_job_is_made_of_plain_words() -> None:
    with pytest.raises(UserError):
        Job("https://x/y.git", "-x", "run.sh", "s", "d")
    with pytest.raises(UserError):
        Job("https://x/y.git", "", "run.sh", "s; rm", "d")


# ---- a real sshd, where there is one


SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))


@pytest.mark.skipif(not SSHD or not shutil.which("rsync"), reason="needs sshd and rsync")
def test_a_real_sshd_pins_its_key_takes_secrets_and_sends_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    import getpass

    from nanochat import remote_job
    from nanochat.remote import Remote, SshError, fetch, run, wait_for_ssh

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "laptop"))
    tmp_path.chmod(0o700)
    for name in ("host", "host2", "me"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    port = free_port()

    def sshd(host_key: str) -> subprocess.Popen[bytes]:
        options = {
            "ListenAddress": f"127.0.0.1:{port}", "AuthorizedKeysFile": tmp_path / "me.pub", "StrictModes": "no",
            "PidFile": tmp_path / "pid", "UsePAM": "no", "PasswordAuthentication": "no", "HostKey": tmp_path / host_key,
            "PermitRootLogin": "prohibit-password",
        }  # fmt: skip
        Path("/run/sshd").mkdir(exist_ok=True) if os.geteuid() == 0 else None
        words = [word for k, v in options.items() for word in ("-o", f"{k}={v}")]
        return subprocess.Popen([str(SSHD), "-D", "-e", "-f", "/dev/null", *words], stderr=subprocess.DEVNULL)

    remote = Remote(
        "lambda", "real", "real", "127.0.0.1", port, getpass.getuser(), str(tmp_path / "me"), directory="x"
    )
    remote.folder.mkdir(parents=True)
    server = sshd("host")
    try:
        wait_for_ssh(remote, max_wait_seconds=300, poll_seconds=0.2)
        assert remote.pinned and "[127.0.0.1]" in remote.known_hosts.read_text()
        echoed = run(remote, f"cat >{tmp_path}/secret; ps -eo args | grep -c {SECRET[:-1]}[{SECRET[-1]}] || true",
                     more_input=SECRET.encode())  # fmt: skip
        assert (tmp_path / "secret").read_text() == SECRET and echoed.strip() == "0"
        with pytest.raises(SshError, match="exit status 3"):
            run(remote, "exit 3")
        (tmp_path / "there" / "report").mkdir(parents=True)
        (tmp_path / "there" / "report" / "report.md").write_text("x")
        fetch(remote, str(tmp_path / "there"), tmp_path / "here", patterns=["+ /report/***", "- *"])
        assert (tmp_path / "here" / "report" / "report.md").read_text() == "x"
    finally:
        server.terminate()
        server.wait()
    server = sshd("host2")
    try:
        with pytest.raises(SshError, match="not the one seen first"):
            wait_for_ssh(remote, max_wait_seconds=300, poll_seconds=0.2)
    finally:
        server.terminate()
        server.wait()
    assert remote_job.STATE

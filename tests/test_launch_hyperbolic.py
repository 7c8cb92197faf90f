"""Hyperbolic's launcher as a user runs it: both generations of the API behind a real address, a fake ssh, nothing left running."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cloud_fakes import FastClock, OtherSide
from hyperbolic_fakes import KEY, FakeHyperbolic, node
from laptop import BAD, GOOD, LONG, SECRET, Laptop, starting

from nanochat.hyperbolic import Version

VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])
COMMAND = "scripts.launch_hyperbolic_training"


@pytest.fixture
def fake() -> Iterator[FakeHyperbolic]:
    """A served account in real time that must be empty of machines when the test ends."""
    account = FakeHyperbolic(clock=FastClock(), address="127.0.0.1", polls_until_online=1)
    with account.served() as url:
        account.url = url
        yield account
    assert account.running == [], "a machine was left running"


@pytest.fixture
def laptop(tmp_path: Path, fake: FakeHyperbolic, side: OtherSide) -> Laptop:
    ours = {"HYPERBOLIC_API_KEY": KEY, "HYPERBOLIC_API_BASE": fake.url}
    return Laptop(tmp_path / "laptop", side, COMMAND, ours, hidden=(KEY,))


def no_secret_anywhere(fake: FakeHyperbolic, side: OtherSide) -> None:
    """The key of W&B went over standard input and nowhere else, and ours in one header."""
    assert SECRET in side.stdin and KEY not in side.stdin
    assert SECRET not in side.argv and KEY not in side.argv
    said = json.dumps(fake.requests)
    assert SECRET not in said and KEY not in said


# ---- looking


def test_the_list_is_in_dollars_cheapest_first(laptop: Laptop, fake: FakeHyperbolic) -> None:
    done = laptop.run("--list")
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert re.match(r" +\$0.99 an hour  1x NVIDIA-H100 of acme +us-west +cluster/n2$", first)
    assert re.match(r" +\$1.49 an hour  1x NVIDIA-H100 of acme +us-west +cluster/n1$", second)
    assert last == "2 offers; credits: $25.00"
    eight = laptop.run("--list", "--gpu-count=8").stdout
    assert "$11.92 an hour  8x NVIDIA-H100" in eight and "1 offers" in eight
    assert fake.creates == []


def test_the_list_of_the_other_generation(laptop: Laptop, fake: FakeHyperbolic) -> None:
    fake.credits = None
    done = laptop.run("--list", "--gpu-count=8", "--api-version=v2")
    assert done.returncode == 0 and "$15.92 an hour  8x H100" in done.stdout, done.stderr
    assert "1 offers; credits: not known" in done.stdout and fake.creates == []


@VERSIONS
def test_the_plan_prices_the_run_and_rents_nothing(laptop: Laptop, fake: FakeHyperbolic, version: Version) -> None:  # fmt: skip
    done = laptop.run("--plan", "--gpu-count=8", "--env=DEPTH=20", f"--api-version={version}")
    assert done.returncode == 0, done.stderr
    hours, cost = re.findall(r"training +([\d.]+) hours, \$([\d.,]+)", done.stdout)[0]
    price = 11.92 if version == "v1" else 15.92
    assert float(cost) == pytest.approx(float(hours) * price, abs=0.1)
    assert "560,988,160 parameters" in done.stdout and "credits     $25.00" in done.stdout
    assert fake.creates == []


# ---- the whole way


@VERSIONS
def test_launch_start_prove_wait_fetch_terminate(tmp_path: Path, laptop: Laptop, fake: FakeHyperbolic, side: OtherSide, version: Version) -> None:  # fmt: skip
    done = laptop.run(
        *starting(tmp_path, GOOD), f"--api-version={version}", "--max-price=2.50",
        "--inject-env=WANDB_API_KEY", "--env=DEPTH=2", "--terminate-when-done",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    order = [
        "renting 1x", "named no machine; looking", "launched", "online", "host key is pinned", "checked out",
        "wrote .env (mode 600) with DEPTH, WANDB_API_KEY", "tmux, driver and NVIDIA A10 are alive", "the driver runs in",
        "ended with exit code 0", "fetched to", "is terminated",
    ]  # fmt: skip
    places = [done.stderr.index(text) for text in order]
    assert places == sorted(places), done.stderr
    assert len(fake.rentals) == 1, "an answer without an id is no reason to rent twice"
    wanted = {"cluster_name": "cluster", "node_name": "n2", "gpu_count": 1}
    assert fake.creates == [wanted if version == "v1" else {"gpuCount": 1}]
    no_secret_anywhere(fake, side)
    assert "mode 600" in (side.checkout / "training.log").read_text()
    assert (side.argv.count("-p\x0031424") > 0) == (version == "v1"), "the port of the ssh command"
    (home,) = (laptop.home / "fetched").iterdir()
    assert (home / "report" / "report.md").read_text() == "# report\n"
    assert (home / "chatrl_checkpoints" / "d2" / "model_000003.pt").is_file()


def test_the_commands_that_it_prints(tmp_path: Path, laptop: Laptop, fake: FakeHyperbolic, side: OtherSide) -> None:  # fmt: skip
    fake.name_it = True
    done = laptop.run(*starting(tmp_path, GOOD))
    assert done.returncode == 0 and "It costs money until it is terminated" in done.stdout, done.stderr
    printed = dict(re.findall(rf"^(log|bring home|end it) +python -m {COMMAND} (\S+)$", done.stdout, re.M))
    assert printed == {"log": "--logs=1", "bring home": "--fetch=1", "end it": "--terminate=1"}
    status = laptop.run("--status")
    assert "GPU NVIDIA A10" in status.stdout
    assert "1 running, $0.00 an hour together, and 1 whose price the provider does not say" in status.stdout
    (side.home / "go").touch()
    logs = laptop.run(printed["log"])
    assert logs.returncode == 0 and "the end\n== ended with exit code 0" in logs.stdout
    assert laptop.run(printed["bring home"]).returncode == 0
    assert laptop.run(printed["end it"]).returncode == 0
    assert laptop.run("--status").stdout.endswith("0 running, $0.00 an hour together\n")


# ---- what goes wrong gives the machine back


@VERSIONS
def test_a_driver_that_fails_at_once(
    tmp_path: Path, laptop: Laptop, fake: FakeHyperbolic, version: Version
) -> None:
    done = laptop.run(*starting(tmp_path, BAD), f"--api-version={version}")
    assert done.returncode == 1 and "exit code 7" in done.stderr and "CUDA error: no" in done.stderr
    assert "1 is terminated, nothing more is paid for it" in done.stderr and len(fake.rentals) == 1


@VERSIONS
def test_a_machine_that_fails_to_boot(
    tmp_path: Path, laptop: Laptop, fake: FakeHyperbolic, version: Version
) -> None:
    fake.status_at_end = "failed"
    done = laptop.run(*starting(tmp_path, GOOD), f"--api-version={version}")
    assert done.returncode == 1 and "is failed and will not become active" in done.stderr
    assert len(fake.rentals) == 1


@VERSIONS
def test_a_launch_whose_answer_is_lost_on_the_way(tmp_path: Path, laptop: Laptop, fake: FakeHyperbolic, version: Version) -> None:  # fmt: skip
    """The connection breaks after the deed: a real one, under a real client."""
    fake.lose_answer, fake.name_it = True, True
    done = laptop.run(*starting(tmp_path, GOOD), f"--api-version={version}")
    assert done.returncode == 0 and "the request left and no answer came" in done.stderr, done.stderr
    assert len(fake.creates) == 1 and fake.running == ["1"]
    assert laptop.run("--terminate", f"--api-version={version}").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no ssh", "no gpu", "never boots", "no script"])
def test_what_else_goes_wrong(tmp_path: Path, laptop: Laptop, fake: FakeHyperbolic, side: OtherSide, fault: str) -> None:  # fmt: skip
    more = []
    fake.polls_until_online = 0  # the machine itself is there at once; the wait is for what is missing
    if fault == "no ssh":
        (side.log / "ssh_fails").write_text("9999")
    elif fault == "no gpu":
        (side.bin / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    elif fault == "never boots":
        fake.polls_until_online = 10**6
    else:
        more = ["--run-script=nothere.sh"]
    done = laptop.run(*starting(tmp_path, LONG), "--max-wait-minutes=0.4", *more)
    words = {"no ssh": "ssh cannot connect", "no gpu": "no GPU", "never boots": "--max-wait-minutes", "no script": "is not in"}  # fmt: skip
    assert done.returncode == 1 and words[fault] in done.stderr and "is terminated" in done.stderr, (
        done.stderr
    )


def test_a_killed_launcher_gives_the_machine_back(laptop: Laptop, fake: FakeHyperbolic) -> None:
    fake.polls_until_online = 10**6
    code, rest = laptop.terminated_once_launched()
    assert code == 143 and "is terminated" in rest


def test_keep_leaves_it_and_says_what_it_costs(tmp_path: Path, laptop: Laptop, fake: FakeHyperbolic) -> None:
    done = laptop.run(*starting(tmp_path, BAD), "--keep")
    assert done.returncode == 1 and "--keep leaves 1 running, and it costs money" in done.stderr
    assert fake.running == ["1"]
    assert laptop.run("--terminate").returncode == 0


def test_other_machines_of_the_account_are_not_touched(
    tmp_path: Path, laptop: Laptop, fake: FakeHyperbolic
) -> None:
    fake.rentals["1"] = {"status": "online", "since": 0}
    done = laptop.run(*starting(tmp_path, BAD))
    assert done.returncode == 1 and fake.running == ["1"]
    nothing = laptop.run("--terminate")
    assert nothing.returncode != 0 and "no machine of ours" in nothing.stderr and fake.running == ["1"]
    assert laptop.run("--terminate=1").returncode == 0


# ---- money and mistakes


@VERSIONS
def test_nothing_is_launched_above_the_price_or_the_credits(laptop: Laptop, fake: FakeHyperbolic, version: Version) -> None:  # fmt: skip
    done = laptop.run("--max-price=0.98", f"--api-version={version}")
    assert done.returncode == 1 and "no machine matches" in done.stderr
    fake.credits = 98
    done = laptop.run(f"--api-version={version}")
    assert done.returncode == 1 and "the account has $0.98, less than an hour of" in done.stderr
    assert fake.creates == []


def test_a_machine_that_somebody_else_took_is_not_the_end(laptop: Laptop, fake: FakeHyperbolic) -> None:
    fake.taken = {"n2"}
    done = laptop.run("--poll-seconds=2")
    assert done.returncode == 0 and "trying the next" in done.stderr, done.stderr
    assert [body["node_name"] for body in fake.creates] == ["n2", "n1"]
    assert laptop.run("--terminate").returncode == 0


def test_region_and_supplier_narrow_the_choice(laptop: Laptop, fake: FakeHyperbolic) -> None:
    fake.nodes = [node("a", 90), node("b", 120, supplier="other"), {**node("c", 150), "location": {"region": "eu-north"}}]  # fmt: skip
    assert laptop.run("--supplier=other", "--skip-wait").returncode == 0
    assert laptop.run("--region=eu-north", "--skip-wait").returncode == 0
    assert [body["node_name"] for body in fake.creates] == ["b", "c"]
    for number in ("1", "2"):
        assert laptop.run(f"--terminate={number}").returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu-count=0"], "--gpu-count=0: a machine has at least one GPU"),
        (["--gpu-count=3", "--api-version=v2"], "no machine matches --gpu-count"),
        (["--api-version=v3"], "api-version"),
        (["--max-price=-1"], "not negative"),
        (["--env=WANDB_API_KEY=abc", "--auto-start"], "use --inject-env WANDB_API_KEY"),
        (["--attach=1"], "say so with --terminate-when-done"),
    ],
)
def test_a_mistake_costs_one_line_and_no_machine(laptop: Laptop, fake: FakeHyperbolic, words: Sequence[str], message: str) -> None:  # fmt: skip
    done = laptop.run(*words)
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert fake.creates == []


def test_without_the_key_or_with_a_wrong_one(laptop: Laptop, fake: FakeHyperbolic) -> None:
    done = laptop.run("--list", HYPERBOLIC_API_KEY="")
    assert done.returncode == 1 and "HYPERBOLIC_API_KEY is not set; make a key at" in done.stderr
    done = laptop.run("--list", HYPERBOLIC_API_KEY="wrong-key")
    assert done.returncode == 1 and "check HYPERBOLIC_API_KEY" in done.stderr
    assert "wrong-key" not in done.stderr + done.stdout and len(fake.requests) == 1, "never asked twice"


def test_a_changed_contract_costs_one_line(laptop: Laptop, fake: FakeHyperbolic) -> None:
    fake.nodes = [{**node("n1", 149), "pricing": "1.49"}]
    done = laptop.run()
    assert (
        done.returncode == 1 and "its contract has changed" in done.stderr and "Traceback" not in done.stderr
    )
    assert fake.creates == []
